"""Windowed and sparse attention forward for NVIDIA Hopper: how `hopper_gluon` is called.

Triton is imported where it is needed: this module can be imported without it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from attnspan.kernels import driver
from attnspan.kernels.capability import lacks_hopper, processors_of
from attnspan.kernels.gpu_lists import Lists, Walk

_BLOCK = 128  # keys
_LOG2_E = 1.4426950408889634
_PROMOTE_128B = 2


def lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What this kernel lacks for these inputs, as the end of a sentence; None: nothing."""
    if lack := lacks_hopper(q.device):
        return lack
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "it has bfloat16 and float16 alone"
    (_, q_heads, n, head_dim), (_, heads, m, _) = q.shape, k.shape
    if head_dim not in (64, 128) or v.shape[3] != head_dim:
        return "it has a head_dim of 64 or 128 alone, the same for k and v"
    if q_heads // heads not in (1, 2, 4, 8):
        return "it has 1, 2, 4 or 8 query heads per KV head alone"
    if n >= 2**24 or m >= 2**24:
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
    _, heads, m, _ = k.shape
    assert (lists.n, lists.m) == (n, m), "lists of other lengths"
    lse = torch.empty((batch, q_heads, n), dtype=torch.float32, device=q.device)
    if not batch * heads * n * m:
        return torch.zeros_like(q), lse.fill_(-torch.inf)
    if scale == 0:
        # Masked scores are -inf, which no factor of 0 may meet.
        q, scale = torch.zeros_like(q), 1.0
    elif scale < 0:
        q, scale = -q, -scale
    out = torch.empty_like(q)
    if not driver.mappable(out):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    q, k, v = [
        x if driver.mappable(x) else x.clone(memory_format=torch.contiguous_format)
        for x in (q, k, v)
    ]
    groups = q_heads // heads
    walk = lists.walk(128 // groups, _BLOCK, _chunk(groups))
    count = walk.tiles.shape[0]
    tiles = count * heads * batch
    flags = torch.empty(tiles, dtype=torch.int64, device=q.device)

    strides = q.stride(), k.stride(), v.stride(), out.stride()
    descriptors = _descriptors(q.dtype, q.shape, k.shape, *strides)
    try:
        arguments = _idle.pop()
    except IndexError:
        arguments = driver.Arguments(_Arguments)
    ctypes.memmove(arguments.place, descriptors, len(descriptors))
    for offset, x in zip(_MAPS, (q, k, v, k, v, out), strict=True):
        driver.readdress(arguments.place + offset, x)
    values = arguments.values
    values.table, values.ranges = walk.table.data_ptr(), lists.bounds.data_ptr()
    values.lse, values.flags = lse.data_ptr(), flags.data_ptr()
    values.n, values.count, values.tiles = n, count, tiles
    values.side = _side(walk, heads * batch)
    values.c = scale * _LOG2_E
    grid = min(tiles, processors_of(q.device)), 1, 1
    kind = q.dtype, head_dim, groups, heads, lists.low.shape[0]
    # The second finds the marks of the first in the same bytes, eight to a tile.
    for guess in (True, False):
        _loaded(q.device, *kind, guess).launch(grid, arguments.pointers)
    _idle.append(arguments)
    return out, lse


_DESCRIPTORS = "q", "k", "v", "k_chunk", "v_chunk", "out"


class _Arguments(ctypes.Structure):
    """What the kernel takes, in its order; `signature` has their meanings.

    Of a tensor descriptor Triton 3.6 passes the map, the shape and the strides; `_` is padding, so
    that all maps lie at multiples of 64 bytes.
    """

    _fields_ = (
        *(
            field
            for name in _DESCRIPTORS
            for field in (
                (f"{name}_map", driver.TensorMap),
                *((f"{name}_size_{i}", ctypes.c_int32) for i in range(4)),
                *((f"{name}_stride_{i}", ctypes.c_int64) for i in range(4)),
                (f"_{name}", ctypes.c_int64 * 2),
            )
        ),
        *((name, ctypes.c_uint64) for name in ("table", "ranges", "lse", "flags")),
        *((name, ctypes.c_int32) for name in ("n", "count", "side", "tiles")),
        ("c", ctypes.c_float),
        *((name, ctypes.c_uint64) for name in ("scratch", "profile")),
    )


_MAPS = [getattr(_Arguments, f"{name}_map").offset for name in _DESCRIPTORS]
# Room that no call is using; as much as there were calls at a time.
_idle: list[driver.Arguments] = []


@lru_cache(maxsize=256)
def _descriptors(
    dtype: torch.dtype, q: tuple[int, ...], k: tuple[int, ...], *strides: tuple[int, ...]
) -> bytes:
    """`_Arguments` with the descriptors of such tensors, but for their addresses, and no others."""
    groups = q[1] // k[1]
    by_row, key, chunk = (1, 64 // groups, groups), (1, 1, _BLOCK), (1, 1, _chunk(groups))
    of_q, of_k, of_v, of_out = strides
    made = _Arguments()
    for name, shape, stride, box in (
        ("q", q, of_q, by_row),
        ("k", k, of_k, key),
        ("v", k, of_v, key),
        ("k_chunk", k, of_k, chunk),
        ("v_chunk", k, of_v, chunk),
        ("out", q, of_out, by_row),
    ):
        if box is by_row:
            shape, stride = ((x[0], x[2], x[1], x[3]) for x in (shape, stride))
        encoded = driver.encoded(dtype, shape, stride, (64, *box[::-1]), _PROMOTE_128B)
        setattr(made, f"{name}_map", driver.TensorMap.from_buffer_copy(encoded))
        for i in range(4):
            setattr(made, f"{name}_size_{i}", shape[i])
            setattr(made, f"{name}_stride_{i}", stride[i])
    return bytes(made)


@cache
def _layout(dtype: torch.dtype, block: tuple[int, ...]) -> Any:
    from triton.experimental.gluon import language as gl

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for(list(block), element)


@cache
def _loaded(device: torch.device, *kind: Any) -> driver.Kernel:
    """The kernel of a `signature`, on a device."""
    from triton.backends.compiler import GPUTarget

    made = compiled_for(GPUTarget("cuda", 90, 32), *kind)
    about = made.metadata
    assert not about.global_scratch_size, "it has no scratch memory"
    assert not about.profile_scratch_size, "it is not instrumented"
    library = driver.Library(made.asm["cubin"])
    return library.kernel(about.name, 32 * about.num_warps, about.shared, device)


def compiled_for(target: Any, *kind: Any) -> Any:
    """The kernel of a `signature`, compiled for a target; this needs no GPU."""
    import triton
    from triton.experimental.gluon._runtime import GluonASTSource

    from attnspan.kernels import hopper_gluon

    types, constants, options = signature(*kind)
    with _sound_assembler():
        source = GluonASTSource(hopper_gluon.forward, types, constants, {})
        return triton.compile(source, target=target, options=options)


_assembling = Lock()


@contextmanager
def _sound_assembler() -> Iterator[None]:
    """Inside, Triton assembles with a ptxas of 12.9 or later.

    That of CUDA 12.8, which Triton 3.6 has for Hopper, miscompiles this kernel: it sets a uniform
    register on the way into the first loop alone, so that tiles which skip the loop go wrong.
    Triton brings a later one for Blackwell, that knows Hopper as well. Which one it takes is a
    setting of the process, so threads take turns.
    """
    from triton import knobs

    with _assembling:
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
    return 2 if heads % 2 == 0 and walk.longest * 4 >= walk.tiles.shape[0] * 3 else heads


def _chunk(groups: int) -> int:
    return 128 // groups if groups > 1 else 16
