"""Device code in Triton: attention over tile lists, its gradients, and what keys receive.

Imported only where a kernel is launched, since it needs triton. The arguments that all kernels
share, beside tensors and their strides in elements:

    low, high: int32 `(RANGES, n)`, contiguous: query i sees key j iff some range r has
        `low[r, i] <= j < high[r, i]`.
    ptr, items: int32; the tiles of row (or column) t of tiles are the ranges
        `ptr[t] <= r < ptr[t + 1]`, each `items[r] = (first tile, last + 1, first full, last full
        + 1)`, where in a full tile every pair is seen.
    inner, outer: a score, times log2(e), is `product * outer`, or with CAP
        `tanh(product * inner) * outer`. `outer` must not be negative.
    D, DV: head_dim and value_dim; BD and BDV are those padded to powers of two.
    PRECISION: what `tl.dot` does with float32.

lse is float32 `(batch, Hq, n)`, contiguous, in natural logarithms. All arithmetic beside the
products' operands is float32. A program's result depends on nothing but its inputs: no atomics.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def rows(
    base, first, stride, end, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Rows `first` to `first + ROWS - 1` as `[ROWS, BD]`: zeros past column D.

    With TAIL also zeros from row `end` on; without it those must exist.
    """
    i = tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    # The tile's place in 64 bits, places within it in 32.
    where = base + tl.cast(first, tl.int64) * stride + (i[:, None] * stride + d[None, :])
    if TAIL:
        inside = (first + i < end)[:, None]
        if D != BD:
            inside = inside & (d < D)[None, :]
        x = tl.load(where, mask=inside, other=0.0)
    elif D != BD:
        x = tl.load(where, mask=(d < D)[None, :], other=0.0)
    else:
        x = tl.load(where)
    return x


@triton.jit
def store_rows(
    base, first, stride, end, x, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    i = tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    where = base + tl.cast(first, tl.int64) * stride + (i[:, None] * stride + d[None, :])
    inside = (first + i < end)[:, None] & (d < D)[None, :]
    tl.store(where, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def seen(low, high, i, j, n, RANGES: tl.constexpr):
    """Which queries i see which keys j; their shapes broadcast to the tile's."""
    inside = i < n
    here = tl.load(low + i, mask=inside, other=0) <= j
    here = here & (j < tl.load(high + i, mask=inside, other=0))
    for r in tl.static_range(1, RANGES):
        more = tl.load(low + r * n + i, mask=inside, other=0) <= j
        more = more & (j < tl.load(high + r * n + i, mask=inside, other=0))
        here = here | more
    return here


@triton.jit
def span(items, r):
    """Range r: first tile, last + 1, first full, last full + 1."""
    at = items + 4 * r
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def tanh(x):
    """By its series near 0, where 1 - 2 / (exp(2x) + 1) loses what it shows elsewhere."""
    y = x * x
    near = x * (1 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315))))
    far = 1 - 2 / (tl.exp2(tl.minimum(x * (2 * LOG2E), 126.0)) + 1)
    return tl.where(tl.abs(x) < 0.15, near, far)


@triton.jit
def weights_lse(lse, i, n):
    """lse in powers of two; plus infinity, so no weight, for queries that see nothing or aren't."""
    x = tl.load(lse + i, mask=i < n, other=float("inf"))
    return tl.where(x == float("-inf"), float("inf"), x * LOG2E)


