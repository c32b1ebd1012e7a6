"""Device code: decode attention over int4 keys and values, turned or not, in Gluon, for sm_90.

A program takes a run of keys of W KV heads of a sequence, a warp for each: the angles of a key,
which are more bytes than its codes, are then read once for W heads. Codes are read from shared
memory as words of four bytes, eight channels, of which a byte holds two that turn together. A plane
is what one byte place of all words holds in its low or its high half: channels 4 c + i, or those
and 64. Each of the eight planes of keys is widened, scaled, given its mean and turned in float32 in
registers, and is then an operand of a product; those of values are exact in fp16 as codes. A
value's scale and least go on its weights, as in `gpu_decode_stored`, whose terms this file uses.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents

from attnspan.kernels.gpu_decode_stored import (
    as_operand,
    copies,
    finish_scores,
    load_scales,
    run_of,
    softmax,
)


# Words of two neighbouring keys to eight pairs of fp16: the sixteen bits 0x6400 + u are 1024 + u;
# of what stands four bits higher, a sixteenth of 1024 + 16 u.
def _values() -> str:
    made = "{ .reg .b32 t, low, high, magic, part, less;\nmov.b32 magic, 0x64006400;\n"
    made += "mov.b32 part, 0x2C002C00;\nmov.b32 less, 0xD400D400;\n"
    for i, pick in enumerate(("0x5410", "0x5511", "0x6622", "0x7733")):
        made += f"prmt.b32 t, $8, $9, {pick};\n"
        made += "lop3.b32 low, t, 0x000F000F, magic, 0xEA;\n"
        made += "lop3.b32 high, t, 0x00F000F0, magic, 0xEA;\n"
        made += f"sub.f16x2 ${i}, low, magic;\nfma.rn.f16x2 ${i + 4}, high, part, less;\n"
    return made + "}"


_VALUES = gl.constexpr(_values())


@gluon.jit
def _widen_values(words):
    """Eight planes of codes, 0 to 15: low halves, then high halves."""
    return gl.inline_asm_elementwise(
        _VALUES,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        [words],
        dtype=(
            gl.float16, gl.float16, gl.float16, gl.float16,
            gl.float16, gl.float16, gl.float16, gl.float16,
        ),
        is_pure=True,
        pack=2,
    )  # fmt: skip


@gluon.jit
def _code(words, AT: gl.constexpr):
    """The code at a word's bit AT, less 8, in float32: the bits 0x41800000 + 2**19 u are 16 + u."""
    bits = words << (19 - AT) if AT <= 19 else words >> (AT - 19)
    return ((bits & 0x00780000) | 0x41800000).to(gl.float32, bitcast=True) - 24.0


@gluon.jit
def _two(words):
    """The two fp16 of a word, in float32."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 l, h;\nmov.b32 {l, h}, $2;\ncvt.f32.f16 $0, l;\ncvt.f32.f16 $1, h; }",
        "=f,=f,r",
        [words],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _group_words(base, stride, apart, first, last, W: gl.constexpr, T: gl.constexpr, WORD, left):
    """Scales of two groups of channels of a tile's keys, as a word."""
    layout: gl.constexpr = gl.SliceLayout(2, left)
    w = gl.arange(0, W, gl.SliceLayout(1, layout))[:, None]
    t = gl.arange(0, T, gl.SliceLayout(0, layout))[None, :]
    at = base + first.to(gl.int64) * stride + w * apart
    return gl.load(at + (t * stride + WORD), mask=w * 0 + t < last - first, other=0)


