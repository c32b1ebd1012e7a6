"""Tiles against the predicate, pair by pair."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.patterns import (
    Blockwise,
    Causal,
    Documents,
    Full,
    GlobalTokens,
    Longformer,
    Pattern,
    Sinks,
    SlidingWindow,
    Strided,
    pairs,
    plan,
)
from attnspan.patterns.atoms import Blocks, Distance, Keys, Queries, Segments, Stride
from attnspan.patterns.tiles import OPERATIONS, Tiles
from attnspan.testing import patterns


def dense(pattern: Pattern, n: int, m: int, offset: int) -> np.ndarray:
    i, j = np.arange(n)[:, None] + offset, np.arange(m)
    return np.broadcast_to(pattern.sees(i, j), (n, m))


def check_tiles(tiles: Tiles) -> np.ndarray:
    """Holds one job's bounds, tiles and program against its rule; gives what it sees."""
    seen = dense(tiles.rule, tiles.n, tiles.m, tiles.offset)
    for row in range(tiles.rows):
        rows = slice(row * tiles.tile, (row + 1) * tiles.tile)
        left = np.ones(tiles.m, bool)
        done = -1
        for start, stop in tiles.some[tiles.some_ptr[row] : tiles.some_ptr[row + 1]]:
            assert done < start < stop <= tiles.m, "ranges rise, and touching ones are joined"
            left[start:stop], done = False, stop
        assert not seen[rows][:, left].any(), "a pair outside of what some may see"
        for start, stop in tiles.all[tiles.all_ptr[row] : tiles.all_ptr[row + 1]]:
            assert seen[rows, start:stop].all(), "a pair unseen among what all see"
        covered, done = np.zeros(tiles.m, bool), 0
        for kind, first, last in tiles.ranges(row):
            assert done <= first < last
            done, columns = last, slice(first * tiles.tile, last * tiles.tile)
            covered[columns] = True
            assert kind == "partial" or seen[rows, columns].all(), "a full tile has a hole"
        assert not seen[rows][:, ~covered].any(), "an empty tile has a pair"
    assert np.array_equal(run_program(tiles), seen)
    return seen


