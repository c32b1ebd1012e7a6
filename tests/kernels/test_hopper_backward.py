"""The Hopper backward against the definition's gradients in float64, and its lists on a CPU."""

import math

import numpy as np
import pytest
import torch
from gpu_problems import BF16, FP16, PROBLEMS, lists_of, make, mask_of
from sass import resources

from attnspan.kernels import hopper_backward, nvrtc
from attnspan.kernels.hopper_backward_items import Shape, items_of
from attnspan.kernels.reference import reference
from attnspan.patterns import Causal, Documents, Longformer, Pattern, Sinks, SlidingWindow
from attnspan.testing import assert_accurate, magnitudes, make_qkv, poisoned_memory


def gradients(q, k, v, mask, scale, grad_out, grad_lse, compute):
    """out, lse and the gradients of q, k and v, of the definition in `compute`."""
    wide = tuple(x.detach().to(compute, copy=True).requires_grad_() for x in (q, k, v))
    out, lse = reference(*wide, mask, scale=scale, compute=compute, cast=False)
    total = (out * grad_out.to(compute)).sum()
    if grad_lse is not None:
        total = total + (torch.where(lse.isfinite(), lse, 0) * grad_lse.to(compute)).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(total, wide)


def check(
    q, k, v, pattern: Pattern, offset: int, scale: float | None = None, with_lse: bool = True
) -> None:
    """As near to float64 as the dtype allows, summed in either order; one repeats to the bit."""
    n, m = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    lists = lists_of(pattern, n, m, offset, "cuda")
    mask = mask_of(pattern, n, m, offset)
    generator = torch.Generator("cuda").manual_seed(1)
    grad_out = torch.empty_like(q).normal_(generator=generator)
    grad_lse = None
    if with_lse:
        grad_lse = torch.empty(q.shape[:3], device="cuda").normal_(generator=generator)
    given = q, k, v, mask, scale, grad_out, grad_lse
    out, lse, exact = gradients(*given, torch.float64)
    low = gradients(*given, q.dtype)[2]
    sizes = magnitudes(q, k, v, mask, scale=scale, grad_out=grad_out, grad_lse=grad_lse)[2:5]
    rest = grad_out, grad_lse, q, k, v, out.to(q.dtype), lse.float(), lists, scale
    with poisoned_memory():
        free = hopper_backward.backward(*rest)
        fixed = hopper_backward.backward(*rest, deterministic=True)
        again = hopper_backward.backward(*rest, deterministic=True)
    for got in (free, fixed):
        for name, *of in zip(("dq", "dk", "dv"), got, low, exact, sizes, strict=True):
            assert_accurate(*of, q.dtype, name)
    assert all(torch.equal(a, b) for a, b in zip(fixed, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(free[1:], fixed[1:], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "n", "m", "offset"), PROBLEMS, ids=str)
def test_patterns(pattern, n, m, offset) -> None:
    check(*make(n, m), pattern, offset)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (8, 2), (8, 1)], ids=str)
def test_heads_and_dtypes(heads, head_dim, dtype) -> None:
    check(*make(601, 601, heads, head_dim, dtype, batch=2), SlidingWindow(300) | Sinks(3), 0)


LONG = [  # pattern, length, heads, batch: keys that all see, or the last ones, are cut
    (SlidingWindow(100) | Sinks(3), 3001, (4, 4), 1),
    (SlidingWindow(100) | Sinks(3), 2501, (8, 2), 2),
    (Longformer(100, 20), 3001, (8, 2), 1),
    (Longformer(100, 20, right=50), 2001, (8, 2), 1),
    (Causal(), 2500, (4, 2), 1),
    (Causal(), 3001, (8, 8), 3),  # more tiles than places
    (SlidingWindow(400), 2000, (8, 1), 2),
]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("pattern", "n", "heads", "batch"), LONG, ids=str)
def test_items_that_are_cut(pattern, n, heads, batch, head_dim) -> None:
    check(*make(n, n, heads, head_dim, batch=batch), pattern, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [-0.1, 0.0, 1.0])
