"""Device code: decode attention over keys that need no turning, in Gluon, for sm_90.

A program takes a run of keys of one KV head. Within it each warp owns keys of its own in every
tile, and a softmax of its own over them, so warps meet once, at the end of the run; rows (query
heads of the KV head times queries) are padded to the 16 of a tensor-core product. Keys and values
come by cp.async through a ring of stages in shared memory. Scores are in units of log2.

Layouts are three-dimensional: (warps along keys, rows or keys, channels).

Int8 codes are read from shared memory as words of four channels and widened in registers: two
words of neighbouring keys (or, for keys, neighbouring words of a key) give, byte by byte, four
operands of a product, whose channels are 4 c + i. That saves the transposition of bytes which
tensor cores would otherwise ask for.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents


# Two words of four int8 codes each to four pairs of fp16: the sixteen bits 0x6400 + u are 1024 + u,
# and u is the code plus 128. So much too large they serve keys; for values 1152 is taken off.
def _widening(*less: str) -> str:
    planes = "".join(
        f"prmt.b32 t, $4, $5, {pick};\n"
        f"lop3.b32 ${i}, t, 0x00FF00FF, magic, 0x6A;\n" + "".join(x.format(i) for x in less)
        for i, pick in enumerate(("0x5410", "0x5511", "0x6622", "0x7733"))
    )
    return "{ .reg .b32 t, magic;\nmov.b32 magic, 0x64806480;\n" + planes + "}"


_WIDEN = gl.constexpr(_widening())
_WIDEN_EXACT = gl.constexpr(_widening("sub.f16x2 ${0}, ${0}, magic;\n"))
_OFFSET = gl.constexpr(1152.0)


@gluon.jit
def _widen(words, ASM: gl.constexpr):
    """The four bytes of each word, each a tensor of its own."""
    return gl.inline_asm_elementwise(
        ASM,
        "=&r,=&r,=&r,=&r,r,r",
        [words],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def as_operand(p, WK: gl.constexpr, T: gl.constexpr, N: gl.constexpr, to: gl.constexpr):
    """Weights (warps, keys, rows), as one product leaves them, as the next one's right operand.

    `movmatrix` turns each block of eight keys by eight rows; what remains is renaming.
    """
    turned = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
        "=r,r",
        [p],
        dtype=p.dtype,
        is_pure=True,
        pack=2,
    )
    blocks = gl.reshape(turned, [WK, T // 8, 8, N // 8, 8])
    named = gl.reshape(gl.permute(blocks, [0, 1, 4, 3, 2]), [WK, T, N])
    return gl.convert_layout(named, to, assert_trivial=True)


@gluon.jit
def run_of(n, lengths, starts, b, split, SPLITS, GRAIN: gl.constexpr):
    """The keys `first <= j < last` of a split of row `b`; runs start at multiples of GRAIN."""
    start = 0
    length = n
    if lengths is not None:
        length = gl.load(lengths + b)
    if starts is not None:
        start = gl.load(starts + b)
        length = gl.minimum(length, n - start)
    length = gl.minimum(length, n)
    per = gl.cdiv(gl.cdiv(length, SPLITS), GRAIN) * GRAIN
    first = gl.minimum(split * per, length)
    last = gl.minimum(first + per, length)
    return start + first, start + last


@gluon.jit
def _load_query(
    q, q_batch, q_head, q_row, b, kv, rows, M: gl.constexpr, G: gl.constexpr, N: gl.constexpr,
    WK: gl.constexpr, FROM: gl.constexpr, STEP: gl.constexpr, D: gl.constexpr, qb: gl.constexpr,
):  # fmt: skip
    """Channels FROM, FROM + STEP, ... by rows, the same for every warp along the keys."""
    w = gl.arange(0, WK, gl.SliceLayout(1, gl.SliceLayout(2, qb)))[:, None, None]
    d = gl.arange(0, D // STEP, gl.SliceLayout(0, gl.SliceLayout(2, qb)))[None, :, None]
    r = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, qb)))[None, None, :]
    base = q + b.to(gl.int64) * q_batch + kv.to(gl.int64) * G * q_head
    at = w * 0 + d * STEP + FROM + (r // M) * q_head + (r % M) * q_row
    return gl.load(base + at, mask=(w + d) * 0 + r < rows, other=0.0)


@gluon.jit
def copies(base, stride, apart, first, last, slot, memory, WK: gl.constexpr, T: gl.constexpr,
           WIDTH: gl.constexpr, cp: gl.constexpr):  # fmt: skip
    """Starts the copy of a tile's rows from key `first` on; past `last` come zeros.

    `apart` is from a warp's rows to the next one's: None where those follow it, else so many
    elements, each warp then having the same keys of another head.
    """
    w = gl.arange(0, WK, gl.SliceLayout(1, gl.SliceLayout(2, cp)))[:, None, None]
    t = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(2, cp)))[None, :, None]
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, cp)))[None, None, :]
    from_ = base + first.to(gl.int64) * stride
    if apart is None:
        j = w * T + t
        at = from_ + (j * stride + d)
    else:
        j = w * 0 + t
        at = from_ + w.to(gl.int64) * apart + (t * stride + d)
    async_copy.async_copy_global_to_shared(memory.index(slot), at, j + d * 0 < last - first)


@gluon.jit
def load_scales(base, stride, apart, first, last, WK: gl.constexpr, T: gl.constexpr,
                mma: gl.constexpr):  # fmt: skip
    """A scale of each of a tile's keys; `apart` as in `copies`."""
    layout: gl.constexpr = gl.SliceLayout(2, mma)
    w = gl.arange(0, WK, gl.SliceLayout(1, layout))[:, None]
    t = gl.arange(0, T, gl.SliceLayout(0, layout))[None, :]
    from_ = base + first.to(gl.int64) * stride
    if apart is None:
        j = w * T + t
        at = from_ + j * stride
    else:
        j = w * 0 + t
        at = from_ + w.to(gl.int64) * apart + t * stride
    return gl.load(at, mask=j < last - first, other=0)


