"""Attention by tiles on a CPU, composed of calls of torch's fused flash kernel.

Each row of tiles meets the keys that all its queries see without a mask, and those that some see
with one; rows of tiles that go alike are one call, over overlapping views. What a row's calls give
is merged by their log-sum-exps in fp32. The backward pass runs the same calls backward from the
final output and log-sum-exp, so nothing but those is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from attnspan.patterns.atoms import Stride, atoms
from attnspan.patterns.tiles import Pass, Tiles

# Measured on two cores for windows of 512 and 1024: smaller tiles slow the fused kernel down, and
# larger ones compute more that no query sees.
TILE = 192
_CHUNK = 16  # rows of tiles at a time, so that their results are merged while they are in cache
_NARROW = 8  # tiles of keys that one masked call takes
_FEW = 16  # queries up to which a KV head's query heads are packed


def lacks(q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> str | None:
    """What this implementation lacks for these inputs, as the end of a sentence; None: nothing."""
    if q.device.type != "cpu":
        return f"it runs on a CPU, not on {q.device.type}"
    if softcap is not None:
        return "it has no logit soft cap"
    if v.shape[-1] != q.shape[-1]:
        return f"it needs values as wide as keys, not {v.shape[-1]} beside {q.shape[-1]}"
    return None


@dataclass(frozen=True, eq=False)
class _Call:
    """`count` rows of tiles from `row` on, each `size` queries against `width` keys.

    The first row's keys start at `start`; each next row's lie `shift` later. `seen` is None where
    every query sees every key, the mask `(size, width)`, or, for each query, the ranges
    `low <= key - start < high` that it sees, both `(ranges, size)`.
    """

    row: int
    count: int
    size: int
    start: int
    width: int
    shift: int
    seen: NDArray[np.bool_] | tuple[NDArray[np.int64], NDArray[np.int64]] | None

    @cached_property
    def signature(self) -> bytes:
        """Equal for calls that mask alike."""
        parts = self.seen if isinstance(self.seen, tuple) else (self.seen,)
        return b"".join(x.tobytes() for x in parts if x is not None)

    @cached_property
    def mask(self) -> NDArray[np.bool_] | None:
        if not isinstance(self.seen, tuple):
            return self.seen
        low, high = self.seen
        key = np.arange(self.width)
        return np.any((key >= low[..., None]) & (key < high[..., None]), axis=0)

    @cached_property
    def causal(self) -> bool:
        return self.mask is not None and np.array_equal(self.mask, np.tri(self.size, dtype=bool))

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as the fused kernel takes it."""
        if self.mask is None:
            return None
        bias = torch.where(torch.from_numpy(self.mask), 0.0, -torch.inf).to(dtype)
        return bias.expand(1, 1, *bias.shape)


