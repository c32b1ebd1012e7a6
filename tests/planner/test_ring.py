"""The schedules' cost: formulas of bytes, by hand and in notes, and what must always hold."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.patterns import Causal, Full, SlidingWindow, parse
from attnspan.planner.forms import works
from attnspan.planner.links import DEVICES, LINKS, Device, Link, Machine, machine
from attnspan.planner.ring import Heads, choose, cost, decode_cost, lack, schedules, split
from attnspan.planner.work import Work

H, KV, D, B = 32, 8, 128, 2
HEADS = Heads(H, KV, D, B)
MACHINE = machine("ib")
# One operation and one byte a second, so that seconds can be counted by hand.
UNIT = Machine(Device("unit", 1, 1, 1, None, 1), Link("unit", 0.25, 1))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_bytes_are_the_formulas(size: int) -> None:
    n = 4096
    full = works(Full(), n, "contiguous")
    others = (size - 1) / size
    forward = cost("ring", full, size, HEADS, MACHINE)
    assert forward.sent == forward.sent_most == 2 * KV * D * n * B * others
    backward = cost("ring", full, size, HEADS, MACHINE, backward=True)
    assert backward.sent == forward.sent + 2 * KV * D * n * 4 * others
    assert cost("allgather", full, size, HEADS, MACHINE).sent == forward.sent
    ulysses = cost("ulysses", full, size, HEADS, MACHINE)
    assert ulysses.sent == 2 * (H + KV) * D * (n / size) * B * others
    assert decode_cost(n, size, HEADS, MACHINE).sent == H * (D + 1) * 4 * (size - 1)


def test_windows_cost_their_halo() -> None:
    """notes: N=8, S=4096, W=128 with KV width 256 in fp32: 127 KiB, 254 KiB, against 3,584 KiB."""
    heads = Heads(4, 2, 64, 2)
    for layout, expected in (("contiguous", 127), ("zigzag", 254)):
        ring = cost("ring", works(SlidingWindow(128), 4096, layout), 8, heads, MACHINE)
        assert ring.sent_most == expected * 2 * heads.kv * heads.dim * heads.itemsize
    full = cost("ring", works(Full(), 4096, "zigzag"), 8, heads, MACHINE)
    assert full.sent / ring.sent_most == 3584 / 254


@pytest.mark.parametrize(("layout", "share"), [("zigzag", 0.75), ("contiguous", 0.5)])
def test_causal_shares_of_the_full_ring(layout: str, share: float) -> None:
    full = cost("ring", works(Full(), 8192, layout), 8, HEADS, MACHINE)
    assert cost("ring", works(Causal(), 8192, layout), 8, HEADS, MACHINE).sent == share * full.sent


def test_heads_are_replicated_and_counted_or_refused() -> None:
    of = works(Causal(), 4096, "zigzag")
    assert cost("ulysses", of, 8, HEADS, MACHINE).copies == 1
    more = cost("ulysses", of, 32, HEADS, MACHINE)
    assert more.copies == 4
    # Each other rank gets one query head, its output back, and one KV head.
    assert more.sent == 31 * (2 + 2) * D * (4096 // 32) * B
    assert lack("ulysses", 64, HEADS) == "ulysses trades 32 query heads among 64 ranks"
    assert lack("2x12", 24, Heads(24, 8, D)) == "2x12 trades 8 KV heads among 12 ranks"
    with pytest.raises(ValueError, match="32 query heads among 64 ranks; whole heads"):
        cost("ulysses", of, 64, HEADS, MACHINE)


def test_seconds_by_hand() -> None:
    """Two ranks, four tokens, one head of one channel of one byte: every number is countable."""
    heads = Heads(1, 1, 1, 1)
    of = works(Full(), 4, "contiguous")
    ring = cost("ring", of, 2, heads, UNIT)
    # Two rounds of 2 x 2 pairs at 4 operations; two keys and two values hide behind the first.
    assert (ring.compute, ring.communication, ring.exposed) == (32, 4.25, 0)
    assert ring.seconds == 32
    assert ring.exchanges == 1
    # fp32 gradients of two keys and two values go back when all is computed.
    backward = cost("ring", of, 2, heads, UNIT, backward=True)
    assert backward.compute == 2.5 * 32
    assert backward.exposed == 0.25 + 2 * 2 * 4
    # In flight: two keys and values, and a fp32 output and log-sum-exp for two tokens.
    assert ring.extra == 2 * 2 + 2 * (1 + 1) * 4
    slow = Machine(UNIT.device, Link("slow", 0.25, 0.1))
    assert cost("ring", of, 2, heads, slow).exposed == 40.25 - 16
    half = Machine(UNIT.device, Link("half", 0.25, 1, overlap=0.5))
    assert cost("ring", of, 2, heads, half).exposed == 4.25 - 0.5 * 4.25


def test_a_contiguous_causal_ring_waits_for_its_last_rank() -> None:
    n, size = 65_536, 8
    seconds = {
        layout: cost("ring", works(Causal(), n, layout), size, HEADS, MACHINE).compute
        for layout in ("contiguous", "zigzag")
    }
    assert seconds["contiguous"] / seconds["zigzag"] == pytest.approx(2 - 1 / size, rel=0.02)


def test_mixes_lie_between() -> None:
    of = works(Full(), 65_536, "zigzag")
    costs = [cost(s, of, 8, HEADS, MACHINE) for s in ("ring", "4x2", "2x4", "ulysses")]
    sent = [c.sent for c in costs]
    # A mix exchanges keys of a ring of R for H / U heads, and trades heads among U.
    n = 65_536
    assert sent[1] == 2 * (KV // 2) * D * n * B * 3 // 4 + (H + KV) * D * (n // 8) * B
    assert all(c.compute == pytest.approx(costs[0].compute, rel=0.03) for c in costs)


PATTERNS = ["Causal()", "Full()", "SlidingWindow(100)", "SlidingWindow(60) | Sinks(4)"]


@settings(deadline=None, max_examples=60)
@given(
    text=st.sampled_from([*PATTERNS, "Longformer(50, 8)", "Blockwise(64, before=True)"]),
    n=st.integers(64, 20_000),
    size=st.sampled_from([1, 2, 4, 8, 16, 32]),
    layout=st.sampled_from(["zigzag", "contiguous"]),
    link=st.sampled_from([*LINKS.values()]),
    backward=st.booleans(),
)
def test_what_must_hold(
    text: str, n: int, size: int, layout: str, link: Link, backward: bool
) -> None:
    of = works(parse(text), n, layout)
    rates = Machine(DEVICES["h200"], link)
    for schedule in schedules(size):
        if lack(schedule, size, HEADS):
            continue
        each = cost(schedule, of, size, HEADS, rates, backward)
        assert 0 <= each.exposed <= each.communication
        assert 0 <= each.overlap <= 1
        assert each.seconds == each.compute + each.exposed
        assert each.sent <= each.sent_most
        assert (each.sent == 0) == (each.communication == 0)
        assert each.imbalance >= 0
        # The slowest rank computes no less than the mean one.
        flops = 4 * D * H * of(split(schedule, size)[0]).total / size
        rate = rates.device.backward / 2.5 if backward else rates.device.forward
        assert each.compute >= 0.999 * flops / rate


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("schedule", ["ring", "ulysses"])
def test_more_ranks_hold_no_more_each(text: str, schedule: str) -> None:
    of = works(parse(text), 2**16, "zigzag")
    extra = [cost(schedule, of, size, HEADS, MACHINE).extra for size in (2, 4, 8, 16, 32)]
    assert all(a >= b for a, b in pairwise(extra))


def test_choose_takes_the_cheapest_and_says_why() -> None:
    of = works(SlidingWindow(4096), 2**17, "contiguous")
    chosen = choose(of, 8, HEADS, MACHINE)
    assert chosen.schedule == "ring"
    assert str(chosen).startswith("ring: ")
    assert "of exchanges hide, against " in chosen.why
    fewest = min(seconds for _, seconds in chosen.seconds)
    assert dict(chosen.seconds)["ring"] <= 1.01 * fewest
    # Heads are cheaper to trade than keys where there are few tokens for many KV heads.
    many = choose(works(Full(), 4096, "contiguous"), 8, Heads(32, 32, 128), machine("eth"))
    assert many.schedule == "ulysses"
    assert "0% of its" in many.why
    refusing = choose(works(Full(), 4096, "contiguous"), 8, Heads(4, 2, 128), machine("eth"))
    assert refusing.refused == ("ulysses trades 4 query heads among 8 ranks",)
    with pytest.raises(ValueError, match="no schedule can run: ulysses trades 4 query heads"):
        choose(of, 8, Heads(4, 2, 128), MACHINE, among=["ulysses"])


def test_choose_takes_a_plan_that_was_counted() -> None:
    """A ring's own plan, counted pair by pair, is chosen for like a closed form."""
    pairs = np.full((4, 4), 100)
    given = Work(40, 4, pairs, np.full((4, 4), 10))
    assert choose(lambda size: given, 4, HEADS, MACHINE, True, ["ring", "allgather"]).seconds


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("star", "schedule 'star' is not known; allowed are ring, allgather, ulysses, and RxU"),
        ("2x", "schedule '2x' is not known"),
        ("2x4", "schedule 2x4 is for 8 ranks, not 4"),
        ("0x4", "schedule .0x4. is not known; allowed are ring"),
    ],
)
def test_bad_schedules(schedule: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        split(schedule, 4)
