"""What is sent is what the pattern needs: counted by brute force, to the token."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.patterns import Causal, Documents, Longformer, Sinks, SlidingWindow
from attnspan.ring.exchange import check_layout, plan_exchange
from attnspan.ring.layout import Contiguous, Striped, ZigZag
from attnspan.testing import patterns


def plans(pattern, n, layout, world, schedule="ring"):
    holdings = layout.chunks(n, world)
    return [plan_exchange(pattern, n, holdings, rank, schedule) for rank in range(world)]


@settings(max_examples=120, deadline=None)
@given(
    patterns(),
    st.sampled_from([Contiguous(), ZigZag(), Striped()]),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from(["ring", "allgather"]),
)
def test_each_rank_gets_the_keys_that_its_queries_see(
    pattern, layout, world, part, schedule
) -> None:
    n = world * 2 * part
    holdings = layout.chunks(n, world)
    try:
        check_layout(pattern, holdings, "test")
    except ValueError:
        return
    places = [layout.positions(n, rank, world) for rank in range(world)]
    for rank, plan in enumerate(plans(pattern, n, layout, world, schedule)):
        sees = np.broadcast_to(
            pattern.sees(places[rank][:, None], np.arange(n)), (len(places[rank]), n)
        )
        needed = sees.any(0)
        needed[places[rank]] = False
        got = np.zeros(n, int)
        for each in plan.rounds:
            for piece in each.receives:
                got[places[piece.source][piece.start : piece.stop]] += 1
        assert (got == needed).all()
        assert plan.pairs == sees.sum()
        assert plan.received == needed.sum()
        _check_calls(plan, rank, places, sees)


def _check_calls(plan, rank, places, sees) -> None:
    drawn = np.zeros_like(sees, dtype=int)
    for each in (plan.local, *plan.rounds):
        for call in each.calls:
            piece = each.receives[call.piece]
            rows = np.arange(call.start, call.stop)
            i = np.arange(len(rows))[:, None] + call.q_offset
            seen = np.broadcast_to(
                call.pattern.sees(i, np.arange(piece.tokens)), (len(rows), piece.tokens)
            )
            assert seen.sum() == call.pairs > 0
            drawn[np.ix_(rows, places[piece.source][piece.start : piece.stop])] += seen
    assert (drawn == sees).all()


@settings(max_examples=60, deadline=None)
@given(patterns(), st.sampled_from([Contiguous(), ZigZag()]), st.integers(2, 5))
def test_what_one_sends_the_other_expects(pattern, layout, world) -> None:
    every = plans(pattern, 24 * world, layout, world)
    assert len({len(plan.rounds) for plan in every}) == 1
    for number, (rank, peer) in product(
        range(len(every[0].rounds)), product(range(world), repeat=2)
    ):
        sent = dict(every[rank].rounds[number].sends).get(peer, ())
        expected = tuple(p for p in every[peer].rounds[number].receives if p.source == rank)
        assert sent == expected
        assert every[rank].largest == max(p.largest for p in every)


@pytest.mark.parametrize(("layout", "share"), [(ZigZag(), 0.75), (Contiguous(), 0.5)])
def test_causal_needs_less_than_the_full_ring(layout, share) -> None:
    world, n = 8, 512
    sent = sum(plan.sent for plan in plans(Causal(), n, layout, world))
    full = n * (world - 1)
    assert sent == share * full


def test_work_is_even() -> None:
    for pattern, layout, most in (
        (Causal(), ZigZag(), 0.02),
        (SlidingWindow(256), Contiguous(), 0.05),
        (SlidingWindow(256), ZigZag(), 0.05),
    ):
        work = [plan.pairs for plan in plans(pattern, 8192, layout, 4)]
        assert max(work) / np.mean(work) - 1 <= most, (pattern, layout)


def test_a_window_needs_its_halo_however_many_ranks_and_tokens() -> None:
    halo = 63
    for world, n in ((4, 1024), (8, 4096), (16, 32768)):
        for layout, times in ((Contiguous(), 1), (ZigZag(), 2)):
            every = plans(SlidingWindow(64), n, layout, world)
            assert max(plan.received for plan in every) == times * halo
            assert max(plan.sent for plan in every) == times * halo
            assert len(every[0].rounds) == 1
        every = plans(SlidingWindow(64) | Sinks(4), n, Contiguous(), world)
        assert max(plan.received for plan in every) <= halo + 4
        assert len(every[0].rounds) == 1


def test_a_window_of_more_than_a_shard() -> None:
    every = plans(SlidingWindow(300), 1024, Contiguous(), 8)
    assert [plan.received for plan in every] == [0, 128, 256, 299, 299, 299, 299, 299]


def test_documents_that_end_at_shards_need_nothing() -> None:
    every = plans(Documents((64, 64, 128)), 256, Contiguous(), 4)
    assert [plan.received for plan in every] == [0, 0, 0, 64]


def test_globals_travel_once() -> None:
    every = plans(Longformer(16, (0, 100)), 512, Contiguous(), 4)
    # Tokens 0 and 100 go from the first rank to all, windows need 15 from the rank before.
    assert [plan.received for plan in every] == [0, 17, 17, 17]


def test_one_round_holds_what_all_gather_needs() -> None:
    every = plans(Causal(), 256, ZigZag(), 4, "allgather")
    assert {len(plan.rounds) for plan in every} == {1}
    ring = plans(Causal(), 256, ZigZag(), 4)
    assert [p.sent for p in every] == [p.sent for p in ring]
    assert max(plan.largest for plan in ring) == 64