@gluon.jit
def _by_word(halves, W: gl.constexpr, H: gl.constexpr, left: gl.constexpr):
    """Scales of the groups of the first half of the words, and of the second, by word."""
    w = gl.arange(0, H, gl.SliceLayout(0, gl.SliceLayout(1, left)))[None, None, :]
    return gl.where(w < H // 2, halves[0][:, :, None], halves[1][:, :, None])


@gluon.jit
def _planes(memory, T: gl.constexpr, H: gl.constexpr, angles: gl.constexpr, left: gl.constexpr):
    """Cosines or sines of a tile's keys for each of the four planes, the same for every warp."""
    x = gl.reshape(memory.load(angles), [T, H, 2, 2])
    even, odd = gl.split(x)
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    to: gl.constexpr = gl.SliceLayout(0, left)
    return (
        gl.convert_layout(x0, to, assert_trivial=True)[None, :, :],
        gl.convert_layout(x1, to, assert_trivial=True)[None, :, :],
        gl.convert_layout(x2, to, assert_trivial=True)[None, :, :],
        gl.convert_layout(x3, to, assert_trivial=True)[None, :, :],
    )


@gluon.jit
def _load_query(
    q, q_head, q_row, ROWS: gl.constexpr, M: gl.constexpr, G: gl.constexpr, N: gl.constexpr,
    W: gl.constexpr, FROM: gl.constexpr, H: gl.constexpr, right: gl.constexpr,
):  # fmt: skip
    """Channels FROM, FROM + 4, ... by rows, each warp's of its KV head."""
    w = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, right)))[:, None, None]
    d = gl.arange(0, H, gl.SliceLayout(0, gl.SliceLayout(2, right)))[None, :, None]
    r = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, right)))[None, None, :]
    at = d * 4 + FROM + (w * G + r // M) * q_head + (r % M) * q_row
    return gl.load(q + at, mask=(w + d) * 0 + r < ROWS, other=0.0)


@gluon.jit
def _mean(mean, apart, W: gl.constexpr, FROM: gl.constexpr, H: gl.constexpr, left: gl.constexpr):
    w = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, left)))[:, None, None]
    d = gl.arange(0, H, gl.SliceLayout(0, gl.SliceLayout(1, left)))[None, None, :]
    return gl.load(mean + w * apart + (d * 4 + FROM))


@gluon.jit
def _pair(
    words, scale_low, scale_high, mean_low, mean_high, cos, sin, TURNED: gl.constexpr,
    PLANE: gl.constexpr, dtype,
):  # fmt: skip
    """The keys' low and high plane of a byte place, turned."""
    low = _code(words, 8 * PLANE) * scale_low + mean_low
    high = _code(words, 8 * PLANE + 4) * scale_high + mean_high
    if not TURNED:
        return low.to(dtype), high.to(dtype)
    return (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)


@gluon.jit
def _store_plane(
    acc, share, least, part, apart, ROWS: gl.constexpr, FROM: gl.constexpr, D: gl.constexpr,
    W: gl.constexpr, H: gl.constexpr, N: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    w = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, mma)))[:, None, None]
    d = gl.arange(0, H, gl.SliceLayout(0, gl.SliceLayout(2, mma)))[None, :, None]
    r = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
    at = part + w.to(gl.int64) * apart + (r * D + d * 4 + FROM)
    gl.store(at, acc * share + least, mask=(w + d) * 0 + r < ROWS)


