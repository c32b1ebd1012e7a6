"""The yardstick of a bounded cache: a fresh forward over the tokens that it could have held."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnspan.evaluation.score import token_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = 256
"""Tokens at which a stream is held against a fresh forward."""

# Tokens in one batch of fresh forwards: on a CPU, what stays near its caches is fastest.
_CPU_TOKENS, _CUDA_TOKENS = 4096, 32_768

Tokens = Callable[[int, int], Sequence[int]]
"""The ids `start <= i < stop` of the sequence that was fed; id 0 is BOS where there is one."""


def spaced(tokens: int, count: int = POSITIONS) -> list[int]:
    """`count` numbers from 1 to `tokens`, evenly spaced; all of them where there are no more.

    >>> spaced(1000, 4)
    [1, 334, 667, 1000]
    >>> spaced(3, 4)
    [1, 2, 3]
    """
    if tokens <= count:
        return list(range(1, tokens + 1))
    return [1 + i * (tokens - 1) // (count - 1) for i in range(count)]


def recompute(
    model: PreTrainedModel,
    tokens: Tokens,
    held: int,
    positions: Sequence[int],
    *,
    bos: bool,
    report: Callable[[int], None] | None = None,
) -> list[float]:
    """Each token's nll after a fresh forward over the `held` tokens before it.

    Token `t` follows ids 0 to `t - 1`. Where those are more than `held`, the forward sees BOS and
    the last `held - 1` of them, or just the last `held` where there is no BOS. Tokens with no more
    than `held` before them come from one causal forward.

    Args:
        model: not attached, in eval mode.
        tokens: gives the ids.
        held: tokens of the forward, at least 1.
        positions: numbers of tokens, ascending, 1 or more each.
        bos: whether id 0 is BOS.
        report: is told how many positions are done.

    Returns:
        nats, in the order of `positions`.
    """
    near = [t for t in positions if t <= held]
    far = [t for t in positions if t > held]
    nlls: list[float] = []
    if near:
        places = torch.tensor([t - 1 for t in near], device=model.device)
        nlls += _forward(model, [tokens(0, near[-1])], places, [tokens(t, t + 1)[0] for t in near])
        if report is not None:
            report(len(nlls))
    budget = _CUDA_TOKENS if model.device.type == "cuda" else _CPU_TOKENS
    rows = max(1, budget // held)
    for first in range(0, len(far), rows):
        batch = far[first : first + rows]
        contexts = [
            [tokens(0, 1)[0], *tokens(t - held + 1, t)] if bos else tokens(t - held, t)
            for t in batch
        ]
        nlls += _forward(model, contexts, 1, [tokens(t, t + 1)[0] for t in batch])
        if report is not None:
            report(len(nlls))
    return nlls


def _forward(
    model: PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    keep: int | torch.Tensor,
    targets: Sequence[int],
) -> list[float]:
    with torch.inference_mode():
        input_ids = torch.tensor([list(ids) for ids in contexts], device=model.device)
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=keep).logits
        return token_nll(logits.flatten(0, 1), torch.tensor(targets, device=logits.device))


@dataclass(frozen=True)
class Ratio:
    """Perplexity over the recomputed perplexity, of the same tokens.

    Attributes:
        ratio: exp of the mean difference of nll.
        standard_error: of the ratio, paired: the differences' own spread, to first order.
        positions: how many tokens.
        held: tokens of each fresh forward.
    """

    ratio: float
    standard_error: float | None
    positions: int
    held: int


def ratio(streamed: Sequence[float], fresh: Sequence[float], held: int) -> Ratio:
    """The ratio of two lists of nll, in nats, of the same tokens.

    >>> found = ratio([1.0, 1.5], [0.5, 1.0], held=512)
    >>> round(found.ratio, 6), found.standard_error
    (1.648721, 0.0)
    """
    differences = [a - b for a, b in zip(streamed, fresh, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    factor = math.exp(min(mean, 709.0))
    if count < 2:
        return Ratio(factor, None, count, held)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    return Ratio(factor, factor * math.sqrt(variance / count), count, held)
