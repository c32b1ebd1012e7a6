"""Windowed and sparse attention forward for NVIDIA Hopper (sm_90a), with its log-sum-exp, in Gluon.

How it works. A persistent grid, one program a multiprocessor: a producer warp that loads by TMA and
two consumer warpgroups of 64 rows each. The G query heads of a KV head are packed into the rows, so
a tile is 128/G positions by G heads and needs few keys beyond its window. `Lists.walk` says which
keys: a chunk of 128/G (the diagonal), a first block of 128, full blocks, and blocks to be masked by
the rows' ranges. Blocks form one sequence over all tiles of a program: when the softmax of a block
starts, its scores are there, and QK of the block after it, which may be the next tile's first, is
issued once the scores have left their registers. PV of the block before runs over the softmax.

The softmax's reference is a guess at first: the maximum of the chunk and the first block. A row
whose later scores rise so far above it that the weights might overflow marks its warp's flag, and a
second launch computes the tiles with a mark again, with a running maximum. Every launch writes all
its flags, so nothing outlives a call, and nothing waits for the host. Which way a tile is computed
follows from the inputs alone, and each way is deterministic.

Bytes and operations: `4 * D * Hq` operations for each pair that a query sees, or whose block is
touched; K and V are read once for each tile, through the L2.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attnspan.kernels.gpu_lists import WALK_COLUMNS

_COLUMNS = gl.constexpr(WALK_COLUMNS)
_LN_2 = gl.constexpr(0.6931471805599453)
# Below any score: a finite stand-in for the maximum of no scores, so that no infinities cancel.
_NO_SCORE = gl.constexpr(-1.0e20)


def _rescale_asm(count: int) -> str:
    """Multiplies a thread's accumulators by their row's factor, unless all factors of the warp
    are 1. A thread holds two rows, in turn two columns of the one and two of the other."""
    lines = [
        "{",
        ".reg .pred p, q;",
        f"setp.eq.f32 p, ${2 * count}, 0f3F800000;",
        f"setp.eq.and.f32 p, ${2 * count + 2}, 0f3F800000, p;",
        "vote.sync.all.pred q, p, 0xffffffff;",
        "@q bra SKIP;",
        *(f"mul.f32 ${i}, ${i}, ${2 * count + (i & 2)};" for i in range(count)),
        "SKIP:",
        "}",
    ]
    return "\n".join(lines)


def _rescale_constraints(count: int) -> str:
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


_RESCALE_64 = gl.constexpr(_rescale_asm(32))
_RESCALE_64_CONSTRAINTS = gl.constexpr(_rescale_constraints(32))
_RESCALE_128 = gl.constexpr(_rescale_asm(64))
_RESCALE_128_CONSTRAINTS = gl.constexpr(_rescale_constraints(64))
# Whether any row of the warp is marked, for both rows of a thread.
_ANY = gl.constexpr(
    "{ .reg .pred p; .reg .b32 x; or.b32 x, $2, $3; setp.ne.s32 p, x, 0; "
    "vote.sync.any.pred p, p, 0xffffffff; selp.s32 $0, 1, 0, p; selp.s32 $1, 1, 0, p; }"
)


def _select_asm(count: int) -> str:
    """Keeps those of a thread's scores whose bit is set in their row's word, the rest become minus
    infinity. One test a score with a bit known here: ptxas makes predicates of seven at a time."""
    lines = ["{", ".reg .pred p;", ".reg .b32 x;"]
    for i in range(count):
        lines += [
            f"and.b32 x, ${2 * count + (i & 2)}, {1 << (2 * (i >> 2) + (i & 1))};",
            "setp.ne.u32 p, x, 0;",
            f"selp.f32 ${i}, ${i}, 0fFF800000, p;",
        ]
    return "\n".join([*lines, "}"])


def _select_constraints(count: int) -> str:
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * count)


_SELECT_8 = gl.constexpr(_select_asm(8))
_SELECT_16 = gl.constexpr(_select_asm(16))
_SELECT_32 = gl.constexpr(_select_asm(32))
_SELECT_64 = gl.constexpr(_select_asm(64))
_SELECT_8_CONSTRAINTS = gl.constexpr(_select_constraints(8))
_SELECT_16_CONSTRAINTS = gl.constexpr(_select_constraints(16))
_SELECT_32_CONSTRAINTS = gl.constexpr(_select_constraints(32))
_SELECT_64_CONSTRAINTS = gl.constexpr(_select_constraints(64))


@gluon.jit
def _selected(scores, words):
    if scores.shape[1] == 128:
        return gl.inline_asm_elementwise(
            _SELECT_64, _SELECT_64_CONSTRAINTS, [scores, words],
            dtype=gl.float32, is_pure=True, pack=64,
        )  # fmt: skip
    elif scores.shape[1] == 64:
        return gl.inline_asm_elementwise(
            _SELECT_32, _SELECT_32_CONSTRAINTS, [scores, words],
            dtype=gl.float32, is_pure=True, pack=32,
        )  # fmt: skip
    elif scores.shape[1] == 32:
        return gl.inline_asm_elementwise(
            _SELECT_16, _SELECT_16_CONSTRAINTS, [scores, words],
            dtype=gl.float32, is_pure=True, pack=16,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            _SELECT_8, _SELECT_8_CONSTRAINTS, [scores, words],
            dtype=gl.float32, is_pure=True, pack=8,
        )  # fmt: skip


@gluon.jit
def _rescaled(acc, factor, D: gl.constexpr):
    if D == 64:
        return gl.inline_asm_elementwise(
            _RESCALE_64,
            _RESCALE_64_CONSTRAINTS,
            [acc, factor[:, None]],
            dtype=gl.float32,
            is_pure=True,
            pack=32,
        )
    else:
        return gl.inline_asm_elementwise(
            _RESCALE_128,
            _RESCALE_128_CONSTRAINTS,
            [acc, factor[:, None]],
            dtype=gl.float32,
            is_pure=True,
            pack=64,
        )


@gluon.jit
def _turn(turn, flags, tiles, REDO: gl.constexpr):
    """This program's tile in a turn, and the turn itself; in a redo those of the next mark."""
    tile = _tile(turn)
    if REDO:
        marks = gl.load(flags + tile, mask=tile < tiles, other=1)
        while marks == 0:
            turn += 1
            tile = _tile(turn)
            marks = gl.load(flags + tile, mask=tile < tiles, other=1)
    return tile, turn


