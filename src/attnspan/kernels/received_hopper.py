"""The attention that keys receive, on Hopper, in Gluon; the device side of `gpu_received`.

A program has one tile of 128 keys of one KV head: a warp that fetches, and two warpgroups that take
tiles of 64 query rows in turn. The rows of a tile are some positions of several query heads of the
group, so that the edges of a mask fall on few tiles. A warpgroup keeps two products in flight, so
that the second runs while the exponentials of the first are taken. With one product for each
exponential both units are equally busy at head_dim 128 (512 cycles a tile each), and the special
function unit is the limit at 64: a part of the exponentials is computed on the plain units instead.

What a thread sums up are its own 32 keys, in registers, from the first tile to the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

if TYPE_CHECKING:
    from attnspan.kernels.gpu_lists import Lists

ROWS = gl.constexpr(64)
KEYS = gl.constexpr(128)
LOG2E = gl.constexpr(1.4426950408889634)
# Of 8 exponentials, those computed on the plain units, by head_dim.
_SOFT = {64: 2, 128: 1}
_STAGES = {64: 16, 128: 8}
# 2 ** f for |f| <= 1/2 with a relative error below 1e-7, from the fifth power down, in hexadecimal;
# the last is exactly 1, so that what lies below the range becomes exactly 0.
_POWERS = ("0f3AADDD0A", "0f3C1E7544", "0f3D635BA9", "0f3E75FCDE", "0f3F317215", "0f3F800000")


def _exp2_asm(soft: int) -> str:
    """2 ** x for 8 numbers, `soft` of them without the special function unit.

    Those add 1.5 * 2 ** 23, whose last bits then hold x rounded to an integer; a polynomial gives
    two to the rest, and the integer goes into its exponent. From -127 down the result is 0.
    """
    lines = ["{", ".reg .f32 t, r, f, p;", ".reg .b32 a, b;"]
    for i in range(8):
        x = f"${8 + i}"
        if i >= soft:
            lines.append(f"ex2.approx.ftz.f32 ${i}, {x};")
            continue
        lines += [
            f"max.f32 t, {x}, 0fC2FE0000;",
            "add.rn.f32 r, t, 0f4B400000;",
            "sub.rn.f32 f, r, 0f4B400000;",
            "sub.rn.f32 f, t, f;",
            f"fma.rn.f32 p, f, {_POWERS[0]}, {_POWERS[1]};",
            *(f"fma.rn.f32 p, p, f, {c};" for c in _POWERS[2:]),
            "mov.b32 a, r;",
            "shl.b32 a, a, 23;",
            "mov.b32 b, p;",
            "add.s32 b, a, b;",
            f"mov.b32 ${i}, b;",
        ]
    return "\n".join([*lines, "}"])


_EXP2_64 = gl.constexpr(_exp2_asm(_SOFT[64]))
_EXP2_128 = gl.constexpr(_exp2_asm(_SOFT[128]))
_EXP2_OPERANDS = gl.constexpr(",".join(["=f"] * 8 + ["f"] * 8))


@gluon.jit
def _exp2(x, D: gl.constexpr):
    if D == 64:
        return gl.inline_asm_elementwise(
            _EXP2_64, _EXP2_OPERANDS, [x], dtype=gl.float32, is_pure=True, pack=8
        )
    else:
        return gl.inline_asm_elementwise(
            _EXP2_128, _EXP2_OPERANDS, [x], dtype=gl.float32, is_pure=True, pack=8
        )


@gluon.jit
def _place(pairs, heads):
    """(tile of keys, batch, KV head). Early keys, seen by most in a causal pattern, come first."""
    pair = gl.program_id(0) % pairs
    return gl.program_id(0) // pairs, pair // heads, pair % heads


@gluon.jit
def _span(items, r):
    at = items + 4 * r
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)


@gluon.jit
def _rounds(first, last):
    """How often each warpgroup takes two tiles of a range; those past its end weigh nothing."""
    return (last - first + 3) // 4


@gluon.jit
def _fetch(
    q_desc, k_desc, q_tiles, k_tile, full, empty, k_full, ptr, items, heads, pairs, groups,
    PACK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    tile, b, h = _place(pairs, heads)
    mbarrier.expect(k_full, k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [b, h, tile * KEYS, 0], k_full, k_tile)
    i = 0
    for head in range(h * groups, (h + 1) * groups, PACK):
        for r in range(gl.load(ptr + tile), gl.load(ptr + tile + 1)):
            first, last, _, _ = _span(items, r)
            for t in range(first, first + 4 * _rounds(first, last)):
                s = i % STAGES
                mbarrier.wait(empty.index(s), ((i // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(s), q_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    q_desc, [b, head, t * (ROWS // PACK), 0], full.index(s), q_tiles.index(s)
                )
                i += 1


@gluon.jit
def _sums(p):
    """A thread's two rows of each key together: nothing passes between threads."""
    return gl.sum(gl.reshape(p, [4, 2, 8, KEYS]), 1)