def run_program(tiles: Tiles) -> np.ndarray:
    """The mask program, pair by pair."""
    code, tables = tiles.program
    i = np.arange(tiles.n)[:, None] + tiles.offset
    row, j = np.arange(tiles.n)[:, None], np.arange(tiles.m)
    stack: list[np.ndarray] = []

    def bit(table: np.ndarray, at: np.ndarray) -> np.ndarray:
        return (table[at // 64] >> (at % 64).astype(np.uint64)) & np.uint64(1) != 0

    for operation, a, b in code:
        match OPERATIONS[operation]:
            case "distance":
                found = (i - j >= a) & (i - j < b)
            case "keys":
                found = bit(tables[a], j)
            case "queries":
                found = bit(tables[a], row)
            case "span":
                found = (j >= tables[a][row, 0]) & (j < tables[a][row, 1])
            case "stride":
                found = (i - j) % a == 0
            case "and":
                found = stack.pop() & stack.pop()
            case "or":
                found = stack.pop() | stack.pop()
            case "not":
                found = ~stack.pop()
            case other:
                raise AssertionError(other)
        stack.append(np.broadcast_to(found, (tiles.n, tiles.m)))
    (result,) = stack
    return result


def check_plan(pattern: Pattern, n: int, m: int, offset: int, tile: int) -> None:
    whole = np.zeros((n, m), int)
    for each in plan(pattern, n, m, offset, tile):
        for job in each.jobs:
            seen = check_tiles(job.tiles)
            for c in range(job.count):
                queries = job.first_query + c + each.step * np.arange(job.tiles.n)
                keys = job.first_key + c + each.step * np.arange(job.tiles.m)
                whole[np.ix_(queries, keys)] += seen
    assert np.array_equal(whole, dense(pattern, n, m, offset)), "each pair once, and no other"


@given(
    patterns(),
    st.integers(0, 45),
    st.integers(0, 45),
    st.one_of(st.none(), st.integers(-20, 30)),
    st.sampled_from([1, 3, 4, 8, 64]),
)
@settings(deadline=None, max_examples=300)
def test_plans_and_counts_are_the_predicate(
    pattern: Pattern, n: int, m: int, q_offset: int | None, tile: int
) -> None:
    offset = m - n if q_offset is None else q_offset
    check_plan(pattern, n, m, offset, tile)
    assert pairs(pattern, n, m, q_offset) == dense(pattern, n, m, offset).sum()


@pytest.mark.parametrize("tile", [64, 100, 128])
@pytest.mark.parametrize(
    "pattern",
    [
        Causal(),
        Full(),
        SlidingWindow(200) | Sinks(4),
        SlidingWindow(90, dilation=3),
        Strided(100, 70),
        Blockwise(96, before=True),
        Longformer(130, (5, 300), right=20),
        Documents((100, 250, 64, 400)),
    ],
    ids=str,
)
def test_plans_hold_at_the_sizes_that_kernels_use(pattern, tile) -> None:
    check_plan(pattern, 700, 900, 200, tile)


@pytest.mark.parametrize("pattern", [Causal(), SlidingWindow(200), Blockwise(96, causal=False)])
def test_named_patterns_leave_no_tile_in_doubt(pattern) -> None:
    (each,) = plan(pattern, 1000, tile=64)
    tiles = each.jobs[0].tiles
    seen = dense(pattern, 1000, 1000, 0)
    for row in range(tiles.rows):
        for kind, first, last in tiles.ranges(row):
            for tile in range(first, last):
                part = seen[row * 64 : row * 64 + 64, tile * 64 : tile * 64 + 64]
                assert part.any()
                assert kind == ("full" if part.all() else "partial")


ATOMS = [
    (Distance, SlidingWindow(9)),
    (Keys, Sinks(7)),
    (Segments, Documents((9, 9, 30), causal=False)),
    (Blocks, Blockwise(9, causal=False)),
]


@pytest.mark.parametrize(("atom", "pattern"), ATOMS, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("which", [0, 1])
def test_bounds_that_are_off_by_one_are_seen(monkeypatch, atom, pattern, which) -> None:
    right = atom.spans
    check_plan(pattern, 40, 40, 0, 4)

    def wrong(self, first, last, m):
        # What some see ends a key too early, or what all see a key too late.
        both = list(right(self, first, last, m))
        runs = both[which]
        moved = np.clip(runs.stops + (1 if which else -1), runs.starts, m)
        both[which] = runs._replace(stops=moved)
        return tuple(both)

    monkeypatch.setattr(atom, "spans", wrong)
    with pytest.raises(AssertionError):
        check_plan(pattern, 40, 40, 0, 4)


def test_queries_that_are_off_by_one_are_seen(monkeypatch) -> None:
    right, pattern = Queries.spans, GlobalTokens((20, 21), causal=False)
    check_plan(pattern, 40, 40, 0, 1)
    monkeypatch.setattr(Queries, "spans", lambda self, f, g, m: right(self, f + 1, g + 1, m))
    with pytest.raises(AssertionError):
        check_plan(pattern, 40, 40, 0, 1)


def test_a_stride_that_is_off_by_one_is_seen(monkeypatch) -> None:
    check_plan(Strided(3, 5), 40, 40, 0, 4)
    monkeypatch.setattr(Distance, "thin", lambda self, step, residue, lead=0: Distance(1, None))
    with pytest.raises(AssertionError):
        check_plan(Strided(3, 5), 40, 40, 0, 4)
    assert str(Stride(5)) == "Stride(5)"


MILLION = 1_000_000
BOUNDED = [
    Causal(),
    Full(),
    SlidingWindow(4096) | Sinks(4),
    SlidingWindow(512, dilation=8, right=100),
    Strided(512, 1000),
    Blockwise(512, before=True),
    GlobalTokens(64),
    Longformer(512, 64, right=511),
    Causal() & ~SlidingWindow(512),
]


@pytest.mark.parametrize("pattern", BOUNDED, ids=str)
def test_a_million_tokens_take_under_a_mebibyte(pattern) -> None:
    plan(pattern, 1000, tile=64)
    tracemalloc.start()
    try:
        passes = plan(pattern, MILLION, tile=64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert sum(job.tiles.nbytes for each in passes for job in each.jobs) < 2**20


def test_time_is_linear() -> None:
    def seconds(n: int) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()  # others on the machine count for little
            plan(Longformer(512, 64), n, tile=64)
            times.append(time.process_time() - start)
        return min(times)

    seconds(MILLION // 10)
    assert seconds(MILLION) < 20 * seconds(MILLION // 10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 2**31}, ValueError, "n is 2147483648; a whole number from 0 to 2147483647"),
        ({"n": -1}, ValueError, "n is -1"),
        ({"n": 4, "m": 2.0}, ValueError, "m is 2.0"),
        ({"n": 4, "q_offset": 1.5}, ValueError, "q_offset is 1.5; None or a whole number"),
        ({"n": 4, "q_offset": 2**60}, ValueError, "q_offset is 1152921504606846976"),
        ({"pattern": "Causal()", "n": 4}, TypeError, r"pattern is 'Causal\(\)'; a Pattern such as"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(options, error, message) -> None:
    options = {"pattern": Causal(), **options}
    with pytest.raises(error, match=f"^plan: {message}"):
        plan(**options)
    with pytest.raises(error, match=f"^pairs: {message}"):
        pairs(**options)


@pytest.mark.parametrize("tile", [0, -1, 2.0, True])
def test_bad_tiles_are_refused(tile) -> None:
    with pytest.raises(ValueError, match=f"plan: tile is {tile}"):
        plan(Causal(), 4, tile=tile)