def test_scales(scale) -> None:
    check(*make(300, 300), SlidingWindow(150), 0, scale, with_lse=False)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_ring_turns_many_times(head_dim) -> None:
    """More tiles than places, across the ends of batches."""
    q, k, v = make(5000, 5000, (8, 8), head_dim, batch=3)
    pattern = SlidingWindow(200)
    lists = lists_of(pattern, 5000, 5000, 0)
    rows = hopper_backward.tile_q(head_dim)
    side = hopper_backward._side(head_dim, 8)
    tiles = 3 * 8 // side * -(-5000 // rows)
    assert hopper_backward._places(lists, rows, 3 * 8 // side, side, processors=132) < tiles / 2
    # Windows within documents of a thousand tokens: each is a problem small enough for the oracle.
    pattern = SlidingWindow(200) & Documents((1000,) * 5)
    lists = lists_of(pattern, 5000, 5000, 0)
    grad_out = torch.randn_like(q)
    parts = []
    for t in range(5):
        q1, k1, v1, g1 = (x[:, :, t * 1000 : (t + 1) * 1000] for x in (q, k, v, grad_out))
        mask = torch.ones(1000, 1000, dtype=torch.bool, device="cuda").tril().triu(-199)
        parts.append(gradients(q1, k1, v1, mask, 0.1, g1, None, torch.float32))
    out, lse = (torch.cat([part[i] for part in parts], 2) for i in range(2))
    with poisoned_memory():
        got = hopper_backward.backward(
            grad_out, None, q, k, v, out.to(BF16), lse.float(), lists, 0.1
        )
    for i in range(3):
        expected = torch.cat([part[2][i] for part in parts], 2)
        assert (got[i].float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.gpu
def test_strides_are_free() -> None:
    q, k, v = make(300, 500, batch=2)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    wide = torch.randn(2, 2, 1000, 136, dtype=BF16, device="cuda")
    wide[:, :, ::2, :128] = v
    check(q, k, wide[:, :, ::2, :128], SlidingWindow(150), 200)
    # One that no TMA descriptor can have.
    odd = torch.randn(2, 2, 500, 131, dtype=BF16, device="cuda")
    odd[..., 1:129] = v
    check(q, k, odd[..., 1:129], SlidingWindow(150), 200)


@pytest.mark.gpu
def test_an_expanded_gradient_is_taken() -> None:
    q, k, v = make(200, 200)
    lists = lists_of(SlidingWindow(100), 200, 200, 0)
    mask = torch.ones(200, 200, dtype=torch.bool, device="cuda").tril().triu(-99)
    one = torch.ones((), dtype=BF16, device="cuda").expand(q.shape)
    out, lse, exact = gradients(q, k, v, mask, 0.1, one, None, torch.float64)
    rest = q, k, v, out.to(BF16), lse.float(), lists, 0.1
    got = hopper_backward.backward(one, None, *rest)
    same = hopper_backward.backward(one.contiguous(), None, *rest, deterministic=True)
    assert torch.equal(got[2], same[2])
    assert (got[2].double() - exact[2]).norm() < 0.01 * exact[2].norm()


@pytest.mark.gpu
def test_memory_follows_the_window() -> None:
    peaks = []
    for n in (16384, 32768):
        q, k, v = make(n, n, (16, 8))
        lists = lists_of(SlidingWindow(512), n, n, 0)
        lse = torch.zeros(q.shape[:3], device="cuda")
        hopper_backward.backward(q, None, q, k, v, q, lse, lists, 0.1)  # the lists' own memory
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hopper_backward.backward(q, None, q, k, v, q, lse, lists, 0.1)
        torch.cuda.synchronize()
        gradients_alone = sum(x.nbytes for x in (q, k, v))
        peaks.append(torch.cuda.max_memory_allocated() - before - gradients_alone)
    rows = 16384 * (8 + 4 * 16 / 64)  # what grows: bounds, counters
    assert peaks[1] - peaks[0] < rows + 2**20


@pytest.mark.gpu
def test_it_runs_in_a_graph() -> None:
    q, k, v = make(700, 700)
    lists = lists_of(SlidingWindow(300), 700, 700, 0)
    mask = torch.ones(700, 700, dtype=torch.bool, device="cuda").tril().triu(-299)
    grad_out = torch.randn_like(q)
    out, lse, _ = gradients(q, k, v, mask, 0.1, grad_out, None, torch.float32)
    given = grad_out, None, q, k, v, out.to(BF16), lse, lists, 0.1
    expected = hopper_backward.backward(*given, deterministic=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = hopper_backward.backward(*given, deterministic=True)
    for x in got:
        x.zero_()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_what_it_lacks() -> None:
    q, k, v = make_qkv(4, 4, head_dim=64, dtype=BF16)
    assert "not on cpu" in (hopper_backward.lacks(q, k, v) or "")


@pytest.mark.parametrize(
    ("head_dim", "dtype", "ranges", "ordered", "spilled"),
    [(128, BF16, 1, False, 96), (128, BF16, 1, True, 96), (64, FP16, 2, False, 80)],
)
def test_it_compiles(head_dim, dtype, ranges, ordered, spilled, tmp_path) -> None:
    if nvrtc.lack():
        pytest.skip(f"not compiled: {nvrtc.lack()}")
    options = hopper_backward.options(head_dim, dtype, ranges, ordered)
    code, told = nvrtc.compile_source(hopper_backward.SOURCE, options)
    assert code[:4] == b"\x7fELF"
    # What is spilled is read once an item, outside of the loop over its tiles.
    assert max(stack for _, stack in resources(code, tmp_path).values()) <= spilled
    # ptxas tells so when it can't keep products in flight, which costs half the speed.
    assert "serialized" not in told


PATTERNS = [
    (SlidingWindow(1), 1000, 1000, 0),
    (SlidingWindow(400), 3000, 3000, 0),
    (SlidingWindow(400), 1000, 3000, 2000),
    (SlidingWindow(90), 2000, 200, 0),
    (SlidingWindow(300) | Sinks(4), 2000, 2000, 0),
    (Documents((100, 7, 1300, 65, 900), causal=False), 2500, 2500, 0),
    (~Causal(), 900, 900, 0),
]


@pytest.mark.parametrize(("pattern", "n", "m", "offset"), PATTERNS, ids=str)
@pytest.mark.parametrize("rows", [64, 128])
def test_no_item_waits_for_a_later_one(pattern, n, m, offset, rows) -> None:
    """A tile's place in the ring is free once no item that adds to it can still come."""
    lists = lists_of(pattern, n, m, offset, "cpu")
    reach = hopper_backward._reach(lists, rows)
    by_row = lists.rows(rows, hopper_backward.TILE_K)
    ptr, items = by_row.ptr.tolist(), by_row.items.tolist()
    seen = [
        [kt for a, b, *_ in items[ptr[t] : ptr[t + 1]] for kt in range(a, b)]
        for t in range(math.ceil(n / rows))
    ]
    for t in range(reach, len(seen)):
        assert max(seen[t - reach], default=-1) < min(seen[t], default=math.inf)
    if reach > 1:  # and it is not longer than that asks for
        firsts = [min(x, default=math.inf) for x in seen]
        lasts = [max(x, default=-1) for x in seen]
        assert any(
            max(lasts[: t - reach + 2], default=-1) >= min(firsts[t:])
            for t in range(reach - 1, len(seen))
        )


@pytest.mark.parametrize(("pattern", "n", "m", "offset"), PATTERNS, ids=str)
def test_rows_and_columns_agree(pattern, n, m, offset) -> None:
    """The kernel counts the parts of dQ that came by column against those due by row."""
    lists = lists_of(pattern, n, m, offset, "cpu")
    for rows in (64, 128):
        by_row, by_column = lists.rows(rows, 128), lists.columns(128, rows)
        met = [np.zeros((-(-n // rows), -(-m // 128)), int) for _ in range(2)]
        for grid, (ptr, items) in ((met[0], by_row), (met[1].T, by_column)):
            for t in range(len(ptr) - 1):
                for a, b, *_ in items[ptr[t] : ptr[t + 1]].tolist():
                    grid[t, a:b] += 1
        assert (met[0] == met[1]).all()
        assert met[0].max() <= 1


@pytest.mark.parametrize(("pattern", "n", "m", "offset"), PATTERNS, ids=str)
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("processors", [7, 132])
def test_items_have_each_pair_once(pattern, n, m, offset, free, processors) -> None:
    """Parts that are cut are as good as the whole, and nothing waits for a later item."""
    lists = lists_of(pattern, n, m, offset, "cpu")
    for rows, strips, side, group in ((64, 1, 8, 4), (64, 8, 1, 4), (128, 4, 1, 1), (64, 2, 2, 3)):
        shape = Shape(rows, 128, strips, side, group, processors, free)
        table, slots = items_of(lists, shape)
        ptr, ranges = lists.columns(128, rows)
        query_tiles, key_tiles = -(-n // rows), len(ptr) - 1
        seen = np.zeros((key_tiles, query_tiles), int)
        for kt in range(key_tiles):
            for a, b, *_ in ranges[ptr[kt] : ptr[kt + 1]].tolist():
                seen[kt, a:b] = 1
        met = np.zeros((strips * key_tiles * side, query_tiles, group), int)
        turns, last = [], {}
        for item, a, b, first, end, slot, part, parts in table.tolist():
            met[item, a:b, first:end] += 1
            assert (slot < 0) == (parts == 1)
            if slot >= 0:
                turns.append((slot, part, parts, item))
                assert seen[item // side % key_tiles, a:b].any()
            head = item // side // key_tiles, item % side
            assert last.get(head, 0) <= item // side % key_tiles
            last[head] = item // side % key_tiles
        wanted = np.arange(len(met)) // side % key_tiles
        assert (met[seen[wanted] == 1] == 1).all()
        # An item's parts follow one another, and each slot is one item's.
        due = [(s, j) for s, x in enumerate(dict.fromkeys(turns_of(turns))) for j in range(x[1])]
        assert [x[:2] for x in turns] == due
        assert len({x[0] for x in turns}) == slots


def turns_of(turns):
    return [(item, parts) for _, _, parts, item in turns]


def test_a_key_that_all_see_is_cut() -> None:
    lists = lists_of(SlidingWindow(512) | Sinks(4), 16384, 16384, 0, "cpu")
    table, slots = items_of(lists, Shape(64, 128, 8, 1, 4, 132, False))
    first = table[table[:, 0] == 0]
    assert len(first) > 4
    assert slots >= 8
    lengths = (first[:, 2] - first[:, 1]) * (first[:, 4] - first[:, 3])
    assert lengths.max() < 2 * lengths.min()
    assert lengths.sum() == 256 * 4
