"""Closed forms against every pair, one by one."""

import time

import numpy as np
import pytest
from hypothesis import given, settings

from attnspan.patterns import Causal, Pattern, parse
from attnspan.patterns import pairs as count_pairs
from attnspan.planner.forms import MOST_RANKS, sees_ahead, work
from attnspan.planner.work import Work
from attnspan.ring.layout import Contiguous, Striped, ZigZag
from attnspan.testing import patterns

LAYOUTS = {"contiguous": Contiguous(), "zigzag": ZigZag(), "striped": Striped()}
PATTERNS = [
    "Causal()",
    "Full()",
    "SlidingWindow(1)",
    "SlidingWindow(5)",
    "SlidingWindow(17)",
    "SlidingWindow(200)",
    "SlidingWindow(7, include_self=False)",
    "SlidingWindow(4, right=3)",
    "SlidingWindow(6) | Sinks(2)",
    "SlidingWindow(9) | Sinks(13)",
    "Sinks(4)",
    "Sinks(0) | SlidingWindow(3)",
    "GlobalTokens(5)",
    "GlobalTokens(7, causal=False)",
    "Longformer(6, 3)",
    "Longformer(4, 14, right=5)",
    "Causal() & (SlidingWindow(9, right=4) | GlobalTokens(2, causal=False))",
    "SlidingWindow(3) | SlidingWindow(8) | Sinks(1) | Sinks(6)",
    "Blockwise(8)",
    "Blockwise(5, before=True)",
    "Blockwise(7, causal=False)",
    "Blockwise(3, before=True, causal=False)",
    "Blockwise(100, before=True)",
    "Documents((13, 1, 30, 4))",
    "Documents((48,))",
    "Documents((20, 100), causal=False)",
]


def enumerated(text: str, n: int, size: int, layout: str) -> Work:
    """What `Pattern.sees` says of every pair, dealt out by the ring's own layouts."""
    place = np.arange(n)
    seen = np.asarray(parse(text).sees(place[:, None], place[None]))
    held = [LAYOUTS[layout].positions(n, rank, size) for rank in range(size)]
    blocks = [[seen[np.ix_(queries, keys)] for keys in held] for queries in held]
    pairs = np.array([[block.sum() for block in row] for row in blocks])
    needs = np.array([[block.any(0).sum() for block in row] for row in blocks])
    return Work(n, size, pairs, needs)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("text", PATTERNS)
def test_pairs_and_needs_equal_an_enumeration(text: str, layout: str) -> None:
    for n, size in ((48, 1), (48, 2), (48, 3), (48, 4), (48, 8), (60, 5), (96, 6), (48, 24)):
        mine, theirs = work(parse(text), n, size, layout), enumerated(text, n, size, layout)
        assert mine.n == n
        assert mine.exact
        np.testing.assert_array_equal(mine.pairs, theirs.pairs, f"{n} on {size}")
        np.testing.assert_array_equal(mine.needs, theirs.needs, f"{n} on {size}")
        assert mine.total == count_pairs(parse(text), n)


@pytest.mark.parametrize("text", ["Causal()", "Full()"])
def test_striped(text: str) -> None:
    for n, size in ((48, 1), (48, 3), (48, 16)):
        mine, theirs = work(parse(text), n, size, "striped"), enumerated(text, n, size, "striped")
        np.testing.assert_array_equal(mine.pairs, theirs.pairs)
        np.testing.assert_array_equal(mine.needs, theirs.needs)


@pytest.mark.parametrize("text", ["Strided(8, 4)", "SlidingWindow(8, dilation=3)"])
def test_strides_are_estimates_and_say_so(text: str) -> None:
    for size in (1, 2, 4):
        mine, theirs = work(parse(text), 480, size, "zigzag"), enumerated(text, 480, size, "zigzag")
        assert not mine.exact
        assert abs(mine.total / theirs.total - 1) < 0.05
        assert abs(mine.needs.sum() / theirs.needs.sum() - 1) < 0.05