@gluon.jit
def finish_scores(
    s, j, r, first, last, softcap, mask, mask_row, scores, apart, ROWS: gl.constexpr,
    M: gl.constexpr,
):  # fmt: skip
    """Soft cap, additive mask, and minus infinity past the last key; saves them if wanted.

    They are of the keys `first + j` by the rows `r`; `apart` is where saved ones of one KV head
    lie after those of another.
    """
    inside = j + r * 0 < last - first
    if softcap is not None:
        # s is in units of softcap here; tanh(s) = 1 - 2 / (exp(2 s) + 1).
        s = (softcap * 1.4426950408889634) * (1 - 2 / (gl.exp2(s * 2.8853900817779268) + 1))
    if mask is not None:
        extra = gl.load(mask + first + ((r % M) * mask_row + j), mask=inside, other=0.0)
        s += extra.to(gl.float32) * 1.4426950408889634
    s = gl.where(inside, s, -float("inf"))
    if scores is not None:
        # A key's rows lie side by side: a warp then writes whole lines. They stay in the L2 cache
        # for the last pass, whatever streams by.
        at = scores + first.to(gl.int64) * ROWS + apart
        gl.store(at + (j * ROWS + r), s, mask=inside & (r < ROWS), eviction_policy="evict_last")
    return s


@gluon.jit
def _places(WK: gl.constexpr, T: gl.constexpr, N: gl.constexpr, mma: gl.constexpr):
    """Keys of a tile, and rows, of a product's elements."""
    w = gl.arange(0, WK, gl.SliceLayout(1, gl.SliceLayout(2, mma)))[:, None, None]
    t = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(2, mma)))[None, :, None]
    r = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
    return w * T + t, r


@gluon.jit
def softmax(s, top):
    """Weights of a tile under the new maximum, and what the former sums are to be scaled by."""
    new = gl.maximum(top, gl.max(s, 1))
    base = gl.where(new == -float("inf"), 0.0, new)
    keep = gl.exp2(top - base)
    p = gl.exp2(s - base[:, None, :])
    return p, keep, new


@gluon.jit
def _join_warps(top, total, mma: gl.constexpr):
    """The run's maximum and sum of each row, and each warp's factor."""
    most = gl.max(top, 0)
    base = gl.where(most == -float("inf"), 0.0, most)
    share = gl.exp2(top - gl.expand_dims(base, 0))
    return most, gl.sum(total * share, 0), share


