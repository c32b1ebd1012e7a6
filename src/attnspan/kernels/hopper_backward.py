"""Backward of attention on NVIDIA's Hopper GPUs: one CUDA C++ kernel over lists of tiles.

`hopper_backward.cu` tells how it works. It does five products of a query tile by a key tile, as few
as backward can, and adds the parts of dQ up in fp32 in a ring of tiles that need not be as long as
the sequence: with a window W and n tokens it takes O(W) memory beside the gradients, not O(n).
`hopper_backward_items` cuts its work into items of about one length.
Each gradient is a sum in fp32, rounded once; P and dS are rounded to the inputs' dtype between
the products, as in FlashAttention.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from attnspan.kernels import driver, nvrtc
from attnspan.kernels.capability import compute_capability, processors_of
from attnspan.kernels.hopper_backward_items import SLOT_BYTES, Shape, items_of

if TYPE_CHECKING:
    from attnspan.kernels.gpu_lists import Lists

SOURCE = Path(__file__).with_suffix(".cu")
TILE_K = 128
_SHARED_BYTES = 227 * 1024  # all that a block can have: one runs on a multiprocessor
_THREADS = 512


def tile_q(head_dim: int) -> int:
    """Queries of a tile: what fits into the registers beside the sums of dK and dV."""
    return 64 if head_dim == 128 else 128


def options(head_dim: int, dtype: torch.dtype, ranges: int, ordered: bool) -> tuple[str, ...]:
    """The compiler's options for one form of the kernel."""
    return (
        "--gpu-architecture=sm_90a",
        "--std=c++17",
        f"-DHEAD_DIM={head_dim}",
        f"-DIS_BF16={int(dtype == torch.bfloat16)}",
        f"-DRANGES={ranges}",
        f"-DORDERED={int(ordered)}",
        f"-DSHARED_BYTES={_SHARED_BYTES}",
    )


def lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What this implementation lacks for these inputs, as the end of a sentence; None: nothing."""
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on NVIDIA's Hopper GPUs, not on {q.device.type}"
    if compute_capability(q.device)[0] != 9:
        return "it runs on NVIDIA's Hopper GPUs (compute capability 9.0) only"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it has bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in (64, 128) or v.shape[-1] != q.shape[-1]:
        return "its heads have 64 or 128 channels, as many in v as in k"
    return nvrtc.lack()


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    scale: float,
    *,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of attention by q, k and v.

    Args:
        grad_out: the gradient of `out`.
        grad_lse: that of `lse`; None is zero.
        q: bfloat16 or float16 `(batch, Hq, n, head_dim)`, head_dim 64 or 128. All tensors may have
            any strides; those whose last dimension isn't dense or whose address or strides aren't
            multiples of 16 bytes are copied.
        k: `(batch, Hkv, m, head_dim)`, with `v`; Hkv divides Hq.
        v: see k.
        out: what forward returned, in the dtype of q.
        lse: float32 `(batch, Hq, n)`, natural logarithm, minus infinity where a row sees nothing.
        lists: which query sees which key.
        scale: what the products of queries and keys are multiplied by.
        deterministic: add the parts of dQ in one order, so that repeats are equal bit by bit, at a
            seventh more time. dK and dV always are.

    Returns:
        dq, dk, dv, with the shapes and the dtype of q, k and v.
    """
    batch, heads, n, width = q.shape
    kv_heads, m = k.shape[1:3]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not batch * heads * n * m:
        return dq.zero_(), dk.zero_(), dv.zero_()
    dq, dk, dv = (x if driver.mappable(x) else x.new_empty(x.shape) for x in (dq, dk, dv))
    q, k, v, out, grad_out = (
        x if driver.mappable(x) else x.clone(memory_format=torch.contiguous_format)
        for x in (q, k, v, out, grad_out)
    )
    rows = tile_q(width)
    query_tiles, key_tiles = -(-n // rows), -(-m // TILE_K)
    by_row, by_column = lists.rows(rows, TILE_K), lists.columns(TILE_K, rows)
    ranges = len(lists.low)
    kernels = _kernels(options(width, q.dtype, ranges, deterministic))
    processors = processors_of(q.device)
    side = _side(width, kv_heads)
    strips, strip_heads = batch * kv_heads // side, side * heads // kv_heads
    places = _places(lists, rows, strips, side, processors)
    free = places == strips * query_tiles
    items = items_of(lists, Shape(rows, TILE_K, strips, side, heads // kv_heads, processors, free))
    blocks = min(len(items.table), processors)
    # A queue is served by blocks of its own, so where places of the ring are waited for, enough of
    # them must run at once, whatever else the GPU does; one queue is served by any block.
    queues = strip_heads if strip_heads <= (blocks if free else blocks // 2) else 1

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    last_stats = empty(batch, heads, 2 * rows, dtype=torch.float32)
    bounds = empty(ranges, query_tiles * rows, 2)
    state, following = empty(batch, query_tiles, heads), empty(1 + queues)
    # Of the items that are cut: sums of dK and dV, and whose turn it is of the eight warps' parts.
    sums = empty(items.slots, SLOT_BYTES * width, dtype=torch.uint8)
    turns = empty(items.slots, 8)
    ring = empty(places, strip_heads, rows * width, dtype=torch.float32)
    if not deterministic:
        ring.zero_()
    low, high = lists.low.contiguous(), lists.high.contiguous()

    prepare = _Prepare(
        out=out.data_ptr(),
        grad_out=grad_out.data_ptr(),
        lse=lse.data_ptr(),
        grad_lse=None if grad_lse is None else grad_lse.data_ptr(),
        low=low.data_ptr(),
        high=high.data_ptr(),
        last_stats=last_stats.data_ptr(),
        bounds=bounds.data_ptr(),
        row_ptr=by_row.ptr.data_ptr(),
        rows=by_row.items.data_ptr(),
        state=state.data_ptr(),
        next=following.data_ptr(),
        turns=turns.data_ptr(),
        dq=dq.data_ptr(),
        out_strides=_strides(out),
        grad_strides=_strides(grad_out),
        lse_strides=_strides(lse),
        grad_lse_strides=_strides(lse if grad_lse is None else grad_lse),
        dq_strides=_strides(dq),
        batch=batch,
        heads=heads,
        n=n,
        strip_heads=strip_heads,
        query_tiles=query_tiles,
        queues=queues,
        slots=items.slots,
    )
    kernels.launch(
        "attention_backward_prepare", (query_tiles, heads, batch), 256, 0, q.device, (prepare,)
    )
    params = _Params(
        work=items.table.data_ptr(),
        sums=sums.data_ptr(),
        turns=turns.data_ptr(),
        last_stats=last_stats.data_ptr(),
        bounds=bounds.data_ptr(),
        column_ptr=by_column.ptr.data_ptr(),
        columns=by_column.items.data_ptr(),
        row_ptr=by_row.ptr.data_ptr(),
        rows=by_row.items.data_ptr(),
        state=state.data_ptr(),
        next=following.data_ptr(),
        ring=ring.data_ptr(),
        dq=dq.data_ptr(),
        dk=dk.data_ptr(),
        dv=dv.data_ptr(),
        dq_strides=_strides(dq),
        dk_strides=_strides(dk),
        dv_strides=_strides(dv),
        batch=batch,
        n=n,
        m=m,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        query_tiles=query_tiles,
        key_tiles=key_tiles,
        places=places,
        side=side,
        items=len(items.table),
        queues=queues,
        scale=scale,
    )
    maps = (driver.tensor_map(x, (64, rows, 1, 1)) for x in (q, grad_out))
    key_maps = (driver.tensor_map(x, (64, TILE_K, 1, 1)) for x in (k, v))
    kernels.launch(
        "attention_backward",
        (blocks, 1, 1),
        _THREADS,
        _SHARED_BYTES,
        q.device,
        (*maps, *key_maps, params),
    )
    return dq, dk, dv


class _Strides(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_longlong) for name in ("batch", "head", "row"))


def _strides(x: Tensor) -> _Strides:
    return _Strides(*x.stride()[:3])


def _pointers(*names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, ctypes.c_void_p) for name in names)


def _integers(*names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, ctypes.c_int) for name in names)


class _Params(ctypes.Structure):
    """`Params` of the kernel."""

    _fields_ = (
        *_pointers("work", "sums", "turns", "last_stats", "bounds", "column_ptr", "columns"),
        *_pointers("row_ptr", "rows", "state", "next", "ring", "dq", "dk", "dv"),
        *((name, _Strides) for name in ("dq_strides", "dk_strides", "dv_strides")),
        *_integers("batch", "n", "m", "kv_heads", "group", "query_tiles", "key_tiles", "places"),
        *_integers("side", "items", "queues"),
        ("scale", ctypes.c_float),
    )


class _Prepare(ctypes.Structure):
    """`Prepare` of the kernel before it."""

    _fields_ = (
        *_pointers("out", "grad_out", "lse", "grad_lse", "low", "high", "last_stats", "bounds"),
        *_pointers("row_ptr", "rows", "state", "next", "turns", "dq"),
        *((f"{name}_strides", _Strides) for name in ("out", "grad", "lse", "grad_lse", "dq")),
        *_integers("batch", "heads", "n", "strip_heads", "query_tiles"),
        *_integers("queues", "slots"),
    )


@lru_cache
def _kernels(given: tuple[str, ...]) -> nvrtc.Kernels:
    return nvrtc.Kernels(SOURCE, given)


def _side(head_dim: int, kv_heads: int) -> int:
    """KV heads whose key tiles are worked on side by side.

    With one, all that is in flight reads and adds to few heads' rows, which the L2 cache holds. But
    then a query tile's parts come from key tiles that start at once, and with 64 channels, where a
    query tile is as long as a key tile, each would wait for the one before it.
    """
    return 1 if head_dim == 128 else kv_heads


def _places(lists: Lists, rows: int, strips: int, side: int, processors: int) -> int:
    """Tiles of the ring of dQ, of the query heads of a strip each."""
    # The key tiles in flight: who begins with a head's tiles meets places of those who are through
    # with that head long since.
    slack = (-(-processors // side) + 4) * (TILE_K // rows)
    needed, every = _reach(lists, rows) + slack, strips * -(-lists.n // rows)
    # Where that is not much more, a place for each: all strips' longest items come first then.
    return every if every <= 2 * needed else needed


_reaches: WeakKeyDictionary[Lists, dict[int, int]] = WeakKeyDictionary()


def _reach(lists: Lists, rows: int) -> int:
    """How many query tiles the ring needs, so that no work item waits for a later one.

    A place is free for tile t once tile t - reach is final: the last key tile that the latter sees
    must come before the first that the former, or any tile after it, sees.
    """
    known = _reaches.setdefault(lists, {})
    if rows not in known:
        low, high = lists._host
        starts = np.arange(0, lists.n, rows)
        used = high > low
        first = np.where(used, low, np.iinfo(np.int32).max).min(0)
        last = np.where(used, high - 1, -1).max(0)
        first = np.minimum.reduceat(first, starts) // TILE_K
        last = np.maximum.reduceat(last, starts) // TILE_K
        first = np.minimum.accumulate(first[::-1])[::-1]
        last = np.maximum.accumulate(last)
        final = np.searchsorted(last, first, "left")  # tiles before it are final
        known[rows] = int((np.arange(len(starts)) - final).max()) + 1
    return known[rows]