@pytest.mark.parametrize("change", ["window", "halo", "layout"])
def test_this_oracle_sees_a_mistake(change: str) -> None:
    """A window one short, a halo one short and another layout are each told apart."""
    theirs = enumerated("SlidingWindow(6)", 48, 4, "zigzag")
    mine = work(parse("SlidingWindow(6)"), 48, 4, "zigzag")
    if change == "window":
        mine = work(parse("SlidingWindow(5)"), 48, 4, "zigzag")
    elif change == "layout":
        mine = work(parse("SlidingWindow(6)"), 48, 4, "contiguous")
    else:
        mine.needs[1, 0] -= 1
    assert not np.array_equal(mine.needs, theirs.needs)


@pytest.mark.parametrize(("size", "shard"), [(2, 4096), (8, 1024), (64, 256)])
def test_shares_of_the_full_ring(size: int, shard: int) -> None:
    """notes: of the full ring's keys causal zigzag needs about 3/4, contiguous a half."""
    n = size * shard
    full = work(parse("Full()"), n, size, "contiguous").sent.sum()
    assert full == n * (size - 1)
    zigzag = work(parse("Causal()"), n, size, "zigzag").sent.sum()
    contiguous = work(parse("Causal()"), n, size, "contiguous").sent.sum()
    assert zigzag / full == 0.75
    assert contiguous / full == 0.5


@pytest.mark.parametrize("size", [4, 16, 256])
def test_a_window_costs_its_halo_whatever_the_ring_and_the_length(size: int) -> None:
    for shard in (2048, 4096):
        window = parse("SlidingWindow(128)")
        contiguous = work(window, size * shard, size, "contiguous")
        zigzag = work(window, size * shard, size, "zigzag")
        assert contiguous.sent.max() == 127
        assert zigzag.sent.max() == 2 * 127
        assert len(contiguous.rounds) == 2


def test_sinks_and_window_join_into_one_round() -> None:
    for layout in ("contiguous", "zigzag"):
        assert len(work(parse("SlidingWindow(508) | Sinks(4)"), 65_536, 8, layout).rounds) == 2


def test_rounds_hold_all_work_where_ranks_are_alike() -> None:
    causal = work(parse("Causal()"), 4096, 8, "zigzag")
    assert len(causal.rounds) == 8
    assert sum(each.pairs for each in causal.rounds) == causal.pairs.sum(1).max()
    assert causal.imbalance == 0
    contiguous = work(parse("Causal()"), 4096, 8, "contiguous")
    assert contiguous.imbalance == pytest.approx(7 / 8, abs=0.01)


def test_lengths_are_padded_to_whole_chunks() -> None:
    assert work(parse("Causal()"), 1000, 3, "zigzag").n == 1002
    assert work(parse("Causal()"), 3, 8, "contiguous").n == 8


@pytest.mark.parametrize("text", ["Causal()", "SlidingWindow(4096) | Sinks(4)", "Blockwise(64)"])
def test_a_million_tokens_on_a_thousand_ranks_take_under_a_second(text: str) -> None:
    start = time.process_time()  # other processes don't count
    large = work(parse(text), 2**20, MOST_RANKS, "zigzag")
    assert large.rounds
    assert time.process_time() - start < 1
    assert large.total == count_pairs(parse(text), 2**20)


@pytest.mark.parametrize(
    ("text", "n", "size", "layout", "expected"),
    [
        ("~Causal()", 8, 2, "zigzag", "no closed form here; allowed are Full, Causal"),
        ("GlobalTokens((1, 5))", 8, 2, "zigzag", "no closed form"),
        ("Blockwise(4) | Sinks(1)", 8, 2, "zigzag", "no closed form"),
        ("SlidingWindow(4)", 8, 2, "striped", r"Causal\(\) and Full\(\) are allowed"),
        ("Causal()", 8, 2, "spiral", "allowed are contiguous, zigzag, striped"),
        ("Causal()", 0, 2, "zigzag", "n is 0; a whole number from 1"),
        ("Causal()", 8, 1025, "zigzag", "size is 1025; a whole number from 1 to 1024"),
    ],
)
def test_what_is_refused(text: str, n: int, size: int, layout: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        work(parse(text), n, size, layout)
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None)
@given(patterns())
def test_what_lies_ahead_is_what_counting_finds(pattern: Pattern) -> None:
    try:
        found = sees_ahead(pattern)
    except ValueError:
        return
    assert found == bool(count_pairs(pattern & ~Causal(), 60))
