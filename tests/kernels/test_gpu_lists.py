"""Lists of tiles against the mask, pair by pair."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.kernels.gpu_lists import MOST_RANGES, Lists, Ranges, Unlisted
from attnspan.patterns import (
    Causal,
    Documents,
    GlobalTokens,
    Longformer,
    Pattern,
    Sinks,
    SlidingWindow,
    plan,
)
from attnspan.patterns.tiles import Tiles
from attnspan.testing import patterns


def dense(tiles: Tiles) -> np.ndarray:
    i, j = np.arange(tiles.n)[:, None] + tiles.offset, np.arange(tiles.m)
    return np.broadcast_to(tiles.rule.sees(i, j), (tiles.n, tiles.m))


def job(pattern: Pattern, n: int, m: int | None = None, offset: int | None = None) -> Tiles:
    ((only,),) = (each.jobs for each in plan(pattern, n, m, offset))
    return only.tiles


def from_ranges(lists: Lists) -> np.ndarray:
    low, high = lists.low[..., None], lists.high[..., None]
    j = torch.arange(lists.m)
    seen = ((low <= j) & (j < high)).sum(0)
    assert seen.numel() == 0 or seen.max() <= 1, "ranges overlap"
    return seen.bool().numpy()


def check_ranges(ranges: Ranges, seen: np.ndarray, tile_rows: int, tile_columns: int) -> None:
    rows, columns = seen.shape
    ptr, items = ranges.ptr.tolist(), ranges.items.tolist()
    assert len(ptr) == -(-rows // tile_rows) + 1
    assert ptr[0] == 0
    assert ptr[-1] == len(items)
    for row in range(len(ptr) - 1):
        strip = seen[row * tile_rows : (row + 1) * tile_rows]
        left, done = np.ones(columns, bool), 0
        for first, stop, full_first, full_stop in items[ptr[row] : ptr[row + 1]]:
            assert done <= first < stop <= -(-columns // tile_columns)
            assert full_first == full_stop or first <= full_first < full_stop <= stop
            left[first * tile_columns : stop * tile_columns] = False
            if full_first < full_stop:
                assert full_stop * tile_columns <= columns
                assert strip[:, full_first * tile_columns : full_stop * tile_columns].all()
            done = stop
        assert not strip[:, left].any()


def check_walk(lists: Lists, seen: np.ndarray, tile_q: int, block: int, chunk: int) -> None:
    walk = lists.walk(tile_q, block, chunk)
    tiles, masked = walk.tiles.tolist(), walk.masked.tolist()
    assert sorted(t[0] for t in tiles) == list(range(0, lists.n, tile_q))
    costs = [t[5] + t[7] + t[9] for t in tiles]
    assert costs == sorted(costs, reverse=True)
    for q, chunk_start, first, first_masked, *runs, begin, count in (t[:10] for t in tiles):
        strip = seen[q : q + tile_q]
        full = [] if first_masked else [first]
        full += [runs[0] - k * block for k in range(runs[1])]
        full += [runs[2] - k * block for k in range(runs[3])]
        starts = [(x, block) for x in full + masked[begin : begin + count]]
        starts += [(chunk_start, chunk)] + [(first, block)] * first_masked
        covered = np.zeros(lists.m, int)
        for start, size in starts:
            assert -block <= start <= lists.m
            covered[max(0, start) : max(0, start + size)] += 1
        assert (covered[strip.any(0)] == 1).all(), "a key in no block, or in two"
        for start in full:
            assert 0 <= start <= lists.m - block
            assert strip[:, start : start + block].all()


@settings(max_examples=150, deadline=None)
@given(
    patterns(),
    st.integers(1, 70),
    st.integers(0, 70),
    st.integers(-20, 40),
    st.sampled_from([(4, 4, 2), (8, 4, 4), (4, 16, 8), (16, 8, 1)]),
)
def test_lists_are_the_pattern(pattern, n, m, offset, sizes) -> None:
    tile_q, tile_k, chunk = sizes
    for each in plan(pattern, n, m, offset):
        for part in each.jobs:
            seen = dense(part.tiles)
            try:
                lists = Lists(part.tiles, "cpu")
            except Unlisted as error:
                if "every so many" in str(error):
                    assert "Stride" in str(part.tiles.rule)
                    continue
                edges = np.diff(np.pad(seen, ((0, 0), (1, 0))).astype(int), axis=1) == 1
                assert edges.sum(1).max() > MOST_RANGES
                continue
            assert lists.low.dtype == lists.high.dtype == torch.int32
            assert lists.low.shape == lists.high.shape == (len(lists.low), part.tiles.n)
            assert np.array_equal(from_ranges(lists), seen)
            check_ranges(lists.rows(tile_q, tile_k), seen, tile_q, tile_k)
            check_ranges(lists.columns(tile_k, tile_q), seen.T, tile_k, tile_q)
            check_walk(lists, seen, tile_q, tile_k, chunk)


def test_full_tiles_are_found() -> None:
    lists = Lists(job(SlidingWindow(1024) | Sinks(4), 4096), "cpu")
    ranges = lists.rows(128, 128)
    last = ranges.items[ranges.ptr[31] : ranges.ptr[32]].tolist()
    assert last == [[0, 1, 0, 0], [23, 32, 24, 31]]
    ranges = lists.columns(128, 128)
    assert ranges.items[ranges.ptr[0] : ranges.ptr[1]].tolist() == [[0, 32, 1, 8]]
    assert ranges.items[ranges.ptr[5] : ranges.ptr[6]].tolist() == [[5, 14, 6, 13]]


@pytest.mark.parametrize(
    ("pattern", "blocks", "masked"),
    [
        # 32 positions see 1055 keys: eight blocks and a chunk of 32.
        (SlidingWindow(1024), 8, 1),
        (SlidingWindow(4096), 32, 1),
        (SlidingWindow(4096) | Sinks(4), 33, 2),
        (Longformer(1024, 64), 9, 2),
        (Causal(), 256, 1),
    ],
    ids=str,
)
def test_a_walk_wastes_little(pattern, blocks, masked) -> None:
    walk = Lists(job(pattern, 32768), "cpu").walk(32, 128, 32)
    tile = next(t for t in walk.tiles.tolist() if t[0] == 32768 - 32)
    assert 1 + tile[5] + tile[7] + tile[9] == blocks
    assert tile[3] + tile[9] <= masked


@pytest.mark.parametrize(
    ("pattern", "share"),
    # Below the window's length tiles are shorter; without a window nearly all are.
    [
        (SlidingWindow(1024), 31 / 32),
        (SlidingWindow(4096) | Sinks(4), 7 / 8),
        (Longformer(1024, 64), 31 / 32),
        (Causal(), 1 / 10),
    ],
    ids=str,
)
def test_the_longest_tiles_are_counted(pattern, share) -> None:
    walk = Lists(job(pattern, 32768), "cpu").walk(32, 128, 32)
    blocks = [1 + t[5] + t[7] + t[9] for t in walk.tiles.tolist()]
    assert walk.longest == sum(x >= 0.9 * blocks[0] for x in blocks)
    assert abs(walk.longest / len(blocks) - share) < 0.02


def test_sinks_come_first() -> None:
    walk = Lists(job(SlidingWindow(1024) | Sinks(4), 8192), "cpu").walk(32, 128, 32)
    assert {t[2] for t in walk.tiles.tolist() if t[0] > 2048} == {0}


def test_lists_are_small_and_made_once() -> None:
    lists = Lists(job(SlidingWindow(4096) | Sinks(4), 131072), "cpu")
    assert lists.rows(128, 128) is lists.rows(128, 128)
    lists.columns(128, 128)
    lists.walk(32, 128, 32)
    assert lists.nbytes < 3 * 2**20


def test_what_has_too_many_ranges_is_refused() -> None:
    pattern = GlobalTokens(tuple(range(0, 20, 2)))
    with pytest.raises(Unlisted, match="10 ranges of keys, not up to 4"):
        Lists(job(pattern, 64), "cpu")


def test_documents_take_one_range() -> None:
    lists = Lists(job(Documents((100, 7, 300)) & SlidingWindow(50), 512), "cpu")
    assert len(lists.low) == 1
    assert not (lists.high > lists.low)[:, 407:].any()
