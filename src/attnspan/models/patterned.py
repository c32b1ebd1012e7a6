"""`with attach(model, pattern=...)`: a model's forward and backward under any pattern.

What the model would mask, padding and packed documents, is cut out instead: each document of each
row is a sequence of its own, whose sinks, global tokens and blocks count from its start.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from attnspan.dispatch import attention
from attnspan.models.anatomy import device_of, refuse_unknown, text_config
from attnspan.models.interface import (
    Carrier,
    Interface,
    Refused,
    full_precision,
    restore_forward,
)
from attnspan.patterns import Causal, Pattern, SlidingWindow

Patterns = Pattern | Sequence[Pattern] | Mapping[str, Pattern]
Layout = tuple[tuple[tuple[int, int], ...], ...]
"""For each row of a batch, the columns of its documents: `start <= c < stop`."""


@dataclass(frozen=True)
class Rows(Carrier):
    """The documents of a batch, and what attends to them.

    It travels through the layers in the place of a mask, so that a layer which is run again for its
    gradients (activation checkpointing), in whatever thread, finds those of its own forward.
    """

    documents: Layout


@contextmanager
def patterned(model: nn.Module, pattern: Patterns) -> Iterator[nn.Module]:
    """For the block's length, layer i of `model` attends as `pattern` says for it.

    Raises:
        ValueError: where the pattern doesn't fit the model's layers, or the model can't be done
            exactly; one sentence says why.
    """
    interface = Interface(model)
    count = text_config(model).num_hidden_layers
    patterns = per_layer(pattern, count, getattr(text_config(model), "layer_types", None))
    _check(model, interface, count)
    with _running(model, interface, patterns):
        model.__dict__["_attnspan_pattern"] = pattern
        try:
            yield model
        finally:
            del model.__dict__["_attnspan_pattern"]


def per_layer(pattern: Any, count: int, kinds: Sequence[str] | None) -> tuple[Pattern, ...]:
    if isinstance(pattern, Pattern):
        return (pattern,) * count
    if isinstance(pattern, Mapping):
        missing = sorted({kind for kind in kinds or () if kind not in pattern})
        if not kinds or missing:
            raise ValueError(
                f"pattern has the layer types {sorted(pattern)}; "
                f"{sorted(set(kinds)) if kinds else 'no mapping, since the config has none,'} "
                "is allowed"
            )
        pattern = [pattern[kind] for kind in kinds]
    if not isinstance(pattern, Sequence) or not all(isinstance(p, Pattern) for p in pattern):
        raise TypeError(
            f"pattern is {pattern!r}; a Pattern, a list of one for each layer, or a mapping from "
            "the config's layer types is allowed"
        )
    if len(pattern) != count:
        raise ValueError(f"pattern has {len(pattern)} layers; the model's {count} are allowed")
    return tuple(pattern)


@torch.no_grad()
def _check(model: nn.Module, interface: Interface, count: int) -> None:
    """Holds a few tokens, each layer under its own pattern, against the untouched model."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = (torch.arange(9, device=device_of(model)) * 5 + 2)[None] % vocabulary
    training = [module for module in model.modules() if module.training]
    model.eval()
    calls: list[int] = []
    try:
        with full_precision(model):
            expected = model(input_ids=ids, use_cache=False)[0]
            with _running(model, interface, (None,) * count, calls):
                got = model(input_ids=ids, use_cache=False)[0]
    finally:
        for module in training:
            module.training = True
    kind = f"model type {model.config.model_type!r}"  # type: ignore[union-attr]
    if sorted(calls) != list(range(count)):
        raise Refused(
            f"{kind} has {count} layers, and layers {sorted(calls)} call attention through "
            "transformers' interface; patterns need it of each layer, once"
        )
    error, scale = float((got - expected).abs().max()), max(1.0, float(expected.abs().max()))
    allowed = torch.finfo(expected.dtype).eps ** 0.5 * scale
    if not error <= allowed:
        raise Refused(
            f"{kind} gives other outputs through attnspan (off by {error:.2g}, {allowed:.2g} is "
            "allowed), so it can't be done exactly"
        )


