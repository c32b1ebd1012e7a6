"""Perplexity as the cache shrinks: of all that is scored, and of the half that choices see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnspan.evaluation import verdicts
from attnspan.evaluation.case import Case
from attnspan.evaluation.shrink import Ledger, best_steps, frequency_nll, perplexity, steps
from attnspan.evaluation.verdicts import TOLERANCE, within
from attnspan.models.anatomy import Anatomy, text_config
from attnspan.models.budget import resolve
from attnspan.policies import PerLayer, Policy, SinkWindow, Window

SINKS = 4
"""Tokens kept at the start, as in StreamingLLM (https://arxiv.org/abs/2309.17453)."""

FEWER_SINKS = (1, 2)
HALVINGS = 4
LEAST_WINDOW = 8

FAR = 1 << 20
"""Tokens at which the bytes of a policy are given besides the trained length: 1M."""


def _sizes(case: Case) -> list[int]:
    """Window sizes from the largest down by halves."""
    own = [window for window in case.windows if window is not None]
    top = case.length
    if len(own) == len(case.windows):
        # No layer may look further than it was trained to.
        top = min(top, min(own))
    return [top >> i for i in range(HALVINGS + 1) if top >> i >= min(LEAST_WINDOW, top)]


@dataclass(frozen=True)
class Curve:
    """What was measured of uniform policies.

    Attributes:
        whole: of all scored tokens, as JSON; what verdicts rest on.
        early: the same of the first half alone, for choices.
        first: the ledger of the first half.
        second: that of the second, which no choice may see.
        policies: all that were measured.
    """

    whole: dict[str, Any]
    early: dict[str, Any]
    first: Ledger
    second: Ledger
    policies: tuple[Policy, ...]


def sunk(size: int, sinks: int = SINKS) -> Policy:
    """Sinks, and a window that fills up to `size` tokens in all."""
    return SinkWindow(sinks, size - sinks)


def measure(case: Case, tell: Callable[[str, int, int], None]) -> Curve:
    """Perplexity under windows, with sinks and without, of sizes that go down by halves."""
    sizes = _sizes(case)
    windows = [Window(size) for size in sizes]
    policies: list[Policy] = [*windows, *(sunk(size) for size in sizes if size > SINKS)]
    total = best_steps(case.passages) + (len(policies) + len(FEWER_SINKS)) * steps(case.passages)
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        tell("windows", done, total)

    ledger = Ledger(case.model, case.passages, told)
    fresh = ledger.best
    for policy in policies:
        ledger.nlls(policy)
    # A choice like any other, so it sees the first half alone.
    reference = _reference(ledger.halves()[0], windows)
    if reference is not None:
        ledger.best = ledger.nlls(reference)
    first, second = ledger.halves()
    vocabulary = text_config(case.model).vocab_size
    texts = []
    for passage, untouched, nlls, frequency in zip(
        case.passages, fresh, ledger.best, frequency_nll(case.passages), strict=True
    ):
        blind = min(math.log(vocabulary), frequency)
        texts.append(
            {
                "text": passage.name,
                "perplexity": perplexity(nlls),
                "fresh": perplexity(untouched),
                "frequencies": math.exp(blind),
                "better_than_frequencies": math.fsum(nlls) / len(nlls) < blind,
            }
        )
    whole: dict[str, Any] = {
        "length": case.length,
        "reference": None if reference is None else reference.window,
        "best": texts,
        "judged": all(each["better_than_frequencies"] for each in texts),
        "sinks": SINKS,
        "rows": _rows(case, ledger, sizes),
        "fewer_sinks": [],
    }
    early = {**whole, "rows": _rows(case, first, sizes)}
    if verdicts.sinks_needed(whole) or verdicts.sinks_needed(early):
        size = sizes[len(sizes) // 2]
        for sinks in (*FEWER_SINKS, SINKS):
            if sinks < size:
                policy, usual = sunk(size, sinks), sunk(size)
                whole["fewer_sinks"].append(
                    {
                        "sinks": sinks,
                        "tokens": size,
                        **row(case, ledger, policy),
                        "over_all_sinks": [a.as_dict() for a in ledger.against(policy, usual)],
                    }
                )
                policies.append(policy)
        first, second = ledger.halves()
    tell("windows", total, total)
    return Curve(whole, early, first, second, tuple(dict.fromkeys(policies)))


def _rows(case: Case, ledger: Ledger, sizes: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for size in sizes:
        window, other = Window(size), sunk(size) if size > SINKS else None
        rows.append(
            {
                "tokens": size,
                "window": row(case, ledger, window),
                "sinks": None if other is None else row(case, ledger, other),
                "window_over_sinks": None
                if other is None
                else [each.as_dict() for each in ledger.against(window, other)],
            }
        )
    return rows


def _reference(ledger: Ledger, windows: Sequence[Window]) -> Window | None:
    """The window that predicts better than fresh forwards of all that may be seen, if one does.

    So it is of a model that was trained under a window which its config doesn't declare: what it
    gives with more in sight is not the best that it can do.
    """
    better = [
        window
        for window in windows
        if all(pair.high < 1 - TOLERANCE for pair in ledger.against_best(window))
    ]
    if not better:
        return None
    return min(better, key=lambda each: sum(map(math.fsum, ledger.nlls(each))))


def row(case: Case, ledger: Ledger, policy: Policy | PerLayer) -> dict[str, Any]:
    """A policy's figures, whether they are within the tolerance, and its bytes, as JSON."""
    found = ledger.row(policy)
    found["within"] = all(within(each["over_best"]) for each in found["texts"])
    found["bytes"] = policy_bytes(case.anatomy, policy, ledger.model.dtype, case.full)
    found["bytes_far"] = policy_bytes(case.anatomy, policy, ledger.model.dtype, FAR)
    return found


def policy_bytes(
    anatomy: Anatomy, policy: Policy | PerLayer, dtype: torch.dtype, tokens: int
) -> int:
    """Bytes of the keys and values that one sequence holds after `tokens`, dense, and no more."""
    total = 0
    for layer, policies in zip(anatomy.layers, resolve(policy, anatomy.layers), strict=True):
        for each in policies.of_heads(layer.spec.num_kv_heads):
            held = tokens if each.capacity is None else min(tokens, each.capacity)
            total += 2 * held * layer.spec.head_dim * dtype.itemsize
    return total
