"""Torch's FlexAttention, compiled, with its block mask made from a pattern's tiles.

The block mask comes from the plan, not from evaluating the mask on every pair. A compilation past
dynamo's limit is an error here: by itself FlexAttention then falls back to the dense product, and
asks for all its memory, in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnspan.patterns.algebra import And, Not, Or, Pattern
from attnspan.patterns.atoms import Keys, Queries, Segments
from attnspan.patterns.tiles import Tiles, whole

BLOCK = 128


def lacks(q: Tensor, k: Tensor, v: Tensor, wants_lse: bool) -> str | None:
    """What this implementation lacks for these inputs, as the end of a sentence; None: nothing."""
    if q.device.type not in ("cpu", "cuda"):
        return f"it has no kernel for {q.device.type} tensors"
    if not q.numel() or not k.numel() or not v.shape[3]:
        return "it takes no empty tensors"
    if q.dtype == torch.float64:
        return "it has no float64"
    if q.device.type == "cuda" and min(q.shape[3], v.shape[3]) < 16:
        return "on a GPU its heads have 16 channels at least"
    if q.device.type == "cpu" and wants_lse:
        return "on a CPU it gives no log-sum-exp, which learned sinks need too"
    grads = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cpu" and grads:
        return "on a CPU it has no backward"
    return None


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    q_offset: int,
    scale: float,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention, and its log-sum-exp if asked for; arguments as in `kernels.reference`.

    Raises:
        RuntimeError: where torch can't compile it, or has compiled for more kinds of inputs than
            its recompile limit allows.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch.nn.attention.flex_attention import AuxRequest

    tiles = whole(pattern, q.shape[2], k.shape[2], q_offset, BLOCK)
    mask = _block_mask(tiles, q.device)
    options: dict[str, Any] = {"block_mask": mask, "scale": scale, "enable_gqa": True}
    if softcap is not None:
        options["score_mod"] = lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)
    try:
        if not return_lse:
            return _compiled()(q, k, v, **options), None
        out, aux = _compiled()(q, k, v, **options, return_aux=AuxRequest(lse=True))
    except FailOnRecompileLimitHit as error:
        raise RuntimeError(
            "impl flex: torch has compiled FlexAttention for as many kinds of inputs as "
            "torch._dynamo.config.recompile_limit allows; raise that, or call torch._dynamo.reset()"
        ) from error
    return out, aux.lse


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Whole graphs alone: what can't be compiled raises, and nothing runs dense instead.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _block_mask(tiles: Tiles, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns = max(1, tiles.rows), max(1, -(-tiles.m // BLOCK))
    counts = {kind: np.zeros(rows, np.int32) for kind in ("partial", "full")}
    indices = {kind: np.zeros((rows, columns), np.int32) for kind in ("partial", "full")}
    for row in range(tiles.rows):
        for kind, first, last in tiles.ranges(row):
            at = counts[kind][row]
            indices[kind][row, at : at + last - first] = np.arange(first, last)
            counts[kind][row] += last - first

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x)[None, None].to(device)

    return BlockMask.from_kv_blocks(
        tensor(counts["partial"]),
        tensor(indices["partial"]),
        tensor(counts["full"]),
        tensor(indices["full"]),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask(tiles.rule, tiles, device),
        seq_lengths=(tiles.n, tiles.m),
    )


Mask = Callable[[Any, Any, Any, Any], Any]


def _mask(rule: Pattern, tiles: Tiles, device: torch.device) -> Mask:
    """`rule` as FlexAttention takes it; what needs a search is a table that was made before."""
    offset = tiles.offset

    def table(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    queries = np.arange(tiles.n, dtype=np.int64) + offset
    keys = np.arange(tiles.m, dtype=np.int64)
    nobody = np.zeros(1, np.int64)
    match rule:
        case And(left, right):
            a, b = _mask(left, tiles, device), _mask(right, tiles, device)
            return lambda batch, h, i, j: a(batch, h, i, j) & b(batch, h, i, j)
        case Or(left, right):
            a, b = _mask(left, tiles, device), _mask(right, tiles, device)
            return lambda batch, h, i, j: a(batch, h, i, j) | b(batch, h, i, j)
        case Not(inner):
            a = _mask(inner, tiles, device)
            return lambda batch, h, i, j: ~a(batch, h, i, j)
        case Keys():
            held = table(rule.sees(nobody, keys))
            return lambda batch, h, i, j: held[j]
        case Queries():
            held = table(rule.sees(queries, nobody))
            return lambda batch, h, i, j: held[i]
        case Segments():
            spans, _ = rule.spans(queries, queries, tiles.m)
            start, stop = table(spans.starts[0]), table(spans.stops[0])
            return lambda batch, h, i, j: (j >= start[i]) & (j < stop[i])
    return lambda batch, h, i, j: rule.sees(i + offset, j)