@gluon.jit
def _put(acc, share, WIDTH: gl.constexpr, N: gl.constexpr, WK: gl.constexpr):
    """The warps' outputs in shared memory, each scaled to the run's maximum."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [2, 1, 0])
    memory = gl.allocate_shared_memory(gl.float32, [WK, N, WIDTH], layout)
    memory.permute([0, 2, 1]).store(acc * share[:, None, :])
    return memory


@gluon.jit
def _summed(memory, WIDTH: gl.constexpr, WK: gl.constexpr, W: gl.constexpr):
    """Over the warps, `(rows, WIDTH)`."""
    lanes: gl.constexpr = WIDTH // 4
    layout: gl.constexpr = gl.BlockedLayout(
        [WK, 1, 4], [1, 32 // lanes, lanes], [1, W, 1], [2, 1, 0]
    )
    return gl.sum(memory.load(layout), 0)


@gluon.jit
def _store_part(out, part, rows, N: gl.constexpr, D: gl.constexpr):
    layout: gl.constexpr = out.type.layout
    r = gl.arange(0, N, gl.SliceLayout(1, layout))[:, None]
    d = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    gl.store(part + r * D + d, out, mask=(r < rows) & (d >= 0))


@gluon.jit
def _store_stats(most, total, stats, rows, N: gl.constexpr, W: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    r = gl.arange(0, N, layout)
    gl.store(stats + r * 2, gl.convert_layout(most, layout), mask=r < rows)
    gl.store(stats + r * 2 + 1, gl.convert_layout(total, layout), mask=r < rows)


@gluon.jit
def _combine(
    part, stats, sink, out, lse, runs, rows, kv, M: gl.constexpr, G: gl.constexpr,
    D: gl.constexpr, W: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """What a KV head's runs give, merged: four rows at a time, MOST runs in flight."""
    layout: gl.constexpr = gl.BlockedLayout(
        [MOST, 1, 4], [1, 128 // D, D // 4], [1, W, 1], [2, 1, 0]
    )
    by_row: gl.constexpr = gl.SliceLayout(2, layout)
    flat: gl.constexpr = gl.SliceLayout(0, layout)
    i = gl.arange(0, MOST, gl.SliceLayout(1, by_row))
    d = gl.arange(0, D, gl.SliceLayout(0, flat))
    for from_ in range(0, rows, 4):
        r = from_ + gl.arange(0, 4, gl.SliceLayout(0, by_row))
        top = gl.full([4], -float("inf"), gl.float32, gl.SliceLayout(0, by_row))
        if sink is not None:
            top = gl.load(sink + kv * G + r // M, mask=r < rows, other=0.0).to(gl.float32)
            top = top * 1.4426950408889634
        base = gl.where(top == -float("inf"), 0.0, top)
        total = gl.exp2(top - base)
        acc = gl.zeros([4, D], gl.float32, flat)
        for first in range(0, runs, MOST):
            run = first + i
            seen = (run < runs)[:, None] & (r < rows)[None, :]
            at = run[:, None] * rows + r[None, :]
            most = gl.load(stats + at * 2, mask=seen, other=-float("inf"), cache_modifier=".cg")
            sums = gl.load(stats + at * 2 + 1, mask=seen, other=0.0, cache_modifier=".cg")
            column = gl.expand_dims(gl.expand_dims(d, 0), 0)
            x = gl.load(
                part + at[:, :, None] * D + column,
                mask=seen[:, :, None] & (column >= 0),
                other=0.0,
                cache_modifier=".cg",
            )
            new = gl.maximum(top, gl.max(most, 0))
            base = gl.where(new == -float("inf"), 0.0, new)
            keep = gl.exp2(top - base)
            share = gl.exp2(most - base[None, :])
            total = total * keep + gl.sum(sums * share, 0)
            keep_flat = gl.convert_layout(keep, gl.SliceLayout(1, flat))
            acc = acc * keep_flat[:, None] + gl.sum(x * share[:, :, None], 0)
            top = new
        base = gl.where(top == -float("inf"), 0.0, top)
        gl.store(
            lse + r,
            gl.where(total > 0, (base + gl.log2(total)) * 0.6931471805599453, -float("inf")),
            mask=r < rows,
        )
        scale = gl.convert_layout(gl.where(total > 0, 1 / total, 0.0), gl.SliceLayout(1, flat))
        row = from_ + gl.arange(0, 4, gl.SliceLayout(1, flat))
        gl.store(
            out + row[:, None] * D + d[None, :],
            (acc * scale[:, None]).to(out.dtype.element_ty),
            mask=(row < rows)[:, None] & (d >= 0)[None, :],
        )


@gluon.jit
def _close(
    part, stats, sink, out, lse, counters, runs, first_run, pair, kv, ROWS: gl.constexpr,
    M: gl.constexpr, G: gl.constexpr, D: gl.constexpr, W: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """The last of a KV head's runs merges them all, and leaves the counter as it was found."""
    gl.thread_barrier()
    before = gl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
    if before == gl.num_programs(0) - 1:
        whole = pair.to(gl.int64) * ROWS
        _combine(
            part + whole * runs * D, stats + whole * runs * 2, sink, out + whole * D, lse + whole,
            runs, ROWS, kv, M, G, D, W, MOST,
        )  # fmt: skip
        gl.store(counters + pair, 0)


@gluon.jit(do_not_specialize=["n", "runs", "first_run", "scores_first", "scores_keys"])
def attend_dense(
    q, key, value, mask, lengths, starts, sink, part, stats, out, lse, scores, counters,
    factor, softcap, n, runs, first_run, scores_first, kv_heads, q_batch, q_head, q_row,
    key_batch, key_head, key_row, value_batch, value_head, value_row, mask_row, scores_keys,
    M: gl.constexpr, G: gl.constexpr, D: gl.constexpr, N: gl.constexpr, W: gl.constexpr,
    T: gl.constexpr, STAGES: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """A run of keys of the model's dtype; grid (runs of this launch, batch * kv_heads)."""
    ROWS: gl.constexpr = G * M
    R: gl.constexpr = max(1, N // 16)
    WK: gl.constexpr = W // R
    TILE: gl.constexpr = WK * T
    dtype: gl.constexpr = key.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WK, 1, R], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    held: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    cp: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // D, D // 8], [WK, R, 1], [2, 1, 0])
    split = gl.program_id(0)
    pair = gl.program_id(1)
    b = pair // kv_heads
    kv = pair % kv_heads
    first, last = run_of(n, lengths, starts, b, split, gl.num_programs(0), 16)
    key += b.to(gl.int64) * key_batch + kv.to(gl.int64) * key_head
    value += b.to(gl.int64) * value_batch + kv.to(gl.int64) * value_head
    if scores is not None:
        scores += (pair.to(gl.int64) * scores_keys + scores_first) * ROWS
    keys = gl.allocate_shared_memory(dtype, [STAGES, WK, T, D], held)
    values = gl.allocate_shared_memory(dtype, [STAGES, WK, T, D], held)
    for i in gl.static_range(STAGES - 1):
        at = first + i * TILE
        copies(key, key_row, None, at, last, i, keys, WK, T, D, cp)
        copies(value, value_row, None, at, last, i, values, WK, T, D, cp)
        async_copy.commit_group()
    query = _load_query(q, q_batch, q_head, q_row, b, kv, ROWS, M, G, N, WK, 0, 1, D, right)
    top = gl.full([WK, N], -float("inf"), gl.float32, gl.SliceLayout(1, mma))
    total = gl.zeros([WK, N], gl.float32, gl.SliceLayout(1, mma))
    acc = gl.zeros([WK, D, N], gl.float32, mma)
    j, r = _places(WK, T, N, mma)
    slot = 0
    for at in range(first, last, TILE):
        async_copy.wait_group(STAGES - 2)
        ahead = at + (STAGES - 1) * TILE
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        copies(key, key_row, None, ahead, last, free, keys, WK, T, D, cp)
        copies(value, value_row, None, ahead, last, free, values, WK, T, D, cp)
        async_copy.commit_group()
        s = mma_v2(keys.index(slot).load(left), query, gl.zeros([WK, T, N], gl.float32, mma))
        s = finish_scores(s * factor, j, r, at, last, softcap, mask, mask_row, scores, 0, ROWS, M)
        p, keep, top = softmax(s, top)
        total = total * keep + gl.sum(p, 1)
        weights = as_operand(p.to(dtype), WK, T, N, right)
        acc = mma_v2(
            values.index(slot).permute([0, 2, 1]).load(left), weights, acc * keep[:, None, :]
        )
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    async_copy.wait_group(0)
    if counters is None:
        gdc_launch_dependents()
    most, total, share = _join_warps(top, total, mma)
    run = pair.to(gl.int64) * runs + first_run + split
    _store_stats(most, total, stats + run * ROWS * 2, ROWS, N, W)
    _store_part(_summed(_put(acc, share, D, N, WK), D, WK, W), part + run * ROWS * D, ROWS, N, D)
    if counters is not None:
        _close(
            part, stats, sink, out, lse, counters, runs, first_run, pair, kv, ROWS, M, G, D, W,
            MOST,
        )  # fmt: skip


@gluon.jit
def _largest(x):
    return gl.max(gl.abs(x.to(gl.float32)), 1)


@gluon.jit
def _total(x):
    return gl.sum(x.to(gl.float32), 1)


@gluon.jit
def _fit(x, factor):
    """fp16 of what is multiplied with a power of two for it: no bit of a bf16 is lost."""
    return (x.to(gl.float32) * factor[:, None, :]).to(gl.float16)


@gluon.jit(do_not_specialize=["n", "runs", "first_run", "scores_first", "scores_keys"])
def attend_int8(
    q, key, value, key_scale, value_scale, mask, lengths, starts, sink, part, stats, out, lse,
    scores, counters, factor, softcap, n, runs, first_run, scores_first, kv_heads,
    q_batch, q_head, q_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    ks_batch, ks_head, ks_row, vs_batch, vs_head, vs_row, mask_row, scores_keys,
    M: gl.constexpr, G: gl.constexpr, D: gl.constexpr, N: gl.constexpr, W: gl.constexpr,
    T: gl.constexpr, STAGES: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """A run of int8 codes, seen as int32 words; grid as `attend_dense`."""
    ROWS: gl.constexpr = G * M
    R: gl.constexpr = max(1, N // 16)
    WK: gl.constexpr = W // R
    TILE: gl.constexpr = WK * T
    WORDS: gl.constexpr = D // 4
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WK, 1, R], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    held: gl.constexpr = gl.SwizzledSharedLayout(4, 128 // D, D // 16, [2, 1, 0])
    cp: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 512 // D, D // 16], [WK, R, 1], [2, 1, 0])
    split = gl.program_id(0)
    pair = gl.program_id(1)
    b = pair // kv_heads
    kv = pair % kv_heads
    first, last = run_of(n, lengths, starts, b, split, gl.num_programs(0), 16)
    key += b.to(gl.int64) * key_batch + kv.to(gl.int64) * key_head
    value += b.to(gl.int64) * value_batch + kv.to(gl.int64) * value_head
    key_scale += b.to(gl.int64) * ks_batch + kv.to(gl.int64) * ks_head
    value_scale += b.to(gl.int64) * vs_batch + kv.to(gl.int64) * vs_head
    if scores is not None:
        scores += (pair.to(gl.int64) * scores_keys + scores_first) * ROWS
    keys = gl.allocate_shared_memory(gl.int32, [STAGES, WK, T, WORDS], held)
    values = gl.allocate_shared_memory(gl.int32, [STAGES, WK, T, WORDS], held)
    for i in gl.static_range(STAGES - 1):
        at = first + i * TILE
        copies(key, key_row, None, at, last, i, keys, WK, T, WORDS, cp)
        copies(value, value_row, None, at, last, i, values, WK, T, WORDS, cp)
        async_copy.commit_group()
    next_ks = load_scales(key_scale, ks_row, None, first, last, WK, T, mma)
    next_vs = load_scales(value_scale, vs_row, None, first, last, WK, T, mma)
    q0 = _load_query(q, q_batch, q_head, q_row, b, kv, ROWS, M, G, N, WK, 0, 4, D, right)
    q1 = _load_query(q, q_batch, q_head, q_row, b, kv, ROWS, M, G, N, WK, 1, 4, D, right)
    q2 = _load_query(q, q_batch, q_head, q_row, b, kv, ROWS, M, G, N, WK, 2, 4, D, right)
    q3 = _load_query(q, q_batch, q_head, q_row, b, kv, ROWS, M, G, N, WK, 3, 4, D, right)
    size = gl.maximum(
        gl.maximum(_largest(q0), _largest(q1)), gl.maximum(_largest(q2), _largest(q3))
    )
    power = gl.maximum(size, 1e-30).to(gl.int32, bitcast=True) & 0x7F800000
    power = power.to(gl.float32, bitcast=True) * 6.103515625e-05
    inverse = 1 / power
    q0 = _fit(q0, inverse)
    q1 = _fit(q1, inverse)
    q2 = _fit(q2, inverse)
    q3 = _fit(q3, inverse)
    row_factor = gl.convert_layout(power * factor, gl.SliceLayout(1, mma))
    offset = gl.convert_layout(
        (_total(q0) + _total(q1) + _total(q2) + _total(q3)) * _OFFSET, gl.SliceLayout(1, mma)
    )
    # Weights times value scales are at most 2**15 after division by the largest scale so far: in
    # fp16 they then lose less than a weight in bf16 down to 2**-32 of the largest.
    widest = gl.full(
        [WK], 5.960464477539063e-08, gl.float32, gl.SliceLayout(1, gl.SliceLayout(1, mma))
    )
    top = gl.full([WK, N], -float("inf"), gl.float32, gl.SliceLayout(1, mma))
    # A sum for each key of a tile: lanes add theirs up after the last one.
    total = gl.zeros([WK, T, N], gl.float32, mma)
    acc0 = gl.zeros([WK, WORDS, N], gl.float32, mma)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    most_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, mma))
    j, r = _places(WK, T, N, mma)
    slot = 0
    for at in range(first, last, TILE):
        async_copy.wait_group(STAGES - 2)
        ahead = at + (STAGES - 1) * TILE
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        copies(key, key_row, None, ahead, last, free, keys, WK, T, WORDS, cp)
        copies(value, value_row, None, ahead, last, free, values, WK, T, WORDS, cp)
        async_copy.commit_group()
        ks = next_ks
        vs = next_vs
        next_ks = load_scales(key_scale, ks_row, None, at + TILE, last, WK, T, mma)
        next_vs = load_scales(value_scale, vs_row, None, at + TILE, last, WK, T, mma)
        k0, k1, k2, k3 = _widen(keys.index(slot).load(left), _WIDEN)
        s = mma_v2(k0, q0, gl.zeros([WK, T, N], gl.float32, mma) - offset[:, None, :])
        s = mma_v2(k1, q1, s)
        s = mma_v2(k2, q2, s)
        s = mma_v2(k3, q3, s)
        s = s * row_factor[:, None, :] * ks.to(gl.float32)[:, :, None]
        s = finish_scores(s, j, r, at, last, softcap, mask, mask_row, scores, 0, ROWS, M)
        p, keep, top = softmax(s, top)
        total = total * keep[:, None, :] + p
        v = vs.to(gl.float32)
        most = gl.convert_layout(gl.max(v, 1), widest.type.layout, assert_trivial=True)
        wider = gl.maximum(widest, most)
        inverse_wide = 2048 / wider
        narrowed = gl.where(wider == widest, 1.0, widest * inverse_wide * 0.00048828125)
        keep = keep * narrowed[:, None]
        widest = wider
        share = gl.convert_layout(inverse_wide, most_layout, assert_trivial=True)
        p = p * (v * share[:, None])[:, :, None]
        weights = as_operand(p.to(gl.float16), WK, T, N, right)
        v0, v1, v2, v3 = _widen(values.index(slot).permute([0, 2, 1]).load(left), _WIDEN_EXACT)
        keep = keep[:, None, :]
        acc0 = mma_v2(v0, weights, acc0 * keep)
        acc1 = mma_v2(v1, weights, acc1 * keep)
        acc2 = mma_v2(v2, weights, acc2 * keep)
        acc3 = mma_v2(v3, weights, acc3 * keep)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    async_copy.wait_group(0)
    if counters is None:
        gdc_launch_dependents()
    most, total, share = _join_warps(top, gl.sum(total, 1), mma)
    run = pair.to(gl.int64) * runs + first_run + split
    _store_stats(most, total, stats + run * ROWS * 2, ROWS, N, W)
    share = share * (widest * 0.00048828125)[:, None]
    m0 = _put(acc0, share, WORDS, N, WK)
    m1 = _put(acc1, share, WORDS, N, WK)
    m2 = _put(acc2, share, WORDS, N, WK)
    m3 = _put(acc3, share, WORDS, N, WK)
    even = gl.join(_summed(m0, WORDS, WK, W), _summed(m2, WORDS, WK, W))
    odd = gl.join(_summed(m1, WORDS, WK, W), _summed(m3, WORDS, WK, W))
    out_run = gl.reshape(gl.join(even, odd), [N, D])
    _store_part(out_run, part + run * ROWS * D, ROWS, N, D)
    if counters is not None:
        _close(
            part, stats, sink, out, lse, counters, runs, first_run, pair, kv, ROWS, M, G, D, W,
            MOST,
        )  # fmt: skip