@gluon.jit
def _product(
    q_tiles, k, full, i,
    D: gl.constexpr, STAGES: gl.constexpr, L: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    s = i % STAGES
    q = q_tiles.index(s)._reinterpret(q_tiles.dtype, [ROWS, D], SHARED)
    mbarrier.wait(full.index(s), (i // STAGES) & 1)
    return warpgroup_mma(q, k, gl.zeros([ROWS, KEYS], gl.float32, L), use_acc=False, is_async=True)


@gluon.jit
def _levels(lse, low, high, t, last, full, end, n, row, PACK: gl.constexpr):
    """A tile's lse, and of masked tiles the bounds of what its rows see; as they lie in memory.

    They are read a step ahead: nothing may touch them before, or it waits for them.
    """
    position = t * (ROWS // PACK) + row % (ROWS // PACK)
    x = gl.load(
        lse + row // (ROWS // PACK) * n + position,
        mask=(position < n) & (t < last),
        other=float("inf"),
    )
    masked = (position < n) & ((t < full) | (t >= end))
    return (
        x,
        gl.load(low + position, mask=masked, other=0),
        gl.load(high + position, mask=masked, other=0),
    )


@gluon.jit
def _add(
    acc, scores, level, bottom, top, t, full, end, low, high, n, row, column, factor,
    D: gl.constexpr, PACK: gl.constexpr, RANGES: gl.constexpr,
):  # fmt: skip
    # Queries that see nothing, and those that aren't, weigh nothing.
    level = gl.where(level == -float("inf"), float("inf"), level * LOG2E)
    if (t < full) | (t >= end):
        here = (bottom[:, None] <= column[None, :]) & (column[None, :] < top[:, None])
        position = t * (ROWS // PACK) + row % (ROWS // PACK)
        for r in gl.static_range(1, RANGES):
            a = gl.load(low + r * n + position, mask=position < n, other=0)
            z = gl.load(high + r * n + position, mask=position < n, other=0)
            here = here | ((a[:, None] <= column[None, :]) & (column[None, :] < z[:, None]))
        scores = gl.where(here, scores, -float("inf"))
    return acc + _sums(_exp2(scores * factor - level[:, None], D))


@gluon.jit
def _weigh(
    q_tiles, k_tile, full_bar, empty_bar, k_bar, turns, sums, total_bar,
    lse, out, low, high, ptr, items, n, m, heads, pairs, groups, factor,
    ME: gl.constexpr, D: gl.constexpr, PACK: gl.constexpr, STAGES: gl.constexpr,
    RANGES: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    tile, b, h = _place(pairs, heads)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, L))
    column = tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, L))
    k = k_tile._reinterpret(k_tile.dtype, [KEYS, D], SHARED).permute((1, 0))
    acc = _sums(gl.zeros([ROWS, KEYS], gl.float32, L))
    mbarrier.wait(k_bar, 0)
    i = ME
    turn = 0
    for head in range(h * groups, (h + 1) * groups, PACK):
        at = lse + (b * heads * groups + head).to(gl.int64) * n
        for r in range(gl.load(ptr + tile), gl.load(ptr + tile + 1)):
            first, last, full, end = _span(items, r)
            rounds = _rounds(first, last)
            t = first + ME
            x, bottom, top = _levels(at, low, high, t, last, full, end, n, row, PACK)
            for u in range(rounds):
                # The warpgroups take turns at the tensor cores: else they run in step, both at
                # their products, then both at their exponentials.
                mbarrier.wait(turns.index(ME), (turn & 1) ^ (1 - ME))
                one = _product(q_tiles, k, full_bar, i, D, STAGES, L, SHARED)
                x2, bottom2, top2 = _levels(
                    at, low, high, t + 2, last, full, end, n, row, PACK
                )  # fmt: skip
                two = _product(q_tiles, k, full_bar, i + 2, D, STAGES, L, SHARED)
                mbarrier.arrive(turns.index(1 - ME), count=1)
                turn += 1
                scores = warpgroup_mma_wait(1, deps=[one])
                mbarrier.arrive(empty_bar.index(i % STAGES), count=1)
                acc = _add(
                    acc, scores, x, bottom, top, t, full, end, low, high, n, row, column, factor,
                    D, PACK, RANGES,
                )  # fmt: skip
                x, bottom, top = _levels(at, low, high, t + 4, last, full, end, n, row, PACK)
                # This wait is a basic block's edge, too: without one ptxas hoists the wait for the
                # second product over the exponentials.
                mbarrier.wait(
                    full_bar.index((i + 4) % STAGES), ((i + 4) // STAGES) & 1, pred=u + 1 < rounds
                )
                scores = warpgroup_mma_wait(0, deps=[two])
                mbarrier.arrive(empty_bar.index((i + 2) % STAGES), count=1)
                acc = _add(
                    acc, scores, x2, bottom2, top2, t + 2, full, end, low, high, n, row, column,
                    factor, D, PACK, RANGES,
                )  # fmt: skip
                i += 4
                t += 4
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    total = gl.convert_layout(gl.sum(gl.sum(acc, 1), 0), FLAT)
    if ME == 1:
        sums.store(total)
        mbarrier.arrive(total_bar, count=1)
    else:
        mbarrier.wait(total_bar, 0)
        j = tile * KEYS + gl.arange(0, KEYS, FLAT)
        place = out + (b * heads + h).to(gl.int64) * m + j
        gl.store(place, total + sums.load(FLAT), mask=j < m)


@gluon.jit(do_not_specialize=["n", "m", "heads", "pairs", "groups"])
def received(
    q_desc, k_desc, lse, out, low, high, ptr, items, n, m, heads, pairs, groups, factor,
    D: gl.constexpr, PACK: gl.constexpr, STAGES: gl.constexpr, RANGES: gl.constexpr,
):  # fmt: skip
    """One program a tile of keys and KV head; `factor` is the scale times log2(e)."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(
        q_desc.dtype, [STAGES, 1, PACK, ROWS // PACK, D], q_desc.layout
    )
    k_tile = gl.allocate_shared_memory(k_desc.dtype, [1, 1, KEYS, D], k_desc.layout)
    sums = gl.allocate_shared_memory(gl.float32, [KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    total = gl.allocate_shared_memory(gl.int64, [1], BAR)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    for s in gl.static_range(2):
        mbarrier.init(turns.index(s), count=1)
    mbarrier.init(k_full, count=1)
    mbarrier.init(total, count=1)
    fence_async_shared()
    # Each warpgroup gets 240 registers, the first one what the others leave of 3 * 168.
    gl.warp_specialize(
        [
            (_weigh, (q_tiles, k_tile, full, empty, k_full, turns, sums, total, lse, out, low,
                      high, ptr, items, n, m, heads, pairs, groups, factor, 0, D, PACK, STAGES,
                      RANGES)),
            (_weigh, (q_tiles, k_tile, full, empty, k_full, turns, sums, total, lse, out, low,
                      high, ptr, items, n, m, heads, pairs, groups, factor, 1, D, PACK, STAGES,
                      RANGES)),
            (_fetch, (q_desc, k_desc, q_tiles, k_tile, full, empty, k_full, ptr, items, heads,
                      pairs, groups, PACK, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch(q: Tensor, k: Tensor, lse: Tensor, out: Tensor, lists: Lists, factor: float) -> None:
    """As `gpu_received.received`, into `out (batch, Hkv, m)`; `factor` is the scale times log2(e).

    Of q and k, bfloat16 or float16 with a head_dim of 64 or 128, the last dimension is dense and
    the strides and addresses are whole 16 bytes.
    """
    batch, kv_heads, m = out.shape
    head_dim, groups = q.shape[3], q.shape[1] // kv_heads
    # As many of a group's heads in a tile as a power of two allows.
    pack = min(8, groups & -groups)
    ptr, items = lists.columns(KEYS.value, ROWS.value // pack)
    with _assembler():
        received[(-(-m // KEYS.value) * batch * kv_heads,)](
            _descriptor(q, [1, pack, ROWS.value // pack, head_dim]),
            _descriptor(k, [1, 1, KEYS.value, head_dim]),
            lse, out, lists.low, lists.high, ptr, items, q.shape[2], m,
            kv_heads, batch * kv_heads, groups, factor,
            D=head_dim, PACK=pack, STAGES=_STAGES[head_dim], RANGES=lists.low.shape[0],
            num_warps=4, maxnreg=168,
        )  # fmt: skip


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    # The stride of a single batch or head may be anything: whole 16 bytes here.
    strides = [x.stride(d) if x.shape[d] > 1 else 8 * x.shape[3] for d in range(3)]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


@contextmanager
def _assembler() -> Iterator[None]:
    """Inside, Triton assembles with a ptxas of 12.9 or later, as for `kernels.hopper`."""
    with triton.knobs.nvidia.scope():
        triton.knobs.nvidia.ptxas = triton.knobs.nvidia.ptxas_blackwell.path
        yield
