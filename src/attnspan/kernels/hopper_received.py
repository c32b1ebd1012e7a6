"""The attention that each key received on NVIDIA's Hopper GPUs: one CUDA C++ kernel.

`hopper_received.cu` tells how it works. It takes what `gpu_received.received` takes, but for soft
caps, in bfloat16 or float16 and with heads of 64 or 128 channels, and gives the same.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attnspan.kernels import driver, nvrtc
from attnspan.kernels.capability import compute_capability, processors_of

if TYPE_CHECKING:
    from attnspan.kernels.gpu_lists import Lists

SOURCE = Path(__file__).with_suffix(".cu")
SHARED_BYTES = 227 * 1024  # all that a block can have: one runs on a multiprocessor
_KEYS = 256  # of a thread block
_ROWS = 128  # of a tile of queries: heads of a group at some positions
_THREADS = 384
_LOG2E = 1.4426950408889634


def options(head_dim: int, dtype: torch.dtype, ranges: int) -> tuple[str, ...]:
    """The compiler's options for one form of the kernel."""
    return (
        "--gpu-architecture=sm_90a",
        "--std=c++17",
        f"-DHEAD_DIM={head_dim}",
        f"-DIS_BF16={int(dtype == torch.bfloat16)}",
        f"-DRANGES={ranges}",
        f"-DSHARED_BYTES={SHARED_BYTES}",
    )


def lacks(q: Tensor, k: Tensor) -> str | None:
    """What this implementation lacks for these inputs, as the end of a sentence; None: nothing."""
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on NVIDIA's Hopper GPUs, not on {q.device.type}"
    if compute_capability(q.device)[0] != 9:
        return "it runs on NVIDIA's Hopper GPUs (compute capability 9.0) only"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it has bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in (64, 128):
        return "its heads have 64 or 128 channels"
    return nvrtc.lack()


def received(q: Tensor, k: Tensor, lse: Tensor, lists: Lists, scale: float) -> Tensor:
    """The attention that each key received: `(batch, Hkv, m)` float32.

    Args:
        q: bfloat16 or float16 `(batch, Hq, n, head_dim)`, head_dim 64 or 128; not empty. Any
            strides; what isn't dense in its last dimension or whose address or strides aren't
            multiples of 16 bytes is copied.
        k: `(batch, Hkv, m, head_dim)`; `Hq % Hkv == 0`.
        lse: `(batch, Hq, n)` float32, in natural logarithms, minus infinity where a row sees
            nothing.
        lists: which keys each query sees, for n queries and m keys.
        scale: factor of the scores.
    """
    batch, kv_heads, m, width = k.shape
    heads, n = q.shape[1:3]
    q, k = (
        x if driver.mappable(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k)
    )
    lse, low, high = lse.contiguous(), lists.low.contiguous(), lists.high.contiguous()
    group = heads // kv_heads
    # As many of a group's heads in a tile as a power of two allows.
    pack = min(8, group & -group)
    positions = _ROWS // pack
    ptr, items = lists.columns(_KEYS, positions)
    longest = _longest(lists, positions)
    tiles = -(-m // _KEYS)
    blocks = tiles * batch * kv_heads
    # Few blocks of keys are cut into parts of their queries, for the processors to have enough.
    processors = processors_of(q.device)
    parts = max(1, min(-(-2 * processors // blocks), longest * group // pack // 8))
    out = lse.new_empty((parts, batch, kv_heads, m))
    params = _Params(
        k=k.data_ptr(),
        lse=lse.data_ptr(),
        low=low.data_ptr(),
        high=high.data_ptr(),
        ptr=ptr.data_ptr(),
        items=items.data_ptr(),
        out=out.data_ptr(),
        k_batch=k.stride(0),
        k_head=k.stride(1),
        k_row=k.stride(2),
        n=n,
        m=m,
        kv_heads=kv_heads,
        group=group,
        pairs=batch * kv_heads,
        tiles=tiles,
        period=longest,
        log_positions=positions.bit_length() - 1,
        scale_log2=scale * _LOG2E,
    )
    _kernels(options(width, q.dtype, len(lists.low))).launch(
        "attention_received",
        (blocks * parts, 1, 1),
        _THREADS,
        SHARED_BYTES,
        q.device,
        (driver.tensor_map(q, (64, positions, pack, 1)), params),
    )
    return out[0] if parts == 1 else out.sum(0)


class _Params(ctypes.Structure):
    """`Params` of the kernel."""

    _fields_ = (
        *((x, ctypes.c_void_p) for x in ("k", "lse", "low", "high", "ptr", "items", "out")),
        *((x, ctypes.c_longlong) for x in ("k_batch", "k_head", "k_row")),
        *((x, ctypes.c_int) for x in ("n", "m", "kv_heads", "group", "pairs", "tiles", "period")),
        ("log_positions", ctypes.c_int),
        ("scale_log2", ctypes.c_float),
    )


@lru_cache
def _kernels(given: tuple[str, ...]) -> nvrtc.Kernels:
    return nvrtc.Kernels(SOURCE, given)


_lengths: WeakKeyDictionary[Lists, dict[int, int]] = WeakKeyDictionary()


def _longest(lists: Lists, positions: int) -> int:
    """Tiles of queries in the longest range that sees a block of keys; read back once."""
    known = _lengths.setdefault(lists, {})
    if positions not in known:
        items = lists.columns(_KEYS, positions).items
        known[positions] = int((items[:, 1] - items[:, 0]).max()) if len(items) else 1
    return known[positions]