@gluon.jit(do_not_specialize=["n", "runs", "first_run", "scores_first", "scores_keys"])
def attend_int4(
    q, key, value, key_scale, value_scale, value_least, mean, cos, sin, mask, lengths, starts,
    part, stats, scores, factor, softcap, n, runs, first_run, scores_first, kv_heads,
    q_batch, q_head, q_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    ks_batch, ks_head, ks_row, vs_batch, vs_head, vs_row, vl_batch, vl_head, vl_row,
    mean_batch, mean_head, angle_row, mask_row, scores_keys,
    M: gl.constexpr, G: gl.constexpr, D: gl.constexpr, N: gl.constexpr, W: gl.constexpr,
    T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A run of keys; grid (runs of this launch, batch * kv_heads / W).

    Codes and the keys' scales are seen as int32 words; strides are in units of what is read.
    """
    ROWS: gl.constexpr = G * M
    H: gl.constexpr = D // 8
    TURNED: gl.constexpr = cos is not None
    dtype: gl.constexpr = q.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    held: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, [2, 1, 0])
    cp: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [W, 1, 1], [2, 1, 0])
    # As `left` has keys and words, with the four channels of a word in each thread.
    by_word: gl.constexpr = [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]]
    angles: gl.constexpr = gl.DistributedLinearLayout(
        by_word if T == 16 else by_word + [[16, 0]],  # noqa: RUF005
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[0, 0], [0, 0]] if W == 4 else [[0, 0], [0, 0], [0, 0]],
        [],
        [T, 4 * H],
    )
    angles_held: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    angles_cp: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [W, 1], [1, 0])
    split = gl.program_id(0)
    pair = gl.program_id(1) * W
    b = (pair // kv_heads).to(gl.int64)
    kv = (pair % kv_heads).to(gl.int64)
    first, last = run_of(n, lengths, starts, b, split, gl.num_programs(0), 16)
    q += b * q_batch + kv * G * q_head
    key += b * key_batch + kv * key_head
    value += b * value_batch + kv * value_head
    key_scale += b * ks_batch + kv * ks_head
    value_scale += b * vs_batch + kv * vs_head
    value_least += b * vl_batch + kv * vl_head
    mean += b * mean_batch + kv * mean_head
    if scores is not None:
        scores += (pair.to(gl.int64) * scores_keys + scores_first) * ROWS
    keys = gl.allocate_shared_memory(gl.int32, [STAGES, W, T, H], held)
    values = gl.allocate_shared_memory(gl.int32, [STAGES, W, T, H], held)
    if cos is not None:
        coses = gl.allocate_shared_memory(gl.float32, [STAGES, T, 4 * H], angles_held)
        sines = gl.allocate_shared_memory(gl.float32, [STAGES, T, 4 * H], angles_held)
    for i in gl.static_range(STAGES - 1):
        at = first + i * T
        copies(key, key_row, key_head, at, last, i, keys, W, T, H, cp)
        copies(value, value_row, value_head, at, last, i, values, W, T, H, cp)
        if cos is not None:
            _copy_angles(cos, angle_row, at, last, i, coses, T, 4 * H, angles_cp)
            _copy_angles(sin, angle_row, at, last, i, sines, T, 4 * H, angles_cp)
        async_copy.commit_group()
    next_low = _group_words(key_scale, ks_row, ks_head, first, last, W, T, 0, left)
    next_high = _group_words(key_scale, ks_row, ks_head, first, last, W, T, 1, left)
    next_vs = load_scales(value_scale, vs_row, vs_head, first, last, W, T, mma)
    next_vl = load_scales(value_least, vl_row, vl_head, first, last, W, T, mma)
    ql0 = _load_query(q, q_head, q_row, ROWS, M, G, N, W, 0, H, right)
    ql1 = _load_query(q, q_head, q_row, ROWS, M, G, N, W, 1, H, right)
    ql2 = _load_query(q, q_head, q_row, ROWS, M, G, N, W, 2, H, right)
    ql3 = _load_query(q, q_head, q_row, ROWS, M, G, N, W, 3, H, right)
    qh0 = _load_query(q, q_head, q_row, ROWS, M, G, N, W, D // 2, H, right)
    qh1 = _load_query(q, q_head, q_row, ROWS, M, G, N, W, D // 2 + 1, H, right)
    qh2 = _load_query(q, q_head, q_row, ROWS, M, G, N, W, D // 2 + 2, H, right)
    qh3 = _load_query(q, q_head, q_row, ROWS, M, G, N, W, D // 2 + 3, H, right)
    ml0 = _mean(mean, mean_head, W, 0, H, left)
    ml1 = _mean(mean, mean_head, W, 1, H, left)
    ml2 = _mean(mean, mean_head, W, 2, H, left)
    ml3 = _mean(mean, mean_head, W, 3, H, left)
    mh0 = _mean(mean, mean_head, W, D // 2, H, left)
    mh1 = _mean(mean, mean_head, W, D // 2 + 1, H, left)
    mh2 = _mean(mean, mean_head, W, D // 2 + 2, H, left)
    mh3 = _mean(mean, mean_head, W, D // 2 + 3, H, left)
    # As for int8: weights times scales, over the largest scale so far, fit fp16.
    widest = gl.full(
        [W], 5.960464477539063e-08, gl.float32, gl.SliceLayout(1, gl.SliceLayout(1, mma))
    )
    most_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, mma))
    top = gl.full([W, N], -float("inf"), gl.float32, gl.SliceLayout(1, mma))
    total = gl.zeros([W, T, N], gl.float32, mma)
    least = gl.zeros([W, T, N], gl.float32, mma)
    al0 = gl.zeros([W, H, N], gl.float32, mma)
    al1 = al0
    al2 = al0
    al3 = al0
    ah0 = al0
    ah1 = al0
    ah2 = al0
    ah3 = al0
    head = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, mma)))[:, None, None]
    j = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(2, mma)))[None, :, None] + head * 0
    r = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
    apart = head.to(gl.int64) * scores_keys * ROWS
    slot = 0
    for at in range(first, last, T):
        async_copy.wait_group(STAGES - 2)
        ahead = at + (STAGES - 1) * T
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        copies(key, key_row, key_head, ahead, last, free, keys, W, T, H, cp)
        copies(value, value_row, value_head, ahead, last, free, values, W, T, H, cp)
        if cos is not None:
            _copy_angles(cos, angle_row, ahead, last, free, coses, T, 4 * H, angles_cp)
            _copy_angles(sin, angle_row, ahead, last, free, sines, T, 4 * H, angles_cp)
        async_copy.commit_group()
        scales_low = next_low
        scales_high = next_high
        vs = next_vs
        vl = next_vl
        next_low = _group_words(key_scale, ks_row, ks_head, at + T, last, W, T, 0, left)
        next_high = _group_words(key_scale, ks_row, ks_head, at + T, last, W, T, 1, left)
        next_vs = load_scales(value_scale, vs_row, vs_head, at + T, last, W, T, mma)
        next_vl = load_scales(value_least, vl_row, vl_head, at + T, last, W, T, mma)
        sl = _by_word(_two(scales_low), W, H, left)
        sh = _by_word(_two(scales_high), W, H, left)
        if cos is None:
            c0, c1, c2, c3 = sl, sl, sl, sl
            s0, s1, s2, s3 = sl, sl, sl, sl
        else:
            c0, c1, c2, c3 = _planes(coses.index(slot), T, H, angles, left)
            s0, s1, s2, s3 = _planes(sines.index(slot), T, H, angles, left)
        words = keys.index(slot).load(left)
        s = gl.zeros([W, T, N], gl.float32, mma)
        low, high = _pair(words, sl, sh, ml0, mh0, c0, s0, TURNED, 0, dtype)
        s = mma_v2(high, qh0, mma_v2(low, ql0, s))
        low, high = _pair(words, sl, sh, ml1, mh1, c1, s1, TURNED, 1, dtype)
        s = mma_v2(high, qh1, mma_v2(low, ql1, s))
        low, high = _pair(words, sl, sh, ml2, mh2, c2, s2, TURNED, 2, dtype)
        s = mma_v2(high, qh2, mma_v2(low, ql2, s))
        low, high = _pair(words, sl, sh, ml3, mh3, c3, s3, TURNED, 3, dtype)
        s = mma_v2(high, qh3, mma_v2(low, ql3, s))
        s = finish_scores(
            s * factor, j, r, at, last, softcap, mask, mask_row, scores, apart, ROWS, M
        )
        p, keep, top = softmax(s, top)
        total = total * keep[:, None, :] + p
        least = least * keep[:, None, :] + p * vl.to(gl.float32)[:, :, None]
        v = vs.to(gl.float32)
        most = gl.convert_layout(gl.max(v, 1), widest.type.layout, assert_trivial=True)
        wider = gl.maximum(widest, most)
        inverse_wide = 2048 / wider
        narrowed = gl.where(wider == widest, 1.0, widest * inverse_wide * 0.00048828125)
        keep = (keep * narrowed[:, None])[:, None, :]
        widest = wider
        share = gl.convert_layout(inverse_wide, most_layout, assert_trivial=True)
        p = p * (v * share[:, None])[:, :, None]
        weights = as_operand(p.to(gl.float16), W, T, N, right)
        vl0, vl1, vl2, vl3, vh0, vh1, vh2, vh3 = _widen_values(
            values.index(slot).permute([0, 2, 1]).load(left)
        )
        al0 = mma_v2(vl0, weights, al0 * keep)
        al1 = mma_v2(vl1, weights, al1 * keep)
        al2 = mma_v2(vl2, weights, al2 * keep)
        al3 = mma_v2(vl3, weights, al3 * keep)
        ah0 = mma_v2(vh0, weights, ah0 * keep)
        ah1 = mma_v2(vh1, weights, ah1 * keep)
        ah2 = mma_v2(vh2, weights, ah2 * keep)
        ah3 = mma_v2(vh3, weights, ah3 * keep)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    async_copy.wait_group(0)
    gdc_launch_dependents()
    # A head's runs lie together.
    run = pair.to(gl.int64) * runs + first_run + split
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    w = gl.arange(0, W, gl.SliceLayout(1, by_row))[:, None]
    row = gl.arange(0, N, gl.SliceLayout(0, by_row))[None, :]
    stats_at = stats + run * ROWS * 2 + (w.to(gl.int64) * runs * ROWS + row) * 2
    gl.store(stats_at, top, mask=w * 0 + row < ROWS)
    gl.store(stats_at + 1, gl.sum(total, 1), mask=w * 0 + row < ROWS)
    part += run * ROWS * D
    step = runs.to(gl.int64) * ROWS * D
    under = gl.sum(least, 1)[:, None, :]
    share = gl.convert_layout(widest * 0.00048828125, most_layout, assert_trivial=True)
    share = gl.convert_layout(share[:, None], by_row)[:, None, :]
    _store_plane(al0, share, under, part, step, ROWS, 0, D, W, H, N, mma)
    _store_plane(al1, share, under, part, step, ROWS, 1, D, W, H, N, mma)
    _store_plane(al2, share, under, part, step, ROWS, 2, D, W, H, N, mma)
    _store_plane(al3, share, under, part, step, ROWS, 3, D, W, H, N, mma)
    _store_plane(ah0, share, under, part, step, ROWS, D // 2, D, W, H, N, mma)
    _store_plane(ah1, share, under, part, step, ROWS, D // 2 + 1, D, W, H, N, mma)
    _store_plane(ah2, share, under, part, step, ROWS, D // 2 + 2, D, W, H, N, mma)
    _store_plane(ah3, share, under, part, step, ROWS, D // 2 + 3, D, W, H, N, mma)


@gluon.jit
def _copy_angles(base, stride, first, last, slot, memory, T: gl.constexpr, WIDTH: gl.constexpr,
                 cp: gl.constexpr):  # fmt: skip
    """Starts the copy of a tile's cosines or sines."""
    t = gl.arange(0, T, gl.SliceLayout(1, cp))[:, None]
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, cp))[None, :]
    from_ = base + first.to(gl.int64) * stride
    inside = t + d * 0 < last - first
    async_copy.async_copy_global_to_shared(memory.index(slot), from_ + (t * stride + d), inside)
