"""Windowed and sparse attention forward for NVIDIA Hopper: how `hopper_gluon` is called.

Triton is imported where it is needed: this module can be imported without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnspan.kernels.capability import lacks_hopper
from attnspan.kernels.gpu_lists import Lists, Walk

_BLOCK = 128  # keys
_LOG2_E = 1.4426950408889634


def lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What this kernel lacks for these inputs, as the end of a sentence; None: nothing."""
    if lack := lacks_hopper(q.device):
        return lack
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "it has bfloat16 and float16 alone"
    if q.shape[3] not in (64, 128) or v.shape[3] != q.shape[3]:
        return "it has a head_dim of 64 or 128 alone, the same for k and v"
    if q.shape[1] // k.shape[1] not in (1, 2, 4, 8):
        return "it has 1, 2, 4 or 8 query heads per KV head alone"
    if q.shape[2] >= 2**24 or k.shape[2] >= 2**24:
        return "it has sequences of up to 2**24 tokens"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
    """Attention under the mask of `lists`, and its log-sum-exp.

    No host synchronisation, nothing kept between calls but compiled code; deterministic. In a CUDA
    graph once the same shapes have run outside of one.

    Args:
        q: `(batch, Hq, n, head_dim)`, bfloat16 or float16. Strides are free where the last one is 1
            and the others are multiples of 16 bytes; other tensors are copied. So are k and v.
        k: `(batch, Hkv, m, head_dim)`; Hq is 1, 2, 4 or 8 times Hkv.
        v: as k.
        lists: of n queries and m keys, on the device of q.
        scale: factor of the scores.

    Returns:
        `out`, as q, and `lse (batch, Hq, n)`, float32, natural logarithm. A query that sees no key
        gives zeros and minus infinity.
    """
    batch, q_heads, n, head_dim = q.shape
    heads, m = k.shape[1], k.shape[2]
    assert (lists.n, lists.m) == (n, m), "lists of other lengths"
    lse = torch.empty(batch, q_heads, n, dtype=torch.float32, device=q.device)
    if not batch * heads * n * m:
        return torch.zeros_like(q), lse.fill_(-torch.inf)
    if scale == 0:
        # Masked scores are -inf, which no factor of 0 may meet.
        q, scale = torch.zeros_like(q), 1.0
    elif scale < 0:
        q, scale = -q, -scale
    out = torch.empty_like(q)
    if not _fits_tma(out):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    q, k, v = (
        x if _fits_tma(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    groups = q_heads // heads
    chunk = _chunk(groups)
    walk = lists.walk(128 // groups, _BLOCK, chunk)
    count = len(walk.tiles)
    tiles = count * heads * batch
    flags = torch.empty(tiles, dtype=torch.int64, device=q.device)

    by_row = [1, 64 // groups, groups, head_dim]
    arguments = (
        _descriptor(q.transpose(1, 2), by_row),
        *(_descriptor(x, [1, 1, size, head_dim]) for size in (_BLOCK, chunk) for x in (k, v)),
        _descriptor(out.transpose(1, 2), by_row),
        walk.table,
        lists.bounds,
        lse,
    )
    numbers = n, count, _side(walk, heads * batch), tiles, scale * _LOG2_E
    grid = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    kind = q.dtype, head_dim, groups, heads, len(lists.low)
    with torch.cuda.device(q.device):
        for guess, marks in ((True, flags.view(torch.int8)), (False, flags)):
            kernel, constants = _compiled(q.device.index, *kind, guess)
            kernel[(grid, 1, 1)](*arguments, marks, *numbers, *constants)
    return out, lse


def _fits_tma(x: Tensor) -> bool:
    size = x.element_size()
    aligned = all(
        stride * size % 16 == 0 and stride > 0
        for stride, length in zip(x.stride()[:-1], x.shape[:-1], strict=True)
        if length > 1
    )
    return aligned and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def _descriptor(x: Tensor, block: list[int]) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = _layout(x.dtype, tuple(block))
    # The stride of an axis of length 1 is free in torch, but not for TMA.
    strides = [s if length > 1 else 16 for s, length in zip(x.stride(), x.shape, strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], block, layout)


@cache
def _layout(dtype: torch.dtype, block: tuple[int, ...]) -> Any:
    from triton.experimental.gluon import language as gl

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for(list(block), element)


@cache
def _compiled(device: int, *kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """The kernel for the current device, and its constants, which follow its other arguments."""
    import triton

    kernel = compiled_for(triton.runtime.driver.active.get_current_target(), *kind)
    return kernel, tuple(signature(*kind)[1].values())


def compiled_for(target: Any, *kind: Any) -> Any:
    """The kernel of a `signature`, compiled for a target; this needs no GPU."""
    import triton
    from triton.experimental.gluon._runtime import GluonASTSource

    from attnspan.kernels import hopper_gluon

    types, constants, options = signature(*kind)
    with _sound_assembler():
        source = GluonASTSource(hopper_gluon.forward, types, constants, {})
        return triton.compile(source, target=target, options=options)


@contextmanager
def _sound_assembler() -> Iterator[None]:
    """Inside, Triton assembles with a ptxas of 12.9 or later.

    That of CUDA 12.8, which Triton 3.6 has for Hopper, miscompiles this kernel: it sets a uniform
    register on the way into the first loop alone, so that tiles which skip the loop go wrong.
    Triton brings a later one for Blackwell, that knows Hopper as well.
    """
    from triton import knobs

    tool = knobs.nvidia.ptxas
    if tuple(map(int, tool.version.split("."))) >= (12, 9):
        yield
        return
    with knobs.nvidia.scope():
        knobs.nvidia.ptxas = knobs.nvidia.ptxas_blackwell.path
        yield


def signature(
    dtype: torch.dtype, head_dim: int, groups: int, heads: int, ranges: int, guess: bool
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[str, Any]]:
    """What the kernel is compiled for: types and constants of its arguments, and options."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    chunk = _chunk(groups)
    rows = [1, 64 // groups, groups, head_dim]

    def descriptor(shape: list[int]) -> str:
        return f"tensordesc<{name}{shape},{_layout(dtype, tuple(shape))!r}>"

    types = {
        "q_desc": descriptor(rows),
        "k_desc": descriptor([1, 1, _BLOCK, head_dim]),
        "v_desc": descriptor([1, 1, _BLOCK, head_dim]),
        "k_chunk_desc": descriptor([1, 1, chunk, head_dim]),
        "v_chunk_desc": descriptor([1, 1, chunk, head_dim]),
        "out_desc": descriptor(rows),
        "table": "*i32",
        "ranges": "*i32",
        "lse": "*fp32",
        "flags": "*i8" if guess else "*i64",
        "n": "i32",
        "count": "i32",
        "side": "i32",
        "tiles": "i32",
        "c": "fp32",
    }
    constants = {
        "K": ranges,
        "HEADS": heads,
        "G": groups,
        "D": head_dim,
        "CHUNK": chunk,
        "GUESS": guess,
        "REDO": not guess,
        # Up to here the weights, and the sums over them, are exact enough in their dtypes.
        "LIMIT": 1e18 if dtype == torch.bfloat16 else 60000.0,
    }
    types |= dict.fromkeys(constants, "constexpr")
    names = list(types)
    places = {(names.index(key),): value for key, value in constants.items()}
    return types, places, {"num_warps": 4, "maxnreg": 168}


def _side(walk: Walk, heads: int) -> int:
    """How many of the batch's KV heads run side by side.

    Few, so that their keys stay in the L2; but tiles of other lengths are spread evenly only if
    they go from the longest to the shortest once, of all heads.
    """
    return 2 if heads % 2 == 0 and walk.longest * 4 >= len(walk.tiles) * 3 else heads


def _chunk(groups: int) -> int:
    return 128 // groups if groups > 1 else 16