@gluon.jit
def _tile(turn):
    """This program's tile in a turn.

    Every other turn goes backwards, so that tiles in order of their length spread evenly.
    """
    programs = gl.num_programs(0)
    me = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 1, programs - 1 - me, me)


@gluon.jit
def _place(tile, count, side):
    """Which of the walk's tiles, and of the batch's KV heads, a tile is: `side` heads run side by
    side, tile by tile, then the next ones."""
    turn = tile // side
    group = turn // count
    return turn - group * count, group * side + (tile - turn * side)


@gluon.jit
def _plan(table, ranges, n, entry, live, count, q_start, C: gl.constexpr, K: gl.constexpr,
          G: gl.constexpr, ROWS: gl.constexpr):  # fmt: skip
    """What consumer C needs of a tile's entry, and the ranges of keys that its rows see.

    No load waits for another one: `q_start` was loaded before.
    """
    q_start += C * (64 // G)
    chunk_start = gl.load(entry + 1, mask=live, other=0)
    first = gl.load(entry + 2, mask=live, other=0)
    first_masked = gl.load(entry + 3, mask=live, other=0)
    full_count = gl.load(entry + 5, mask=live, other=0) + gl.load(entry + 7, mask=live, other=0)
    masked_first = gl.load(entry + 8, mask=live, other=0) + count * _COLUMNS
    masked_count = gl.load(entry + 9, mask=live, other=0)
    at = q_start + gl.arange(0, 64, ROWS) // G
    bounds = ()
    for k in gl.static_range(K):
        bounds += (gl.load(ranges + k * n + at, mask=at < n, other=0),)
        bounds += (gl.load(ranges + (K + k) * n + at, mask=at < n, other=0),)
    return (
        q_start, chunk_start, first, first_masked, full_count, masked_first, masked_count, bounds,
    )  # fmt: skip


@gluon.jit
def _bits_from(column, offset):
    """Bits of those of a thread's columns that are `column` or later; of 8 it has `offset` and
    the next."""
    after = gl.maximum(column - offset, 0)
    count = 2 * (after >> 3) + gl.minimum(after & 7, 2)
    # As PTX has it a shift by 32 or more leaves nothing; to LLVM it is undefined.
    return gl.inline_asm_elementwise(
        "shl.b32 $0, -1, $1;", "=r,r", [count], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _masked(scores, start, bounds, K: gl.constexpr, L: gl.constexpr):
    """Scores of the keys from `start` on, minus infinity where the row doesn't see the key.

    What a thread sees of a row's columns is a word of bits: then a range costs a dozen
    instructions a row, and a score little more than one.
    """
    EIGHTHS: gl.constexpr = scores.shape[1] // 8
    PARTS: gl.constexpr = gl.reshape(scores, [64, EIGHTHS, 4, 2]).type.layout
    WORDS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, PARTS))
    offset = 2 * gl.arange(0, 4, gl.SliceLayout(0, WORDS))[None, :]
    words = gl.zeros([64, 4], gl.int32, WORDS)
    for k in gl.static_range(K):
        first = gl.convert_layout(bounds[2 * k], gl.SliceLayout(1, WORDS))[:, None] - start
        stop = gl.convert_layout(bounds[2 * k + 1], gl.SliceLayout(1, WORDS))[:, None] - start
        words = words | (_bits_from(first, offset) & ~_bits_from(stop, offset))
    words = gl.expand_dims(gl.expand_dims(words, 1), 3)
    words, _ = gl.broadcast(words, gl.zeros([64, EIGHTHS, 4, 2], gl.int32, PARTS))
    words = gl.convert_layout(gl.reshape(words, [64, 8 * EIGHTHS]), L, assert_trivial=True)
    return _selected(scores, words)


