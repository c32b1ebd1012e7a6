"""One context under several policies and patterns of the same budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attnspan.planner.engines import cache_bytes
from attnspan.planner.held import CacheBytes
from attnspan.planner.layers import layer_kinds, layer_views, pattern_cache, token_bytes
from attnspan.planner.operations import decode, prefill
from attnspan.planner.seen import Capped, Chunks, Strides, View
from attnspan.planner.spec import ModelSpec
from attnspan.policies import Compressive, HeavyHitter, Policy, SinkWindow, Window

if TYPE_CHECKING:
    from attnspan.planner.plan import Plan

BUDGET = 4096
_SINKS = 4
_LEAST = 16


@dataclass(frozen=True)
class Row:
    """One policy or pattern: the whole batch on one device, counted as theory has it.

    Attributes:
        name: its kind.
        sees: its SPEC text or its pattern; empty where it has none.
        cache: bytes.
        pairs: that prefill computes, of all layers.
        prefill_operations: matrix products included.
        prefill_seconds: by the device's rates.
        decode_bytes: that the context's last token reads, weights included.
        decode_seconds: by the device's rates.
        cache_ratio, pairs_ratio, decode_ratio: how many times as much full attention takes.
    """

    name: str
    sees: str
    cache: int
    pairs: int
    prefill_operations: int
    prefill_seconds: float
    decode_bytes: int
    decode_seconds: float
    cache_ratio: float
    pairs_ratio: float
    decode_ratio: float


def policies(budget: int) -> tuple[tuple[str, Policy], ...]:
    """Policies that hold `budget` tokens at most, blocks that aren't decided yet included.

    >>> [str(policy) for _, policy in policies(512)][1:]
    ['sinks:4+window:508', 'heavy:256+window:193', 'compressive:window=314,memory=128,rate=4']
    """
    block = 64 if budget >= 512 else 1
    memory = budget // 4
    return (
        ("window", Window(budget)),
        ("sinks + window", SinkWindow(_SINKS, budget - _SINKS)),
        ("H2O", HeavyHitter(budget // 2, budget - budget // 2 + 1 - block, block)),
        (
            "compressive",
            Compressive(budget - _SINKS - memory - 3 + 1 - block, memory, 4, block=block),
        ),
    )


def compare(plan: Plan, budget: int | None = None) -> tuple[Row, ...]:
    """Full attention, the model as it is, and each policy and pattern with the same budget.

    In a hybrid model policies and patterns act on the full layers. The strided pattern has half the
    budget as its window and a stride that makes the last token read as many keys again; Longformer
    a budget of which 64 tokens at most are global.

    Args:
        plan: the context, model, storage and rates.
        budget: tokens that a layer holds or reads; None: the model's window where all layers slide,
            else 4,096, and a quarter of the context where that is short.

    Raises:
        ValueError: the budget is below 16 tokens or above the window that the model was trained
            with.
    """
    spec, n = plan.spec, plan.context
    if budget is None:
        slides = [window for window in spec.windows if window is not None]
        budget = min(slides) if len(slides) == spec.layers else BUDGET
        budget = budget if n > budget else max(_LEAST, n // 4)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < _LEAST:
        raise ValueError(
            f"budget is {budget!r}; a whole number of at least {_LEAST} tokens is allowed"
        )
    if None not in spec.windows and budget > (least := min(filter(None, spec.windows))):
        raise ValueError(
            f"budget is {budget}; every layer of {spec.name} has a window, and up to the smallest, "
            f"{least}, are allowed"
        )
    rows: list[Row] = []
    for name, text, views, words, cache in _entries(plan, budget):
        kinds = layer_kinds(spec, views, words, cache, n, True)
        token = token_bytes(spec, plan.storage)
        ahead = prefill(spec, kinds, n, plan.batch, plan.weights_kind, plan.device, 1, token)
        step = decode(spec, kinds, plan.batch, plan.weights_kind, plan.device, 1, token, None)
        pairs = sum(kind.layers * kind.pairs for kind in kinds)
        full = rows[0] if rows else None
        rows.append(
            Row(
                name,
                text,
                cache.total,
                pairs,
                ahead.operations,
                ahead.seconds,
                step.bytes,
                step.seconds,
                full.cache / cache.total if full else 1.0,
                full.pairs / pairs if full else 1.0,
                full.decode_bytes / step.bytes if full else 1.0,
            )
        )
    return tuple(rows)


def _entries(
    plan: Plan, budget: int
) -> Iterator[tuple[str, str, tuple[View, ...], tuple[str, ...], CacheBytes]]:
    spec, n = plan.spec, plan.context

    def with_policy(name: str, of: ModelSpec, policy: Policy | None):
        held = cache_bytes(of, n, batch=plan.batch, policy=policy, storage=plan.storage)
        return name, str(policy or ""), *layer_views(of, policy, None), held

    unbounded = replace(spec, windows=(None,) * spec.layers, chunked=False)
    yield with_policy("full", unbounded, None)
    if unbounded.windows != spec.windows:
        yield with_policy("as it is", spec, None)
    for name, policy in policies(budget):
        yield with_policy(name, spec, policy)
    token = token_bytes(spec, plan.storage)
    own, own_words = layer_views(spec, None, None)
    hybrid = any(window is None for window in spec.windows)
    near, some = budget // 2, min(64, budget // 4)
    stride = max(1, -(-n // max(1, budget - near)))
    patterns: tuple[tuple[str, str, View], ...] = (
        ("strided", f"Strided({near}, {stride})", Strides(near, stride)),
        ("blockwise", f"Blockwise({budget})", Chunks(budget)),
        ("Longformer", f"Longformer({budget - some}, {some})", Capped(budget - 1)),
    )
    for name, word, view in patterns:
        acts = [window is None or not hybrid for window in spec.windows]
        views = tuple(view if a else each for a, each in zip(acts, own, strict=True))
        words = tuple(word if a else each for a, each in zip(acts, own_words, strict=True))
        yield name, word, views, words, pattern_cache(spec, views, n, plan.batch, token)