@triton.jit
def forward_step(
    state, q, k, v, k_n, v_n, tile, low, high, i, n, m, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, TK: tl.constexpr,
    RANGES: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    acc, top, total = state
    keys = rows(k, tile * TK, k_n, m, TK, D, BD, MASKED)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if CAP:
        s = tanh(s * inner)
    if MASKED:
        j = tile * TK + tl.arange(0, TK)
        s = tl.where(seen(low, high, i[:, None], j[None, :], n, RANGES), s * outer, float("-inf"))
        highest = tl.maximum(top, tl.max(s, 1))
        # Minus infinity less minus infinity is NaN: a query that has seen nothing stays at 0.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(s - base[:, None])
    else:
        highest = tl.maximum(top, tl.max(s, 1) * outer)
        base = highest
        p = tl.exp2(s * outer - base[:, None])
    shrink = tl.exp2(top - base)
    values = rows(v, tile * TK, v_n, m, TK, DV, BDV, MASKED)
    acc = tl.dot(
        p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION
    )  # fmt: skip
    return acc, highest, total * shrink + tl.sum(p, 1)


@triton.jit(
    do_not_specialize=["n", "m", "heads", "groups", "tiles"],
    do_not_specialize_on_alignment=["low", "high"],
)
def forward(
    q, k, v, out, lse, low, high, ptr, items,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    n, m, heads, groups, tiles, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    TQ: tl.constexpr, TK: tl.constexpr, RANGES: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Heads innermost: those that share K and V run side by side. Later tiles, which in a causal
    # pattern see most, come first.
    pairs = tl.num_programs(0) // tiles
    tile = tiles - 1 - tl.program_id(0) // pairs
    pair = tl.program_id(0) % pairs
    b = (pair // heads).to(tl.int64)
    h = (pair % heads).to(tl.int64)
    q += b * q_b + h * q_h
    k += b * k_b + h // groups * k_h
    v += b * v_b + h // groups * v_h
    i = tile * TQ + tl.arange(0, TQ)
    x = rows(q, tile * TQ, q_n, n, TQ, D, BD, True)
    acc = tl.zeros([TQ, BDV], tl.float32)
    top = tl.full([TQ], float("-inf"), tl.float32)
    total = tl.zeros([TQ], tl.float32)
    for r in range(tl.load(ptr + tile), tl.load(ptr + tile + 1)):
        first, last, full, end = span(items, r)
        left = full - first
        for t in range(left + last - end):
            at = tl.where(t < left, first + t, end + t - left)
            acc, top, total = forward_step(
                (acc, top, total), x, k, v, k_n, v_n, at, low, high, i, n, m, inner, outer,
                D, DV, BD, BDV, TK, RANGES, CAP, True, PRECISION,
            )  # fmt: skip
        for at in range(full, end):
            acc, top, total = forward_step(
                (acc, top, total), x, k, v, k_n, v_n, at, low, high, i, n, m, inner, outer,
                D, DV, BD, BDV, TK, RANGES, CAP, False, PRECISION,
            )  # fmt: skip
    blind = total == 0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    store_rows(out + b * o_b + h * o_h, tile * TQ, o_n, n, acc, TQ, DV, BDV)
    total = tl.where(blind, float("-inf"), (top + tl.log2(total)) / LOG2E)
    tl.store(lse + pair.to(tl.int64) * n + i, total, mask=i < n)


@triton.jit(do_not_specialize=["n", "heads", "tiles"])
def pull(
    grad_out, out, grad_lse, delta, g_b, g_h, g_n, o_b, o_h, o_n, n, heads, tiles,
    DV: tl.constexpr, BDV: tl.constexpr, TQ: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """delta = dout . out - dlse: what a query's weights pull back, for all its keys alike."""
    tile = tl.program_id(0) % tiles
    pair = tl.program_id(0) // tiles
    b = (pair // heads).to(tl.int64)
    h = (pair % heads).to(tl.int64)
    i = tile * TQ + tl.arange(0, TQ)
    g = rows(grad_out + b * g_b + h * g_h, tile * TQ, g_n, n, TQ, DV, BDV, True)
    o = rows(out + b * o_b + h * o_h, tile * TQ, o_n, n, TQ, DV, BDV, True)
    x = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    place = pair.to(tl.int64) * n + i
    if LSE:
        x -= tl.load(grad_lse + place, mask=i < n, other=0.0)
    tl.store(delta + place, x, mask=i < n)


@triton.jit
def keys_step(
    state, x, y, q, g, q_n, g_n, lse, delta, tile, low, high, j, n, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, TQ: tl.constexpr,
    RANGES: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Keys are the rows here, so that both products that sum over queries take P and dS as they lie.
    dk, dv = state
    i = tile * TQ + tl.arange(0, TQ)
    queries = rows(q, tile * TQ, q_n, n, TQ, D, BD, MASKED)
    s = tl.dot(x, tl.trans(queries), input_precision=PRECISION)
    if CAP:
        s = tanh(s * inner)
    p = tl.exp2(s * outer - weights_lse(lse, i, n)[None, :])
    if MASKED:
        p = tl.where(seen(low, high, i[None, :], j[:, None], n, RANGES), p, 0.0)
    grad = rows(g, tile * TQ, g_n, n, TQ, DV, BDV, MASKED)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    dp = tl.dot(y, tl.trans(grad), input_precision=PRECISION)
    ds = p * (dp - tl.load(delta + i, mask=i < n, other=0.0)[None, :])
    if CAP:
        ds = ds * (1 - s * s)
    dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=["n", "m", "heads", "groups", "tiles"],
    do_not_specialize_on_alignment=["low", "high"],
)
def backward_keys(
    grad_out, q, k, v, dk, dv, lse, delta, low, high, ptr, items,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    n, m, heads, groups, tiles, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    TQ: tl.constexpr, TK: tl.constexpr, RANGES: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, over the queries and query heads that see it; heads are KV."""
    # Early keys, which in a causal pattern are seen most, come first.
    pairs = tl.num_programs(0) // tiles
    tile = tl.program_id(0) // pairs
    pair = tl.program_id(0) % pairs
    b = (pair // heads).to(tl.int64)
    h = (pair % heads).to(tl.int64)
    j = tile * TK + tl.arange(0, TK)
    x = rows(k + b * k_b + h * k_h, tile * TK, k_n, m, TK, D, BD, True)
    y = rows(v + b * v_b + h * v_h, tile * TK, v_n, m, TK, DV, BDV, True)
    grad_k = tl.zeros([TK, BD], tl.float32)
    grad_v = tl.zeros([TK, BDV], tl.float32)
    for group in range(groups):
        head = h * groups + group
        q_at = q + b * q_b + head * q_h
        g_at = grad_out + b * g_b + head * g_h
        row = (b * heads * groups + head) * n
        for r in range(tl.load(ptr + tile), tl.load(ptr + tile + 1)):
            first, last, full, end = span(items, r)
            left = full - first
            for t in range(left + last - end):
                at = tl.where(t < left, first + t, end + t - left)
                grad_k, grad_v = keys_step(
                    (grad_k, grad_v), x, y, q_at, g_at, q_n, g_n, lse + row, delta + row, at,
                    low, high, j, n, inner, outer,
                    D, DV, BD, BDV, TQ, RANGES, CAP, True, PRECISION,
                )  # fmt: skip
            for at in range(full, end):
                grad_k, grad_v = keys_step(
                    (grad_k, grad_v), x, y, q_at, g_at, q_n, g_n, lse + row, delta + row, at,
                    low, high, j, n, inner, outer,
                    D, DV, BD, BDV, TQ, RANGES, CAP, False, PRECISION,
                )  # fmt: skip
    store_rows(dk + b * dk_b + h * dk_h, tile * TK, dk_n, m, grad_k * scale, TK, D, BD)
    store_rows(dv + b * dv_b + h * dv_h, tile * TK, dv_n, m, grad_v, TK, DV, BDV)


@triton.jit
def queries_step(
    dq, x, g, k, v, k_n, v_n, lse, delta, tile, low, high, i, n, m, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, TK: tl.constexpr,
    RANGES: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    keys = rows(k, tile * TK, k_n, m, TK, D, BD, MASKED)
    s = tl.dot(x, tl.trans(keys), input_precision=PRECISION)
    if CAP:
        s = tanh(s * inner)
    p = tl.exp2(s * outer - lse[:, None])
    if MASKED:
        j = tile * TK + tl.arange(0, TK)
        p = tl.where(seen(low, high, i[:, None], j[None, :], n, RANGES), p, 0.0)
    values = rows(v, tile * TK, v_n, m, TK, DV, BDV, MASKED)
    ds = p * (tl.dot(g, tl.trans(values), input_precision=PRECISION) - delta[:, None])
    if CAP:
        ds = ds * (1 - s * s)
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=["n", "m", "heads", "groups", "tiles"],
    do_not_specialize_on_alignment=["low", "high"],
)
def backward_queries(
    grad_out, q, k, v, dq, lse, delta, low, high, ptr, items,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, dq_b, dq_h, dq_n,
    n, m, heads, groups, tiles, scale, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    TQ: tl.constexpr, TK: tl.constexpr, RANGES: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries; the order of programs is that of `forward`."""
    pairs = tl.num_programs(0) // tiles
    tile = tiles - 1 - tl.program_id(0) // pairs
    pair = tl.program_id(0) % pairs
    b = (pair // heads).to(tl.int64)
    h = (pair % heads).to(tl.int64)
    k += b * k_b + h // groups * k_h
    v += b * v_b + h // groups * v_h
    i = tile * TQ + tl.arange(0, TQ)
    x = rows(q + b * q_b + h * q_h, tile * TQ, q_n, n, TQ, D, BD, True)
    g = rows(grad_out + b * g_b + h * g_h, tile * TQ, g_n, n, TQ, DV, BDV, True)
    row = pair.to(tl.int64) * n
    level = weights_lse(lse + row, i, n)
    back = tl.load(delta + row + i, mask=i < n, other=0.0)
    acc = tl.zeros([TQ, BD], tl.float32)
    for r in range(tl.load(ptr + tile), tl.load(ptr + tile + 1)):
        first, last, full, end = span(items, r)
        left = full - first
        for t in range(left + last - end):
            at = tl.where(t < left, first + t, end + t - left)
            acc = queries_step(
                acc, x, g, k, v, k_n, v_n, level, back, at, low, high, i, n, m, inner, outer,
                D, DV, BD, BDV, TK, RANGES, CAP, True, PRECISION,
            )  # fmt: skip
        for at in range(full, end):
            acc = queries_step(
                acc, x, g, k, v, k_n, v_n, level, back, at, low, high, i, n, m, inner, outer,
                D, DV, BD, BDV, TK, RANGES, CAP, False, PRECISION,
            )  # fmt: skip
    store_rows(dq + b * dq_b + h * dq_h, tile * TQ, dq_n, n, acc * scale, TQ, D, BD)


@triton.jit
def received_step(
    acc, x, q, q_h, q_n, lse, tile, low, high, j, n, inner, outer,
    D: tl.constexpr, BD: tl.constexpr, TQ: tl.constexpr, PACK: tl.constexpr,
    RANGES: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Row r of the tile is query r % POSITIONS, from `tile * POSITIONS` on, of head r // POSITIONS.
    POSITIONS: tl.constexpr = TQ // PACK
    row = tl.arange(0, TQ)
    i = tile * POSITIONS + row % POSITIONS
    head = row // POSITIONS
    d = tl.arange(0, BD)
    # The place of a head and of its tile in 64 bits, places within that in 32.
    start = q + tl.cast(head, tl.int64) * q_h + tl.cast(tile * POSITIONS, tl.int64) * q_n
    where = (start + row % POSITIONS * q_n)[:, None] + d[None, :]
    if MASKED:
        queries = tl.load(where, mask=(i < n)[:, None] & (d < D)[None, :], other=0.0)
    elif D != BD:
        queries = tl.load(where, mask=(d < D)[None, :], other=0.0)
    else:
        queries = tl.load(where)
    s = tl.dot(queries, tl.trans(x), input_precision=PRECISION)
    if CAP:
        s = tanh(s * inner)
    level = tl.load(lse + head * n + i, mask=i < n, other=float("inf"))
    # Queries that see nothing, and those that aren't, weigh nothing.
    level = tl.where(level == float("-inf"), float("inf"), level * LOG2E)
    p = tl.exp2(s * outer - level[:, None])
    if MASKED:
        p = tl.where(seen(low, high, i[:, None], j[None, :], n, RANGES), p, 0.0)
    return acc + p


@triton.jit(
    do_not_specialize=["n", "m", "heads", "groups", "tiles"],
    do_not_specialize_on_alignment=["low", "high"],
)
def received(
    q, k, lse, out, low, high, ptr, items, q_b, q_h, q_n, k_b, k_h, k_n,
    n, m, heads, groups, tiles, inner, outer,
    D: tl.constexpr, BD: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, PACK: tl.constexpr,
    RANGES: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of keys receives from all queries and query heads; heads are KV.

    PACK heads of a group share a tile of queries, so that the edges of a mask fall on few tiles.
    """
    pairs = tl.num_programs(0) // tiles
    tile = tl.program_id(0) // pairs
    pair = tl.program_id(0) % pairs
    b = (pair // heads).to(tl.int64)
    h = (pair % heads).to(tl.int64)
    j = tile * TK + tl.arange(0, TK)
    x = rows(k + b * k_b + h * k_h, tile * TK, k_n, m, TK, D, BD, True)
    # A place of the tile has a sum of its own: no exchange between threads before the end.
    acc = tl.zeros([TQ, TK], tl.float32)
    for group in range(0, groups, PACK):
        head = h * groups + group
        q_at = q + b * q_b + head * q_h
        row = (b * heads * groups + head) * n
        for r in range(tl.load(ptr + tile), tl.load(ptr + tile + 1)):
            first, last, full, end = span(items, r)
            left = full - first
            for t in range(left + last - end):
                at = tl.where(t < left, first + t, end + t - left)
                acc = received_step(
                    acc, x, q_at, q_h, q_n, lse + row, at, low, high, j, n, inner, outer,
                    D, BD, TQ, PACK, RANGES, CAP, True, PRECISION,
                )  # fmt: skip
            for at in range(full, end):
                acc = received_step(
                    acc, x, q_at, q_h, q_n, lse + row, at, low, high, j, n, inner, outer,
                    D, BD, TQ, PACK, RANGES, CAP, False, PRECISION,
                )  # fmt: skip
    tl.store(out + pair.to(tl.int64) * m + j, tl.sum(acc, 0), mask=j < m)


@triton.jit(
    do_not_specialize=[
        *("lse_b", "lse_h", "lse_n", "more_b", "more_h", "more_n"), *("n", "heads", "tiles"),
    ]
)  # fmt: skip
def merge(
    out, lse, part, part_lse,
    out_b, out_h, out_n, lse_b, lse_h, lse_n, part_b, part_h, part_n, more_b, more_h, more_n,
    n, heads, tiles, DV: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a head: a part over other keys is taken into `out` and `lse`."""
    tile = tl.program_id(0)
    head = tile // tiles
    b = tl.cast(head // heads, tl.int64)
    h = tl.cast(head % heads, tl.int64)
    i = tl.cast((tile % tiles) * ROWS, tl.int64) + tl.arange(0, ROWS)
    d = tl.arange(0, BDV)
    live = i < n
    inside = live[:, None] & (d < DV)[None, :]
    out += b * out_b + h * out_h + i[:, None] * out_n + d[None, :]
    part += b * part_b + h * part_h + i[:, None] * part_n + d[None, :]
    lse += b * lse_b + h * lse_h + i * lse_n
    here = tl.load(lse, mask=live, other=-float("inf"))
    more = tl.load(part_lse + b * more_b + h * more_h + i * more_n, mask=live, other=-float("inf"))
    top = tl.maximum(here, more, propagate_nan=tl.PropagateNan.ALL)
    top = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp(here - top)
    other = tl.exp(more - top)
    total = weight + other
    unseen = total == 0.0
    total = tl.where(unseen, 1.0, total)
    # 0 * NaN is NaN: what stands in an empty side must not come in.
    x = tl.where((here == -float("inf"))[:, None], 0.0, tl.load(out, mask=inside).to(tl.float32))
    y = tl.where((more == -float("inf"))[:, None], 0.0, tl.load(part, mask=inside).to(tl.float32))
    x = x * (weight / total)[:, None] + y * (other / total)[:, None]
    tl.store(out, x.to(out.dtype.element_ty), mask=inside)
    tl.store(lse, tl.where(unseen, -float("inf"), top + tl.log(total)), mask=live)