@gluon.jit
def _thread_sums(p, COLUMNS: gl.constexpr):
    """Row sums over the columns that a thread holds: `(64, 4)`, without shuffles."""
    return gl.sum(gl.sum(gl.reshape(p, [64, COLUMNS // 8, 4, 2]), 3), 1)


@gluon.jit
def _slot(i):
    """Which of two buffers block i has."""
    return i & 1


@gluon.jit
def _phase(i):
    """The phase that a barrier completes when block i is there."""
    return (i >> 1) & 1


@gluon.jit
def _load(
    descriptors,
    buffers,
    barriers,
    table,
    flags,
    count,
    side,
    tiles,
    HEADS: gl.constexpr,
    G: gl.constexpr,
    REDO: gl.constexpr,
):
    q_desc, k_desc, v_desc, k_chunk_desc, v_chunk_desc = descriptors
    q_s, k_s, v_s, k_chunk_s, v_chunk_s = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, chunk_full, chunk_empty = barriers
    i = 0
    u = 0
    tile, turn = _turn(gl.to_tensor(0), flags, tiles, REDO)
    index, next_head = _place(tile, count, side)
    entry = table + index * _COLUMNS
    q_start = gl.load(entry, mask=tile < tiles, other=0)
    masked_first = gl.load(entry + 8, mask=tile < tiles, other=0)
    v_batch = gl.to_tensor(0)
    v_head = gl.to_tensor(0)
    v_start = gl.to_tensor(0)
    while tile < tiles:
        batch = next_head // HEADS
        head = next_head % HEADS
        chunk_start = gl.load(entry + 1)
        start = gl.load(entry + 2)
        run = gl.load(entry + 4)
        run_count = gl.load(entry + 5)
        run2 = gl.load(entry + 6)
        full_count = run_count + gl.load(entry + 7)
        blocks = 1 + full_count + gl.load(entry + 9)
        masked = table + count * _COLUMNS + masked_first
        for c in gl.static_range(2):
            at = _slot(u) * 2 + c
            mbarrier.wait(q_empty.index(at), _phase(u) ^ 1)
            mbarrier.expect(q_full.index(at), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc,
                [batch, q_start + c * (64 // G), head * G, 0],
                q_full.index(at),
                q_s.index(at),
            )
        tile, turn = _turn(turn + 1, flags, tiles, REDO)
        # One load of each sector of the next entry, now: then the others find it in the L1.
        index, next_head = _place(tile, count, side)
        entry = table + index * _COLUMNS
        q_start = gl.load(entry, mask=tile < tiles, other=0)
        masked_first = gl.load(entry + 8, mask=tile < tiles, other=0)
        for b in range(blocks):
            if b > 0:
                start = run - (b - 1) * 128
                if b > run_count:
                    start = run2 - (b - 1 - run_count) * 128
                if b > full_count:
                    start = gl.load(masked + (b - 1 - full_count))
            s = _slot(i)
            mbarrier.wait(k_empty.index(s), _phase(i) ^ 1)
            mbarrier.expect(k_full.index(s), k_desc.block_type.nbytes)
            place = [batch, head, start, 0]
            tma.async_copy_global_to_shared(k_desc, place, k_full.index(s), k_s.index(s))
            # The values of the block before: their place is free later than that of these keys.
            if i > 0:
                t = _slot(i + 1)
                mbarrier.wait(v_empty.index(t), _phase(i - 1) ^ 1)
                mbarrier.expect(v_full.index(t), v_desc.block_type.nbytes)
                v_place = [v_batch, v_head, v_start, 0]
                tma.async_copy_global_to_shared(v_desc, v_place, v_full.index(t), v_s.index(t))
            if b == 0:
                # After the block, whose QK the consumers start before they are done with the
                # chunk before.
                mbarrier.wait(chunk_empty, (u & 1) ^ 1)
                mbarrier.expect(chunk_full, 2 * k_chunk_desc.block_type.nbytes)
                place = [batch, head, chunk_start, 0]
                tma.async_copy_global_to_shared(k_chunk_desc, place, chunk_full, k_chunk_s)
                tma.async_copy_global_to_shared(v_chunk_desc, place, chunk_full, v_chunk_s)
                v_batch = batch
                v_head = head
            v_start = start
            i += 1
        u += 1
    if i > 0:
        t = _slot(i + 1)
        mbarrier.wait(v_empty.index(t), _phase(i - 1) ^ 1)
        mbarrier.expect(v_full.index(t), v_desc.block_type.nbytes)
        v_place = [v_batch, v_head, v_start, 0]
        tma.async_copy_global_to_shared(v_desc, v_place, v_full.index(t), v_s.index(t))


@gluon.jit
def _chunk_qk(buffers, barriers, u, live, C: gl.constexpr, D: gl.constexpr, CHUNK: gl.constexpr,
              CL: gl.constexpr, SHARED: gl.constexpr):  # fmt: skip
    """Starts QK of a tile's chunk; where it isn't live, the result is rubbish."""
    q_s, _, _, k_chunk_s, _ = buffers
    q_full, _, _, _, _, _, chunk_full, _ = barriers
    at = _slot(u) * 2 + C
    q = q_s.index(at)._reinterpret(q_s.dtype, [64, D], SHARED)
    k = k_chunk_s._reinterpret(q_s.dtype, [CHUNK, D], SHARED)
    mbarrier.wait(q_full.index(at), _phase(u), pred=live)
    mbarrier.wait(chunk_full, u & 1, pred=live)
    zeros = gl.zeros([64, CHUNK], gl.float32, CL)
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _wait_for_qk(barriers, i, u, live, new, C: gl.constexpr):
    """Waits for what QK of block i of tile u needs; that block is the tile's first where `new`."""
    q_full, _, k_full, _, _, _, _, _ = barriers
    mbarrier.wait(q_full.index(_slot(u) * 2 + C), _phase(u), pred=live & new)
    mbarrier.wait(k_full.index(_slot(i)), _phase(i), pred=live)


@gluon.jit
def _qk(buffers, i, u, C: gl.constexpr, D: gl.constexpr, L: gl.constexpr,
        SHARED: gl.constexpr):  # fmt: skip
    """Starts QK of block i, of tile u; where there is none, the result is rubbish."""
    q_s, k_s, _, _, _ = buffers
    q = q_s.index(_slot(u) * 2 + C)._reinterpret(q_s.dtype, [64, D], SHARED)
    k = k_s.index(_slot(i))._reinterpret(q_s.dtype, [128, D], SHARED)
    zeros = gl.zeros([64, 128], gl.float32, L)
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _step(
    buffers,
    barriers,
    scores,
    acc,
    p,
    m,
    total,
    i,
    u,
    last,
    live,
    start,
    bounds,
    c,
    MASKED: gl.constexpr,
    C: gl.constexpr,
    K: gl.constexpr,
    D: gl.constexpr,
    GUESS: gl.constexpr,
    L: gl.constexpr,
    OL: gl.constexpr,
    SHARED: gl.constexpr,
):
    """PV of block i, the softmax of i + 1, whose scores are there, and QK of i + 2."""
    _, _, v_s, _, _ = buffers
    _, _, _, k_empty, v_full, v_empty, _, _ = barriers
    PL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OL, k_width=2)
    s = _slot(i)
    v = v_s.index(s)._reinterpret(v_s.dtype, [128, D], SHARED)
    # In float32 over the loop's edge: cheaper than moving halves.
    weights = gl.convert_layout(p.to(v_s.dtype), PL)
    acc = warpgroup_mma(weights, v, acc, is_async=True)
    live = live | (last == 0)
    u += last.to(gl.int32)
    _wait_for_qk(barriers, i + 2, u, live, last, C)
    if MASKED:
        scores = _masked(scores, start, bounds, K, L)
    if GUESS:
        reference = m
        factor = m
    else:
        highest = gl.max(scores, 1)
        # The old reference stays until a row outgrows it by 2**8: rescaling is rare.
        reference = gl.where((highest - m) * c > 8.0, highest, m)
        factor = gl.exp2((m - reference) * c)
    m = reference
    # Out of the registers that the next scores go to.
    exponents = scores * c - (m * c)[:, None]
    scores = _qk(buffers, i + 2, u, C, D, L, SHARED)
    p = gl.exp2(exponents)
    sums = _thread_sums(p, 128)
    if not GUESS:
        total = total * gl.convert_layout(factor, gl.SliceLayout(1, sums.type.layout))[:, None]
    total = total + sums
    # This wait is a basic block's edge, too: without one ptxas hoists the wait for the products
    # over the exponentials.
    mbarrier.wait(v_full.index(_slot(i + 1)), _phase(i + 1))
    acc, weights, scores = warpgroup_mma_wait(0, deps=[acc, weights, scores])
    mbarrier.arrive(v_empty.index(s), count=1)
    mbarrier.arrive(k_empty.index(s), count=1, pred=live)
    if not GUESS:
        acc = _rescaled(acc, gl.convert_layout(factor, gl.SliceLayout(1, OL)), D)
    return scores, acc, p, m, total


@gluon.jit
def _attend(
    out_desc,
    buffers,
    barriers,
    table,
    ranges,
    lse,
    flags,
    n,
    count,
    side,
    tiles,
    c,
    C: gl.constexpr,
    K: gl.constexpr,
    HEADS: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
    CHUNK: gl.constexpr,
    GUESS: gl.constexpr,
    REDO: gl.constexpr,
    LIMIT: gl.constexpr,
):
    """Consumer C: its 64 rows of every tile."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    CL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OL, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, L)
    CHUNK_ROWS: gl.constexpr = gl.SliceLayout(1, CL)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OL)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_s, _, v_s, _, v_chunk_s = buffers
    _, q_empty, _, k_empty, v_full, v_empty, _, chunk_empty = barriers
    # A wide chunk's scores beside a tile's end would not fit the registers.
    EARLY: gl.constexpr = CHUNK <= 32 or D == 64
    row = gl.arange(0, 64, ROWS)
    i = 0
    u = 0
    tile, turn = _turn(gl.to_tensor(0), flags, tiles, REDO)
    index, next_head = _place(tile, count, side)
    entry = table + index * _COLUMNS
    next_q_start = gl.load(entry, mask=tile < tiles, other=0)
    plan = _plan(table, ranges, n, entry, tile < tiles, count, next_q_start, C, K, G, ROWS)
    if EARLY:
        chunk = _chunk_qk(buffers, barriers, u, tile < tiles, C, D, CHUNK, CL, SHARED)
    _wait_for_qk(barriers, i, u, tile < tiles, True, C)
    scores = _qk(buffers, i, u, C, D, L, SHARED)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(_slot(i)), count=1, pred=tile < tiles)
    while tile < tiles:
        (
            q_start,
            chunk_start,
            first,
            first_masked,
            full_count,
            masked_first,
            masked_count,
            bounds,
        ) = plan
        blocks = 1 + full_count + masked_count
        next_tile, turn = _turn(turn + 1, flags, tiles, REDO)
        live = next_tile < tiles
        batch = next_head // HEADS
        head = next_head % HEADS
        index, next_head = _place(next_tile, count, side)
        entry = table + index * _COLUMNS
        next_q_start = gl.load(entry, mask=live, other=0)
        if not EARLY:
            chunk = _chunk_qk(buffers, barriers, u, True, C, D, CHUNK, CL, SHARED)
        q_buffer = q_s.index(_slot(u) * 2 + C)
        q = q_buffer._reinterpret(q_s.dtype, [64, D], SHARED)
        v_chunk = v_chunk_s._reinterpret(q_s.dtype, [CHUNK, D], SHARED)

        chunk = warpgroup_mma_wait(0, deps=[chunk])
        # The store of the tile before has read its buffer by now: hand it back.
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(_slot(u + 1) * 2 + C), count=1, pred=u > 0)
        last = blocks == 1
        more = live | (blocks > 1)
        _wait_for_qk(barriers, i + 1, u + last.to(gl.int32), more, last, C)
        chunk = _masked(chunk, chunk_start, bounds, K, CL)
        if first_masked != 0:
            scores = _masked(scores, first, bounds, K, L)
        m = gl.maximum(gl.convert_layout(gl.max(chunk, 1), ROWS), gl.max(scores, 1))
        m = gl.maximum(m, _NO_SCORE)
        shift = m * c
        exponents = scores * c - shift[:, None]
        scores = _qk(buffers, i + 1, u + last.to(gl.int32), C, D, L, SHARED)
        p_chunk = gl.exp2(chunk * c - gl.convert_layout(shift, CHUNK_ROWS)[:, None])
        weights = gl.convert_layout(p_chunk.to(q_s.dtype), PL)
        zeros = gl.zeros([64, D], gl.float32, OL)
        acc = warpgroup_mma(weights, v_chunk, zeros, use_acc=False, is_async=True)
        p = gl.exp2(exponents)
        total = _thread_sums(p, 128)
        total = total + gl.convert_layout(_thread_sums(p_chunk, CHUNK), total.type.layout)
        mbarrier.wait(v_full.index(_slot(i)), _phase(i))
        acc, weights, scores = warpgroup_mma_wait(0, deps=[acc, weights, scores])
        mbarrier.arrive(chunk_empty, count=1)
        mbarrier.arrive(k_empty.index(_slot(i + 1)), count=1, pred=more)

        for b in range(1, 1 + full_count):
            scores, acc, p, m, total = _step(
                buffers, barriers, scores, acc, p, m, total, i, u, b + 1 == blocks, live,
                0, bounds, c, False, C, K, D, GUESS, L, OL, SHARED,
            )  # fmt: skip
            i += 1
        for b in range(1 + full_count, blocks):
            start = gl.load(table + (masked_first + (b - 1 - full_count)))
            scores, acc, p, m, total = _step(
                buffers, barriers, scores, acc, p, m, total, i, u, b + 1 == blocks, live,
                start, bounds, c, True, C, K, D, GUESS, L, OL, SHARED,
            )  # fmt: skip
            i += 1

        s = _slot(i)
        v = v_s.index(s)._reinterpret(q_s.dtype, [128, D], SHARED)
        weights = gl.convert_layout(p.to(q_s.dtype), PL)
        acc = warpgroup_mma(weights, v, acc, is_async=True)
        if EARLY:
            chunk = _chunk_qk(buffers, barriers, u + 1, live, C, D, CHUNK, CL, SHARED)
        # What the next tile needs is on its way before that starts.
        plan = _plan(table, ranges, n, entry, live, count, next_q_start, C, K, G, ROWS)
        sums = gl.convert_layout(gl.sum(total, 1), ROWS)
        # The sums are normal numbers or 0: the units' own approximations are exact to 2**-22.
        inverse = gl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [sums], dtype=gl.float32, is_pure=True, pack=1
        )
        inverse = gl.where(sums == 0.0, 0.0, inverse)
        acc, weights = warpgroup_mma_wait(1 if EARLY else 0, deps=[acc, weights])
        mbarrier.arrive(v_empty.index(s), count=1)
        i += 1
        q.store((acc * gl.convert_layout(inverse, OUT_ROWS)[:, None]).to(q_s.dtype))
        fence_async_shared()
        at = q_start + row // G
        place = [batch, q_start, head * G, 0]
        tma.async_copy_shared_to_global(out_desc, place, q_buffer)
        # After the fence, which would wait for these stores.
        if GUESS:
            # A sum that is NaN is marked as well; rows past the last query, which are of no use,
            # are not.
            bad = gl.where((sums < LIMIT) | (at >= n), 0, 1)
            bad = gl.inline_asm_elementwise(
                _ANY, "=r,=r,r,r", [bad], dtype=gl.int32, is_pure=True, pack=2
            )
            mark = flags + tile * 8 + C * 4 + row // 16
            gl.store(mark, bad.to(gl.int8), mask=row % 16 == 0)
        logarithm = gl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [sums], dtype=gl.float32, is_pure=True, pack=1
        )
        value = (m * c + logarithm) * _LN_2
        value = gl.where(sums == 0.0, -float("inf"), value)
        heads = (batch * HEADS + head) * G + row % G
        gl.store(lse + heads.to(gl.int64) * n + at, value, mask=at < n)
        tile = next_tile
        u += 1
    if EARLY:
        chunk = warpgroup_mma_wait(0, deps=[chunk])
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n", "count", "side", "tiles"])
def forward(
    q_desc,
    k_desc,
    v_desc,
    k_chunk_desc,
    v_chunk_desc,
    out_desc,
    table,
    ranges,
    lse,
    flags,
    n,
    count,
    side,
    tiles,
    c,
    K: gl.constexpr,
    HEADS: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
    CHUNK: gl.constexpr,
    GUESS: gl.constexpr,
    REDO: gl.constexpr,
    LIMIT: gl.constexpr,
):
    DTYPE: gl.constexpr = q_desc.dtype
    if REDO:
        # All of a program's flags at once: where none is set, which is the rule, it ends here.
        FLAGS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        programs = gl.num_programs(0)
        marks = gl.zeros([256], gl.int64, FLAGS)
        for turn in range(0, (tiles + programs - 1) // programs, 256):
            at = _tile(turn + gl.arange(0, 256, FLAGS))
            marks = marks | gl.load(flags + at, mask=at < tiles, other=0)
        if gl.max(gl.where(marks != 0, 1, 0), 0) == 0:
            tiles = 0
    q_s = gl.allocate_shared_memory(DTYPE, [4, 1, 64 // G, G, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 128, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 128, D], v_desc.layout)
    k_chunk_s = gl.allocate_shared_memory(DTYPE, [1, 1, CHUNK, D], k_chunk_desc.layout)
    v_chunk_s = gl.allocate_shared_memory(DTYPE, [1, 1, CHUNK, D], v_chunk_desc.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    chunk_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    chunk_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for i in gl.static_range(4):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    mbarrier.init(chunk_full, count=1)
    mbarrier.init(chunk_empty, count=2)
    fence_async_shared()
    descriptors = (q_desc, k_desc, v_desc, k_chunk_desc, v_chunk_desc)
    buffers = (q_s, k_s, v_s, k_chunk_s, v_chunk_s)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, chunk_full, chunk_empty)
    gl.warp_specialize(
        [
            (_attend, (out_desc, buffers, barriers, table, ranges, lse, flags,
                       n, count, side, tiles, c, 0, K, HEADS, G, D, CHUNK, GUESS, REDO, LIMIT)),
            (_attend, (out_desc, buffers, barriers, table, ranges, lse, flags,
                       n, count, side, tiles, c, 1, K, HEADS, G, D, CHUNK, GUESS, REDO, LIMIT)),
            (_load, (descriptors, buffers, barriers, table, flags, count, side, tiles,
                     HEADS, G, REDO)),
        ],
        [4, 1],
        # The first consumer gets what is left of 3 * 168, 240 too.
        [240, 24],
    )  # fmt: skip
