"""Attention and its gradients in float64, at some rows and keys of sequences too long for all.

A row of the result needs all its keys but no other row; the gradients of a key need all the rows
that see it, each with its own softmax. Both are exact, and cost what the sample costs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnspan.patterns import Pattern

_ROWS = 32  # at a time: 32 heads of 131,072 scores in float64 are then 1 GiB


def rows(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, at: Tensor, grad: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows `at` of the output `(Hq, rows, head_dim)`, of the LSE and, with `grad`, of dq.

    Arguments and results are of batch 1, those as in `attnspan.attention`; these in float64.
    """
    outs, lses, grads = [], [], []
    for some in at.split(_ROWS):
        p, lse, low = _weights(q, k, pattern, some)
        key, value = (x[0, :, low : low + p.shape[-1]].double() for x in (k, v))
        outs.append((p @ value[:, None]).flatten(0, 1))
        lses.append(lse.flatten(0, 1))
        if grad is not None:
            ds = _score_grads(p, _grouped(grad, k, some), value)
            grads.append((ds @ key[:, None]).flatten(0, 1) * q.shape[3] ** -0.5)
    return torch.cat(outs, 1), torch.cat(lses, 1), torch.cat(grads, 1) if grads else None


def keys(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, at: Tensor, grad: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the keys `at` receive `(Hkv, keys)`, and with `grad` their dk and dv `(.., head_dim)`.

    Arguments and results as in `rows`; `at` rises.
    """
    shape = (k.shape[1], len(at))
    received = torch.zeros(shape, dtype=torch.float64, device=k.device)
    dk, dv = (received.new_zeros(*shape, k.shape[3]) for _ in range(2))
    for some in _seeing(pattern, at, q.shape[2]):
        p, _, low = _weights(q, k, pattern, some)
        # Keys that this chunk's range leaves out are seen by none of its rows.
        held = (at >= low) & (at < low + p.shape[-1])
        there = at[held] - low
        weights = p[..., there]
        received[:, held] += weights.sum((1, 2))
        if grad is not None:
            incoming = _grouped(grad, k, some)
            value = v[0, :, low : low + p.shape[-1]].double()
            ds = _score_grads(p, incoming, value)[..., there]
            query = _grouped(q, k, some)
            dk[:, held] += torch.einsum("hgrk,hgrd->hkd", ds, query) * q.shape[3] ** -0.5
            dv[:, held] += torch.einsum("hgrk,hgrd->hkd", weights, incoming)
    return received, dk, dv


def _seeing(pattern: Pattern, at: Tensor, n: int) -> Iterator[Tensor]:
    places = torch.arange(n, device=at.device)
    seen = pattern.sees(places[:, None], at).any(1)
    yield from places[seen].split(_ROWS)


def _grouped(x: Tensor, k: Tensor, at: Tensor) -> Tensor:
    """Rows of a tensor of query heads as `(Hkv, Hq / Hkv, rows, head_dim)`, in float64."""
    return x[0, :, at].double().unflatten(0, (k.shape[1], -1))


def _weights(q: Tensor, k: Tensor, pattern: Pattern, at: Tensor) -> tuple[Tensor, Tensor, int]:
    """Softmax weights `(Hkv, Hq / Hkv, rows, keys)`, LSE, and the first of the keys."""
    mask = pattern.sees(at[:, None], torch.arange(k.shape[2], device=k.device))
    seen = mask.any(0).nonzero()
    low, high = int(seen[0]), int(seen[-1]) + 1
    scores = _grouped(q, k, at) @ k[0, :, None, low:high].double().mT * q.shape[3] ** -0.5
    scores.masked_fill_(~mask[:, low:high], -torch.inf)
    lse = scores.logsumexp(-1)
    return scores.sub_(lse[..., None]).exp_(), lse, low


def _score_grads(p: Tensor, grad: Tensor, value: Tensor) -> Tensor:
    dp = grad @ value[:, None].mT
    return p * (dp - (p * dp).sum(-1, keepdim=True))
