"""Device code, in Triton: decode attention over keys that are turned or int4, and the last pass.

`attend_turned` serves every storage, with or without angles, wherever it lies; what needs no
turning and is aligned goes faster through `gpu_decode_stored`, and most of int4 through
`gpu_decode_int4`. All leave for each run of keys the
unscaled output, the maximum and the sum of its softmax, with scores in units of log2. `finish`
merges the runs, and turns saved scores into the attention that each key received.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DENSE: tl.constexpr = tl.constexpr(0)
INT8: tl.constexpr = tl.constexpr(1)
INT4: tl.constexpr = tl.constexpr(2)


@triton.jit
def _run(n, lengths, starts, b, split, splits, GRAIN: tl.constexpr):
    """The keys `first <= j < last` of a split of row `b`."""
    start = 0
    length = n
    if lengths is not None:
        length = tl.load(lengths + b)
    if starts is not None:
        start = tl.load(starts + b)
        length = tl.minimum(length, n - start)
    length = tl.minimum(length, n)
    per = tl.cdiv(tl.cdiv(length, splits), GRAIN) * GRAIN
    first = tl.minimum(split * per, length)
    return start + first, start + tl.minimum(first + per, length)


@triton.jit
def _small(x, LESS: tl.constexpr):
    """x - LESS in fp32, for x from 0 to 15, by way of 2**23: conversions have a slow pipe."""
    return (x | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + LESS)


@triton.jit
def _read(base, scale, mean, row, scale_row, j, inside, c, KIND: tl.constexpr, D: tl.constexpr,
          GROUP: tl.constexpr):  # fmt: skip
    """Channels `c` of the keys `j`, in fp32; int8 without its scales, which scores take."""
    seen = inside[:, None]
    if KIND == INT4:
        byte = tl.load(base + j[:, None] * row + (c % (D // 2))[None, :], mask=seen, other=0)
        code = (byte.to(tl.int32) >> (4 * (c // (D // 2)))[None, :]) & 15
        by = tl.load(scale + j[:, None] * scale_row + (c // GROUP)[None, :], mask=seen, other=0)
        return (code - 8).to(tl.float32) * by.to(tl.float32) + tl.load(mean + c)[None, :]
    else:
        x = tl.load(base + j[:, None] * row + c[None, :], mask=seen, other=0)
        return x.to(tl.float32)


@triton.jit
def _turned(x, base, scale, mean, cos, sin, row, scale_row, angle_row, j, inside, c,
            KIND: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, TURNED: tl.constexpr,
            INTERLEAVED: tl.constexpr):  # fmt: skip
    """`x`, the channels `c` of some keys, turned with the partners of those channels."""
    if INTERLEAVED:
        pair = c // 2
        partner = c ^ 1
        sign = tl.where(c % 2 == 0, -1.0, 1.0)
    else:
        pair = c % (TURNED // 2)
        partner = tl.where(c < TURNED // 2, c + TURNED // 2, c - TURNED // 2)
        sign = tl.where(c < TURNED // 2, -1.0, 1.0)
    turns = c < TURNED
    partner = tl.where(turns, partner, c)
    other = _read(base, scale, mean, row, scale_row, j, inside, partner, KIND, D, GROUP)
    seen = inside[:, None] & turns[None, :]
    at = j[:, None] * angle_row + pair[None, :]
    by_cos = tl.load(cos + at, mask=seen, other=1.0)
    by_sin = tl.load(sin + at, mask=seen, other=0.0)
    return x * by_cos + other * (by_sin * sign[None, :])


@triton.jit(do_not_specialize=["n", "runs", "first_run", "scores_first", "scores_keys"])
def attend_turned(
    q, key, value, key_scale, value_scale, value_least, mean, cos, sin, mask, lengths, starts,
    part, stats, scores, factor, softcap, n, runs, first_run, scores_first, kv_heads,
    q_batch, q_head, q_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    ks_batch, ks_head, ks_row, vs_batch, vs_head, vs_row, vl_batch, vl_head, vl_row,
    mean_batch, mean_head, angle_row, mask_row, scores_keys,
    KIND: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    GROUP: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A run of keys; grid (runs of this launch, batch * kv_heads)."""
    ROWS: tl.constexpr = G * M
    H: tl.constexpr = D // 2
    dtype: tl.constexpr = q.dtype.element_ty
    # Codes are exact in either; bf16 has fp32's range, which weights times scales may need.
    wide: tl.constexpr = dtype if KIND == DENSE else tl.bfloat16
    split = tl.program_id(0)
    pair = tl.program_id(1)
    b = (pair // kv_heads).to(tl.int64)
    kv = (pair % kv_heads).to(tl.int64)
    first, last = _run(n, lengths, starts, b, split, tl.num_programs(0), 16)
    q += b * q_batch + kv * G * q_head
    key += b * key_batch + kv * key_head
    value += b * value_batch + kv * value_head
    if KIND != DENSE:
        key_scale += b * ks_batch + kv * ks_head
        value_scale += b * vs_batch + kv * vs_head
    if KIND == INT4:
        value_least += b * vl_batch + kv * vl_head
        mean += b * mean_batch + kv * mean_head
    r = tl.arange(0, PADDED)
    low = tl.arange(0, H)
    rows_at = (r // M) * q_head + (r % M) * q_row
    q_low = tl.load(q + rows_at[:, None] + low[None, :], mask=r[:, None] < ROWS, other=0.0)
    q_high = tl.load(q + rows_at[:, None] + (low + H)[None, :], mask=r[:, None] < ROWS, other=0.0)
    top = tl.full([PADDED], -float("inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    least = tl.zeros([PADDED], tl.float32)
    acc_low = tl.zeros([PADDED, H], tl.float32)
    acc_high = tl.zeros([PADDED, H], tl.float32)
    if KIND == INT4:
        mean_low = tl.load(mean + low)
        mean_high = tl.load(mean + H + low)
    for from_ in range(first, last, BLOCK):
        t = from_ + tl.arange(0, BLOCK)
        inside = t < last
        j = t.to(tl.int64)
        if KIND == INT4 and TURNED == D and not INTERLEAVED:
            # Both halves of a pair lie in one byte.
            byte = tl.load(
                key + j[:, None] * key_row + low[None, :], mask=inside[:, None], other=0
            ).to(tl.int32)
            x_low = _small(byte & 15, 8)
            x_high = _small(byte >> 4, 8)
            # One load a key and group: by channel, each of its threads would load it anew.
            scale_low = tl.zeros([BLOCK, H], tl.float32)
            scale_high = tl.zeros([BLOCK, H], tl.float32)
            for group in tl.static_range(max(1, H // GROUP)):
                here = (low // GROUP == group)[None, :]
                by = key_scale + j * ks_row + group
                one = tl.load(by, mask=inside, other=0).to(tl.float32)
                scale_low = tl.where(here, one[:, None], scale_low)
                one = tl.load(by + H // GROUP, mask=inside, other=0).to(tl.float32)
                scale_high = tl.where(here, one[:, None], scale_high)
            x_low = x_low * scale_low + mean_low[None, :]
            x_high = x_high * scale_high + mean_high[None, :]
        else:
            x_low = _read(key, key_scale, mean, key_row, ks_row, j, inside, low, KIND, D, GROUP)
            x_high = _read(
                key, key_scale, mean, key_row, ks_row, j, inside, low + H, KIND, D, GROUP
            )
        if TURNED == D and not INTERLEAVED:
            turn = j[:, None] * angle_row + low[None, :]
            by_cos = tl.load(cos + turn, mask=inside[:, None], other=1.0)
            by_sin = tl.load(sin + turn, mask=inside[:, None], other=0.0)
            k_low = x_low * by_cos - x_high * by_sin
            k_high = x_high * by_cos + x_low * by_sin
        elif TURNED > 0:
            k_low = _turned(
                x_low, key, key_scale, mean, cos, sin, key_row, ks_row, angle_row, j, inside, low,
                KIND, D, GROUP, TURNED, INTERLEAVED,
            )  # fmt: skip
            k_high = _turned(
                x_high, key, key_scale, mean, cos, sin, key_row, ks_row, angle_row, j, inside,
                low + H, KIND, D, GROUP, TURNED, INTERLEAVED,
            )  # fmt: skip
        else:
            k_low = x_low
            k_high = x_high
        s = tl.dot(q_low, tl.trans(k_low.to(dtype)))
        s = tl.dot(q_high, tl.trans(k_high.to(dtype)), s) * factor
        if KIND == INT8:
            s *= tl.load(key_scale + j * ks_row, mask=inside, other=0).to(tl.float32)[None, :]
        if softcap is not None:
            # s is in units of softcap here; tanh(s) = 1 - 2 / (exp(2 s) + 1).
            s = (softcap * 1.4426950408889634) * (1 - 2 / (tl.exp2(s * 2.8853900817779268) + 1))
        if mask is not None:
            mask_at = (r % M)[:, None] * mask_row + j[None, :]
            extra = tl.load(mask + mask_at, mask=inside[None, :], other=0.0)
            s += extra.to(tl.float32) * 1.4426950408889634
        s = tl.where(inside[None, :], s, -float("inf"))
        if scores is not None:
            key_at = pair.to(tl.int64) * scores_keys + scores_first + j
            score_at = key_at[None, :] * ROWS + r[:, None]
            tl.store(
                scores + score_at,
                s,
                mask=(r < ROWS)[:, None] & inside[None, :],
                eviction_policy="evict_last",
            )
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        keep = tl.exp2(top - base)
        p = tl.exp2(s - base[:, None])
        total = total * keep + tl.sum(p, 1)
        top = new
        if KIND == INT4:
            v = tl.load(
                value + j[:, None] * value_row + low[None, :], mask=inside[:, None], other=0
            ).to(tl.int32)
            v_low = _small(v & 15, 0).to(wide)
            v_high = _small(v >> 4, 0).to(wide)
            under = tl.load(value_least + j * vl_row, mask=inside, other=0).to(tl.float32)
            least = least * keep + tl.sum(p * under[None, :], 1)
        else:
            value_at = value + j[:, None] * value_row + low[None, :]
            v_low = tl.load(value_at, mask=inside[:, None], other=0).to(wide)
            v_high = tl.load(value_at + H, mask=inside[:, None], other=0).to(wide)
        if KIND != DENSE:
            p *= tl.load(value_scale + j * vs_row, mask=inside, other=0).to(tl.float32)[None, :]
        weights = p.to(wide)
        acc_low = tl.dot(weights, v_low, acc_low * keep[:, None])
        acc_high = tl.dot(weights, v_high, acc_high * keep[:, None])
        if KIND != DENSE and dtype == tl.float16:
            # What bf16 rounds off of the weights.
            rest = (p - weights.to(tl.float32)).to(wide)
            acc_low = tl.dot(rest, v_low, acc_low)
            acc_high = tl.dot(rest, v_high, acc_high)
    gdc_launch_dependents()
    run = (pair.to(tl.int64) * runs + first_run + split) * ROWS
    real = r < ROWS
    tl.store(stats + (run + r) * 2, top, mask=real)
    tl.store(stats + (run + r) * 2 + 1, total, mask=real)
    to = part + (run + r)[:, None] * D + low[None, :]
    tl.store(to, acc_low + least[:, None], mask=real[:, None])
    tl.store(to + H, acc_high + least[:, None], mask=real[:, None])


@triton.jit(do_not_specialize=["runs", "n"])
def finish(
    part, stats, sink, out, lse, scores, received, lengths, starts, runs, n, kv_heads,
    M: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    C: tl.constexpr, RUNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (batch * kv_heads, rows * D / C [+ chunks of keys]).

    A block merges C channels of a row's output, or makes what CHUNK keys received.
    """
    ROWS: tl.constexpr = G * M
    pair = tl.program_id(0)
    kv = pair % kv_heads
    job = tl.program_id(1)
    whole = pair.to(tl.int64) * runs * ROWS
    i = tl.arange(0, RUNS)
    # It is launched while the kernel before it still runs, and goes on once that has ended.
    gdc_wait()
    SHARES: tl.constexpr = D // C
    if job < ROWS * SHARES:
        row = job // SHARES
        top = -float("inf")
        if sink is not None:
            top = tl.load(sink + kv * G + row // M).to(tl.float32) * 1.4426950408889634
        total = tl.exp2(top - tl.where(top == -float("inf"), 0.0, top))
        d = job % SHARES * C + tl.arange(0, C)
        acc = tl.zeros([C], tl.float32)
        for first in range(0, runs, RUNS):
            seen = first + i < runs
            at = whole + (first + i) * ROWS + row
            most = tl.load(stats + at * 2, mask=seen, other=-float("inf"))
            sums = tl.load(stats + at * 2 + 1, mask=seen, other=0.0)
            x = tl.load(part + at[:, None] * D + d[None, :], mask=seen[:, None], other=0.0)
            new = tl.maximum(top, tl.max(most, 0))
            base = tl.where(new == -float("inf"), 0.0, new)
            keep = tl.exp2(top - base)
            share = tl.exp2(most - base)
            total = total * keep + tl.sum(sums * share, 0)
            acc = acc * keep + tl.sum(x * share[:, None], 0)
            top = new
        base = tl.where(top == -float("inf"), 0.0, top)
        place = pair.to(tl.int64) * ROWS + row
        found = tl.where(total > 0, (base + tl.log2(total)) * 0.6931471805599453, -float("inf"))
        tl.store(lse + place, found, mask=job % SHARES == 0)
        acc = acc * tl.where(total > 0, 1 / total, 0.0)
        tl.store(out + place * D + d, acc.to(out.dtype.element_ty))
    elif received is not None:
        r = tl.arange(0, PADDED)
        # The scores are on their way while the rows' sums are made.
        j = (job - ROWS * SHARES) * CHUNK + tl.arange(0, CHUNK)
        seen = j < n
        if lengths is not None:
            b = pair // kv_heads
            start = 0
            if starts is not None:
                start = tl.load(starts + b)
            seen = seen & (j >= start) & (j < start + tl.load(lengths + b))
        score_at = (pair.to(tl.int64) * n + j)[:, None] * ROWS + r[None, :]
        s = tl.load(
            scores + score_at,
            mask=seen[:, None] & (r < ROWS)[None, :],
            other=-float("inf"),
            eviction_policy="evict_first",
        )
        tops = tl.full([PADDED], -float("inf"), tl.float32)
        if sink is not None:
            tops = tl.load(sink + kv * G + r // M, mask=r < ROWS, other=0.0).to(tl.float32)
            tops *= 1.4426950408889634
        totals = tl.exp2(tops - tl.where(tops == -float("inf"), 0.0, tops))
        # Several at a time, but no more than registers hold.
        SOME: tl.constexpr = RUNS if RUNS * PADDED <= 1024 else 1024 // PADDED
        some = tl.arange(0, SOME)
        for first in range(0, runs, SOME):
            known = (r < ROWS)[:, None] & (first + some < runs)[None, :]
            at = whole + (first + some)[None, :] * ROWS + r[:, None]
            most = tl.load(stats + at * 2, mask=known, other=-float("inf"))
            sums = tl.load(stats + at * 2 + 1, mask=known, other=0.0)
            tallest = tl.maximum(tops, tl.max(most, 1))
            bases = tl.where(tallest == -float("inf"), 0.0, tallest)
            shares = tl.exp2(most - bases[:, None])
            totals = totals * tl.exp2(tops - bases) + tl.sum(sums * shares, 1)
            tops = tallest
        # A row that saw nothing gives nothing.
        whole_sum = tl.where(totals > 0, tops + tl.log2(totals), float("inf"))
        got = tl.sum(tl.exp2(s - whole_sum[None, :]), 1)
        tl.store(received + pair.to(tl.int64) * n + j, got, mask=j < n)