@contextmanager
def _running(
    model: nn.Module,
    interface: Interface,
    patterns: tuple[Pattern | None, ...],
    calls: list[int] | None = None,
) -> Iterator[None]:
    """Diverts attention; a pattern of None is the layer's own.

    The layers that call are listed in `calls`, which grows with each; None lists nothing.
    """

    def attend(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Rows,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        refuse_unknown(kwargs)
        layer: Any = module.layer_idx
        if calls is not None:
            calls.append(layer)
        if k.shape[2] != q.shape[2]:
            raise ValueError(
                f"past_key_values holds {k.shape[2] - q.shape[2]} tokens; none are allowed with a "
                "pattern (an attnspan.Cache goes with attach(model) alone)"
            )
        pattern = patterns[layer]
        if pattern is None:
            pattern = SlidingWindow(sliding_window) if sliding_window else Causal()
        options = {"scale": scaling, "softcap": softcap, "sink_logits": s_aux}
        with cast(q, k, v) as (q, k, v):
            return _by_document(mask.documents, q, k, v, pattern, options)

    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    forward, before = base.forward, base.__dict__.get("forward")
    names = list(inspect.signature(forward).parameters)

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs |= dict(zip(names, args, strict=False))
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is True; patterns keep no weights to return")
        with interface.masked(Rows(attend, _documents_of(kwargs))):
            return forward(**kwargs)

    with interface.diverted(None):
        base.__dict__["forward"] = call
        try:
            yield
        finally:
            restore_forward(base, before)


@contextmanager
def cast(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Under autocast, q, k and v in its dtype; in the block it is off.

    torch does this for its own attention, whose inputs may come in several dtypes: rotary
    embeddings give float32 where the values are bfloat16. Like torch it leaves float64 as it is.
    """
    kind = q.device.type
    # A tensor without memory has no autocast; torch 2.11's compiler can't ask which devices have.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        yield q, k, v
        return
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
        yield q, k, v


def _by_document(
    rows: Layout, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: dict[str, Any]
) -> Tensor:
    n = q.shape[2]
    if set(rows) == {((0, n),)}:
        return attention(q, k, v, pattern, **options)
    if len(set(rows)) > 1:
        single = [
            _by_document((row,), q[b : b + 1], k[b : b + 1], v[b : b + 1], pattern, options)
            for b, row in enumerate(rows)
        ]
        return torch.cat(single)
    pieces, done = [], 0
    for start, stop in (*rows[0], (n, n)):
        if start > done:  # padding
            pieces.append(q.new_zeros((*q.shape[:2], start - done, v.shape[3])))
        if stop > start:
            some_q, some_k, some_v = (x[:, :, start:stop] for x in (q, k, v))
            pieces.append(attention(some_q, some_k, some_v, pattern, **options))
        done = stop
    return torch.cat(pieces, 2)


def _documents_of(kwargs: dict[str, Any]) -> Layout:
    """The documents that a forward's attention mask, or its positions, tell."""
    ids = kwargs.get("input_ids")
    batch, n = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (batch, n):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask is {got}; with a pattern {(batch, n)} is allowed, which marks "
                "padding"
            )
        return tuple(_tokens(row) for row in mask.bool().tolist())
    if positions is None or n < 2:
        return (((0, n),),) * batch
    # Where positions don't count on, another document begins, as in transformers.
    breaks = (positions.diff(dim=-1) != 1).expand(batch, n - 1).tolist()
    return tuple(_documents(row, n) for row in breaks)


def _tokens(row: list[bool]) -> tuple[tuple[int, int], ...]:
    if True not in row:
        return ()
    start, stop = row.index(True), len(row) - row[::-1].index(True)
    if not all(row[start:stop]):
        raise ValueError(
            "attention_mask has a hole between tokens; padding to the left or right is allowed"
        )
    return ((start, stop),)


def _documents(breaks: list[bool], n: int) -> tuple[tuple[int, int], ...]:
    edges = [0, *(i + 1 for i, new in enumerate(breaks) if new), n]
    return tuple(pairwise(edges))
