"""Policies as values: SPEC texts, closed forms, decisions, bad sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.policies import (
    Compressive,
    HeavyHitter,
    KeepAll,
    PerHead,
    PerLayer,
    SinkWindow,
    SnapKV,
    Window,
    parse,
    parse_list,
    pyramid,
)
from attnspan.policies.base import Held, Keep, Pick, Pool

size, none = st.integers(1, 40), st.integers(0, 8)
weights = st.lists(st.floats(-2, 2), min_size=1, max_size=4).map(tuple)
single = st.one_of(
    st.just(KeepAll()),
    st.builds(Window, size, size),
    st.builds(SinkWindow, none, size, size),
    st.builds(HeavyHitter, size, size, size),
    size.flatmap(
        lambda block: st.builds(SnapKV, size, size, st.integers(1, block), none, st.just(block))
    ),
    st.builds(
        Compressive, size, size, size, st.sampled_from(["mean", "max", "most-used"]), none, size
    ),
    weights.flatmap(lambda w: st.builds(Compressive, size, size, st.just(len(w)), st.just(w))),
)
policies = single | st.lists(single, min_size=1, max_size=3).map(lambda some: PerHead(tuple(some)))


@settings(deadline=None, max_examples=200)
@given(policies)
def test_a_spec_reads_as_it_prints(policy) -> None:
    assert parse(str(policy)) == policy
    assert hash(parse(str(policy))) == hash(policy)


@settings(deadline=None, max_examples=50)
@given(st.lists(policies, min_size=1, max_size=5))
def test_lists_and_layers_read_as_they_print(chosen) -> None:
    assert parse_list(", ".join(map(str, chosen))) == chosen
    layers = PerLayer(tuple(chosen))
    assert parse(str(layers)) == layers
    assert parse_list(f"{layers}, keep-all") == [layers, KeepAll()]


@settings(deadline=None, max_examples=100)
@given(single, st.integers(1, 200), st.randoms())
def test_what_is_held_never_passes_the_capacity(policy, tokens, random) -> None:
    slots = memory = 0
    for seen in range(1, tokens + 1):
        slots += 1
        if policy.capacity is not None:
            assert slots <= policy.capacity
        if seen % policy.block:
            continue
        scores = torch.tensor([[[random.random() for _ in range(slots)]]])
        decision = policy.decide(Held(slots, memory, scores))
        after, last = 0, 0
        for move in decision:
            match move:
                case Keep(start, stop):
                    assert last <= start <= stop <= slots or start == stop
                    after, last = after + stop - start, max(last, stop)
                case Pick(index):
                    flat = index.flatten().tolist()
                    assert flat == sorted(set(flat))
                    assert last <= flat[0]
                    after, last = after + len(flat), flat[-1] + 1
                case Pool(start, groups, rate, _):
                    assert last <= start
                    after, last = after + groups, max(last, start + groups * rate)
        if isinstance(policy, Compressive):
            raw = decision[-1].stop - decision[-1].start
            memory = after - raw - min(policy.sinks, after)
            assert 0 <= memory <= policy.memory
        if policy.band is not None:
            window = policy.band.window
            kept = seen if window is None else min(seen, policy.band.sinks + window - 1)
            assert after == kept
        slots = after


def test_heavy_hitters_are_those_with_most_attention() -> None:
    scores = torch.tensor([[[5.0, 1.0, 4.0, 4.0, 0.1, 0.1], [0.0, 3.0, 3.0, 3.0, 9.0, 9.0]]])
    pick, keep = HeavyHitter(heavy=2, window=3).decide(Held(6, scores=scores))
    assert pick.index.tolist() == [[[0, 2], [1, 2]]]  # equal scores: the older stays
    assert keep == Keep(4, 6)


def test_snap_keeps_the_neighbours_of_what_is_looked_at() -> None:
    scores = torch.tensor([[[0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 1.0, 5.0]]])
    pick, keep = SnapKV(heavy=3, window=2, neighbours=1).decide(Held(8, scores=scores))
    assert pick.index.tolist() == [[[1, 2, 3]]]
    assert keep == Keep(7, 8)
    pick, _ = SnapKV(heavy=3, window=2, neighbours=0).decide(Held(8, scores=scores))
    assert pick.index.tolist() == [[[0, 2, 6]]]


def test_heads_have_policies_of_their_own() -> None:
    heads = PerHead((KeepAll(), Window(4)))
    assert heads.of_heads(2) == (KeepAll(), Window(4))
    assert (heads.capacity, heads.band, heads.needs_scores) == (None, None, False)
    assert PerHead((HeavyHitter(4, 4), Window(99))).capacity == 99
    assert Window(4).of_heads(3) == (Window(4),) * 3
    with pytest.raises(ValueError, match="has 2 heads; the layer's 3 KV heads are allowed"):
        heads.of_heads(3)
    with pytest.raises(TypeError, match="their policies decide"):
        heads.decide(Held(4))
    with pytest.raises(ValueError, match="one policy for each KV head"):
        PerHead((heads,))


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 500), st.integers(1, 40), st.floats(0.2, 1.8))
def test_a_pyramid_spends_its_budget_in_even_steps(tokens, layers, last) -> None:
    made = pyramid(lambda size: SinkWindow(0, size + 1), tokens, layers, last=last)
    budgets = [policy.window - 1 for policy in made.policies]
    assert sum(budgets) == tokens * layers
    slope = 2 * tokens * (1 - last) / max(1, layers - 1)
    for layer, budget in enumerate(budgets):
        exact = tokens + slope * ((layers - 1) / 2 - layer)
        assert abs(budget - exact) <= 1 + 1e-6


def test_a_wrong_pyramid_is_named() -> None:
    with pytest.raises(ValueError, match=r"last is 3; a number from 0 to 2"):
        pyramid(Window, 64, 4, last=3)
    with pytest.raises(ValueError, match="window is 0"):
        pyramid(Window, 64, 4, last=0)
    with pytest.raises(ValueError, match="layers is 0"):
        pyramid(Window, 64, 0)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "keep-all,block=2",
        "window",
        "window:",
        "window:1.5",
        "window:x",
        "windows:4",
        "window:4,window=5",
        "window:4,blok=3",
        "window:4+sinks:4",
        "sinks:4",
        "heavy:4",
        "compressive:window=4",
        "compressive:window=4,memory=2,rate=2,pooling=conv(a)",
        "layers()",
        "layers(layers(window:4))",
        "heads(layers(window:4))",
        "heads(heads(window:4))",
        "heads()",
        "snap:4",
        "snap:4+window:4,neighbors=3",
    ],
)
def test_a_wrong_spec_is_named_in_one_sentence(spec) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*allowed|^[^\n]*can't[^\n]*$") as error:
        parse(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("window:0", "window is 0"),
        ("window:-4", "window is -4"),
        ("window:4,block=0", "block is 0"),
        ("sinks:-1+window:4", "sinks is -1"),
        ("heavy:0+window:4", "heavy is 0"),
        ("snap:4+window:4,observed=0", "observed is 0"),
        ("snap:4+window:4,observed=65", "observed is 65; at most block, 64"),
        ("heads(window:0; keep-all)", "window is 0"),
        ("compressive:window=4,memory=0,rate=2", "memory is 0"),
        ("compressive:window=4,memory=2,rate=2,pooling=median", "pooling is 'median'"),
        ("compressive:window=4,memory=2,rate=2,pooling=conv(1/2/3)", "3 convolution weights"),
    ],
)
def test_a_wrong_size_is_named(spec, named) -> None:
    with pytest.raises(ValueError, match=named):
        parse(spec)


def test_sizes_that_are_no_whole_numbers_are_refused() -> None:
    for wrong in (True, 4.0, "4", None):
        with pytest.raises(ValueError, match="whole number"):
            Window(wrong)