def forward(
    q: Tensor, k: Tensor, v: Tensor, passes: tuple[Pass, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp by the passes of a plan.

    Args:
        q: `(batch, Hq, n, head_dim)`.
        k: `(batch, Hkv, m, head_dim)`.
        v: as `k`.
        passes: from `attnspan.patterns.plan` for these lengths.
        scale: factor of the scores.

    Returns:
        `out` as `q` in shape and dtype, `lse (batch, Hq, n)` in float32, or float64 for float64.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    if not q.numel() or not k.numel():
        return q.new_zeros(q.shape), lse
    if q.dtype != wide and k.shape[1] > 1 and q.shape[2] > _FEW:
        # What is merged stands in float32: a KV head at a time, to hold little of that.
        out, groups = q.new_empty(q.shape), q.shape[1] // k.shape[1]
        for head in range(k.shape[1]):
            rows, keys = slice(head * groups, (head + 1) * groups), slice(head, head + 1)
            given = q[:, rows], k[:, keys], v[:, keys]
            out[:, rows], lse[:, rows] = forward(*given, passes, scale)
        return out, lse
    out = q.new_empty(q.shape, dtype=wide)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    for views, call in _calls(passes, (q, out, lse[..., None]), (k, v)):
        some_q, some_out, some_lse, some_k, some_v = views
        part, part_lse = _flash(some_q, some_k, some_v, call, scale)
        _merge(some_out, some_lse, part, part_lse[..., None])
    blind = lse == -torch.inf
    if blind.any():
        out.masked_fill_(blind[..., None], 0)
    return out.to(q.dtype), lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    passes: tuple[Pass, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, float32 or float64, from the whole attention's `out` and `lse`.

    `grad_lse` is None where the log-sum-exp has no gradient.
    """
    if grad_lse is not None and grad_lse.any():
        return _backward_of_both(grad_out, grad_lse, q, k, v, out, lse, passes, scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    grads = [x.new_zeros(x.shape, dtype=wide) for x in (q, k, v)]
    if not q.numel() or not k.numel():
        return grads[0], grads[1], grads[2]
    # A query that sees nothing has a lse of minus infinity, and exp(-inf - -inf) is NaN; with any
    # finite lse its weights are zero.
    lse = torch.where(lse == -torch.inf, 0, lse)[..., None]
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in (grad_out, q, out)]
    keys = [x if x.stride(-1) == 1 else x.contiguous() for x in (k, v)]
    for views, call in _calls(passes, (*rows, lse, grads[0]), (*keys, grads[1], grads[2])):
        some_grad, some_q, some_out, some_lse, into_q, some_k, some_v, into_k, into_v = views
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            some_grad,
            some_q,
            some_k,
            some_v,
            some_out,
            some_lse[..., 0],
            0.0,
            call.causal,
            attn_mask=None if call.causal else call.bias(some_q.dtype),
            scale=scale,
        )
        into_q += found[0]
        for into, grad in ((into_k, found[1]), (into_v, found[2])):
            _add(into, grad, call)
    return grads[0], grads[1], grads[2]


def received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    passes: tuple[Pass, ...],
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """The attention that each key receives, summed over queries and a KV head's query heads.

    Args:
        q: `(batch, Hq, n, head_dim)`.
        k: `(batch, Hkv, m, head_dim)`.
        lse: `(batch, Hq, n)`, the whole attention's.
        passes: as in `forward`.
        scale: factor of the scores.
        softcap: as in `attnspan.attention`.

    Returns:
        `(batch, Hkv, m)`, float32, or float64 for float64.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    total = k.new_zeros(k.shape[:3], dtype=wide)
    if not q.numel() or not k.numel():
        return total
    lse = torch.where(lse == -torch.inf, torch.inf, lse)[..., None]
    for views, call in _calls(passes, (q, lse), (k, total[..., None])):
        bias = call.bias(wide)
        bias = None if bias is None else bias[0, 0].to(q.device)
        for some_q, some_lse, some_k, into in zip(*views, strict=True):
            groups = (some_k.shape[0], -1)
            for start in range(0, call.width, _NARROW * TILE):
                columns = slice(start, start + _NARROW * TILE)
                keys = some_k[:, columns].to(wide)
                scores = scale * some_q.to(wide).unflatten(0, groups) @ keys.mT[:, None]
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores -= some_lse.unflatten(0, groups)
                if bias is not None:
                    scores += bias[:, columns]
                into[:, columns, 0] += scores.exp_().sum((1, 2))
    return total


def _backward_of_both(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    passes: tuple[Pass, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward where the log-sum-exp has a gradient too.

    With P = exp(score - lse), the gradient of a score is P * (dout . v - dout . out + dlse). One
    more channel, of ones in v, dlse in dout and zeros in out, q and k, adds the last term.
    """
    head_dim = q.shape[-1]
    q, k, v, out, grad_out = (F.pad(x, (0, 1)) for x in (q, k, v, out, grad_out))
    v[..., head_dim], grad_out[..., head_dim] = 1, grad_lse
    grads = backward(grad_out, None, q, k, v, out, lse, passes, scale)
    return grads[0][..., :head_dim], grads[1][..., :head_dim], grads[2][..., :head_dim]


def _add(into: Tensor, grad: Tensor, call: _Call) -> None:
    """Adds to keys that neighbouring rows of tiles may share."""
    if call.count == 1 or call.shift >= call.width:
        into += grad
        return
    if call.shift == 0:
        into[0] += grad.sum(0)
        return
    for start in range(0, call.width, call.shift):
        into[:, :, start : start + call.shift] += grad[:, :, start : start + call.shift]


def _flash(q: Tensor, k: Tensor, v: Tensor, call: _Call, scale: float) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    groups = q.shape[1] // k.shape[1]
    if call.size <= _FEW and groups > 1:
        # The query heads of a KV head stand as its queries, so that K and V are read once for them.
        bias = call.bias(q.dtype)
        bias = None if bias is None else bias.repeat(1, 1, groups, 1)
        packed = q.reshape(len(q), k.shape[1], -1, q.shape[3])
        out, lse = flash(packed, k, v, 0.0, False, attn_mask=bias, scale=scale)
        out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3])
    else:
        bias = None if call.causal else call.bias(q.dtype)
        out, lse = flash(q, k, v, 0.0, call.causal, attn_mask=bias, scale=scale)
    if call.mask is not None:
        blind = torch.from_numpy(~call.mask.any(1))
        if blind.any():
            out, lse = out.masked_fill(blind[:, None], 0), lse.masked_fill(blind, -torch.inf)
    return out, lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Takes a part of the keys into `out` and `lse (..., 1)`; `out` is void where `lse` is -inf."""
    fresh = lse == -torch.inf
    if fresh.all():
        out.copy_(part)
        lse.copy_(part_lse)
        return
    if fresh.any():
        out.masked_fill_(fresh, 0)  # nothing has been written there
    both = torch.logaddexp(lse, part_lse)
    # The clamp keeps minus infinity less minus infinity from being NaN.
    finite = both.clamp_min(torch.finfo(both.dtype).min)
    out.mul_(torch.exp(lse - finite)).addcmul_(part.to(out.dtype), torch.exp(part_lse - finite))
    lse.copy_(both)


def _calls(
    passes: tuple[Pass, ...], rows: tuple[Tensor, ...], keys: tuple[Tensor, ...]
) -> Iterator[tuple[tuple[Tensor, ...], _Call]]:
    """For each call, the parts of `rows` and `keys` that it concerns, and what it computes.

    Tensors come as `(any, heads, sequence, width)`, one axis of many (rows of tiles, residue
    classes, the batch) as the first.
    """
    batch = rows[0].shape[0]
    for each in passes:
        for job in each.jobs:
            for call in _plan(job.tiles):
                lengths = (batch, job.count, call.count)
                most = max(range(3), key=lambda axis: lengths[axis])
                loops = [range(1 if axis == most else lengths[axis]) for axis in range(3)]
                for b, c, r in product(*loops):
                    views = []
                    for kind, tensors in enumerate((rows, keys)):
                        first = job.first_key if kind else job.first_query
                        place = call.start if kind else call.row * job.tiles.tile
                        shift = call.shift if kind else job.tiles.tile
                        start = first + c + each.step * (place + r * shift)
                        size = call.width if kind else call.size
                        for x in tensors:
                            sb, sh, sn, sd = x.stride()
                            jump = (sb, sn, each.step * shift * sn)[most]
                            views.append(
                                x.as_strided(
                                    (lengths[most], x.shape[1], size, x.shape[3]),
                                    (jump, sh, each.step * sn, sd),
                                    x.storage_offset() + b * sb + start * sn,
                                )
                            )
                    yield tuple(views), call if most == 2 else replace(call, count=1)


def _plan(tiles: Tiles) -> Iterator[_Call]:
    """The calls of a job: what rows of tiles have alike is one."""
    calls: list[_Call] = []
    exact = not any(isinstance(atom, Stride) for atom in atoms(tiles.rule))
    spans = (np.zeros((0, 0), np.int64),) * 2
    for row in range(tiles.rows):
        if row % _CHUNK == 0:
            yield from calls
            calls = []
            if exact:
                begin = tiles.offset + row * tiles.tile
                end = min(begin + _CHUNK * tiles.tile, tiles.offset + tiles.n)
                places = np.arange(begin, end, dtype=np.int64)
                spans, _ = tiles.rule.spans(places, places, tiles.m)
        found = [
            _opened(tiles, row, start, stop, full, spans if exact else None)
            for full, start, stop in _pieces(tiles, row)
        ]
        if len(found) != len(calls):
            yield from calls
            calls = found
            continue
        for slot, new in enumerate(found):
            grown = _grown(calls[slot], new, tiles.tile)
            if grown is None:
                yield calls[slot]
            calls[slot] = grown or new
    yield from calls


def _pieces(tiles: Tiles, row: int) -> Iterator[tuple[bool, int, int]]:
    """What a row of tiles meets: (all seen, first key, key after the last), disjoint, in order."""
    tile, here = tiles.tile, tiles.offset + row * tiles.tile
    whole = tiles.all[tiles.all_ptr[row] : tiles.all_ptr[row + 1]].tolist()
    for a, b in tiles.some[tiles.some_ptr[row] : tiles.some_ptr[row + 1]].tolist():
        done = a
        # Up to a few tiles, one call with a mask costs less than several and their merging.
        parts = whole if b - a > _NARROW * tile else [x for x in whole if x == [a, b]]
        for start, stop in parts:
            if stop <= a or start >= b:
                continue
            # The keys from the first query's own place on are left to the causal diagonal.
            stop = here if start < here < stop < b else stop
            # What is seen by all, but narrow, costs less within a masked call than as its own.
            if stop - start < tile // 2 and (start, stop) != (a, b):
                continue
            yield from _partial(done, start, here, tile)
            yield True, start, stop
            done = stop
        yield from _partial(done, b, here, tile)


def _partial(start: int, stop: int, here: int, tile: int) -> Iterator[tuple[bool, int, int]]:
    """The masked calls for `start` to `stop`: the diagonal by itself, and no mask too wide."""
    most = _NARROW * tile
    if stop - start > most and start < here < stop:
        yield from _partial(start, here, here, tile)
        start = here
    for first in range(start, stop, most):
        yield False, first, min(first + most, stop)


def _opened(
    tiles: Tiles, row: int, start: int, stop: int, full: bool, spans: tuple | None
) -> _Call:
    size = min(tiles.tile, tiles.n - row * tiles.tile)
    first, seen = row * tiles.tile, None
    if not full and spans is not None:
        begin = first % (_CHUNK * tiles.tile)
        low, high = (np.clip(x[:, begin : begin + size] - start, 0, stop - start) for x in spans)
        seen = low, high
    elif not full:
        i = np.arange(first, first + size, dtype=np.int64)[:, None] + tiles.offset
        seen = tiles.rule.sees(i, np.arange(start, stop)) & np.ones((size, stop - start), bool)
    return _Call(row, 1, size, start, stop - start, 0, seen)


def _grown(call: _Call, new: _Call, tile: int) -> _Call | None:
    """`call` with one row more, if that row does the same."""
    alike = (call.size, call.width, call.signature) == (new.size, new.width, new.signature)
    shift = new.start - call.start
    if not alike or (call.count > 1 and shift != call.count * call.shift):
        return None
    if call.count == 1 and shift not in (0, tile):
        return None
    return replace(call, count=call.count + 1, shift=shift // call.count)
