"""What queries see and what must be held, against counting it token by token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
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
)
from attnspan.planner.seen import Capped, Chunks, View, of_pattern, of_policy, of_window
from attnspan.policies import (
    Compressive,
    HeavyHitter,
    KeepAll,
    Policy,
    SinkWindow,
    SnapKV,
    Window,
)
from attnspan.policies.base import Held, Keep, Pick, Pool

small = st.integers(1, 12)
blocks = st.sampled_from([1, 1, 2, 3, 7, 8])
policies = st.one_of(
    st.just(KeepAll()),
    st.builds(Window, small, blocks),
    st.builds(SinkWindow, st.integers(0, 5), small, blocks),
    st.builds(HeavyHitter, small, small, blocks),
    st.builds(SnapKV, small, small, st.just(1), block=blocks),
    st.builds(Compressive, small, small, st.integers(1, 5), sinks=st.integers(0, 5), block=blocks),
)
patterns = st.one_of(
    st.just(Causal()),
    st.builds(SlidingWindow, small, st.booleans(), st.integers(1, 3)),
    st.builds(Blockwise, small, st.booleans()),
    st.builds(Strided, small, small),
    st.builds(Longformer, small, st.integers(0, 9)),
    st.builds(lambda w, s: SlidingWindow(w) | Sinks(s), small, st.integers(0, 5)),
    st.builds(lambda w, a, b: Longformer(w, (a, a + b)), small, small, small),
    st.builds(lambda a: GlobalTokens((a,)) | SlidingWindow(1), small),
    st.just(Documents((5, 9, 30, 80))),
    st.just(Causal() & ~SlidingWindow(3)),
)


def streamed(policy: Policy, n: int) -> tuple[int, int, int]:
    """Pairs, keys of the last query, and the most slots, as a stream of single tokens has them."""
    held = memory = pairs = most = last = 0
    for seen in range(1, n + 1):
        held += 1
        last, pairs, most = held, pairs + held, max(most, held)
        if seen % policy.block:
            continue
        alike = torch.zeros(1, 1, held)  # which are picked doesn't matter here
        sizes = []
        for move in policy.decide(Held(held, memory, scores=alike)):
            match move:
                case Keep(start, stop):
                    sizes.append(max(0, stop - start))
                case Pick(index):
                    sizes.append(index.shape[-1])
                case Pool():
                    sizes.append(move.groups)
        if isinstance(policy, Compressive):
            memory = sum(sizes[1:-1])
        held = sum(sizes)
    return pairs, last, most


def counted(view: View, policy: Policy, n: int) -> bool:
    pairs, last, most = streamed(policy, n)
    return (view.pairs(n), view.read(n)) == (pairs, last) and most <= view.hold(n)


@settings(deadline=None, max_examples=300)
@given(policies, st.integers(1, 150))
def test_policies_as_streams_follow_them(policy: Policy, n: int) -> None:
    assert counted(of_policy(policy), policy, n)


def test_the_oracle_sees_a_token_too_many() -> None:
    policy = SinkWindow(2, 5, 3)
    view = of_policy(policy)
    assert isinstance(view, Capped)
    assert view.kept is not None
    assert counted(view, policy, 40)
    assert not counted(replace(view, kept=view.kept + 1), policy, 40)
    assert not counted(replace(view, block=2), policy, 40)


@settings(deadline=None, max_examples=200)
@given(patterns, st.integers(1, 60))
def test_patterns_by_enumeration(pattern: Pattern, n: int) -> None:
    view, beyond = of_pattern(pattern), 40
    places = np.arange(n + beyond)
    sees = pattern.sees(places[:, None], places[None])
    assert view.pairs(n) == sees[:n, :n].sum()
    assert view.read(n) == sees[n - 1, :n].sum()
    assert view.decodes(n)
    # A key is held while a query sees it, the query's own included.
    needed = max(int(sees[t:, : t + 1].any(0).sum()) for t in range(n))
    assert needed <= view.hold(n) <= n


@pytest.mark.parametrize(
    "pattern", [Full(), Blockwise(4, causal=False), Longformer(3, 2, right=1), ~Causal()]
)
def test_what_sees_later_keys_does_not_decode(pattern: Pattern) -> None:
    assert not of_pattern(pattern).decodes(20)


def test_by_hand() -> None:
    # 100,000 * 100,001 / 2, and 100,000 * 4,096 less the 4,095 * 4,096 / 2 that aren't there yet.
    assert Capped(None).pairs(100_000) == 5_000_050_000
    assert of_window(4096).pairs(100_000) == 409_600_000 - 4095 * 4096 // 2
    # A chunk of 8: the tokens 0..7, 8..15, and three more.
    assert of_window(8, chunked=True) == Chunks(8)
    assert Chunks(8).pairs(19) == 36 + 36 + 6
    # Every third key before a window of 2: queries 0 to 3 see 1, 2, 2 and 3 keys.
    assert of_pattern(Strided(2, 3)).pairs(4) == 8
    # No key can be dropped: three queries in a row see three keys of any three.
    assert of_pattern(Strided(2, 3)).hold(1000) == 1000


def test_large_contexts_are_counted_at_once() -> None:
    n = 2**31
    compressive = of_policy(Compressive(3002, 1024, 4))
    assert compressive.pairs(n) < of_window(8192).pairs(n)
    assert of_policy(HeavyHitter(2048, 1985)).pairs(n) < of_window(4096).pairs(n)
