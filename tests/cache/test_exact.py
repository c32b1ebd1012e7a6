"""Caches equal the plain program: first what is held, then the logits, at every step."""

from __future__ import annotations

import itertools

import pytest
import torch
from plain import PlainLlama
from tiny import tiny_llama

from attnspan.cache.heads import HeadLanes
from attnspan.models import Cache, attach
from attnspan.policies import PerLayer, parse

TOKENS = 75
SPECS = (
    "keep-all",
    "window:9",
    "window:9,block=4",
    "window:1",
    "sinks:3+window:8",
    "sinks:3+window:8,block=5",
    "sinks:0+window:8",
    "sinks:4+window:1",
    "heavy:5+window:6,block=1",
    "heavy:5+window:6,block=8",
    "heavy:7+window:1,block=3",
    "compressive:window=7,memory=3,rate=4,block=1",
    "compressive:window=6,memory=4,rate=3,pooling=max,sinks=2,block=8",
    "compressive:window=6,memory=4,rate=3,pooling=most-used,block=5",
    "compressive:window=5,memory=2,rate=2,pooling=conv(0.75/0.5),sinks=0,block=16",
    "compressive:window=4,memory=2,rate=1,block=16",
    "layers(sinks:2+window:6; heavy:4+window:5,block=4)",
    "snap:6+window:5,observed=3,block=8",
    "snap:6+window:1,observed=8,neighbours=0,block=8",
    "snap:5+window:4,observed=1,neighbours=9,block=1",
    "heads(keep-all; sinks:2+window:6)",
    "heads(snap:5+window:4,observed=2,block=4; heavy:5+window:4,block=8)",
    "layers(heads(sinks:2+window:6; snap:6+window:5,observed=3,block=8); window:9)",
)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return torch.randint(0, 64, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def run(model, policy, tokens: list[int], cuts: list[int], forget: int | None = None):
    """Logits (tokens, vocabulary), and what each layer held after each call."""
    cache = Cache(model, policy)
    logits, held = [], []
    with attach(model), torch.inference_mode():
        for start, stop in itertools.pairwise([0, *itertools.accumulate(cuts)]):
            ids = torch.tensor([tokens[start:stop]])
            logits.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0])
            held.append([layer.lanes[0] for layer in cache.caches])
    return torch.cat(logits), cache


def cuts_of(size: int) -> list[int]:
    whole, rest = divmod(TOKENS, size)
    return [size] * whole + [rest] * bool(rest)


@pytest.mark.parametrize("spec", SPECS)
def test_logits_equal_the_plain_program(model, tokens, spec) -> None:
    policy = parse(spec)
    plain = PlainLlama(model, list(policy.policies) if isinstance(policy, PerLayer) else policy)
    expected = plain.run(tokens)
    for size in (1, 7, 64, TOKENS):
        got, cache = run(model, policy, tokens, cuts_of(size))
        for layer, lane in zip(plain.layers, cache.caches, strict=True):
            for own, expected_positions in zip(
                held_positions(lane.lanes[0]), layer.positions(), strict=True
            ):
                assert own in (None, expected_positions)
        assert (got.double() - expected).abs().max() < 2e-5, f"in calls of {size}"


def held_positions(lane) -> list[list[int] | None]:
    """The stream positions in a lane's slots, per head; None where the lane doesn't keep them."""
    if isinstance(lane, HeadLanes):
        found = {
            head: own
            for heads, each in zip(lane.groups, lane.lanes, strict=True)
            for head, own in zip(heads, held_positions(each), strict=True)
        }
        return [found[head] for head in sorted(found)]
    if "positions" not in lane.extra:
        return [None] * lane.spec.num_kv_heads
    return lane.extra["positions"][0, :, : lane.tokens_held, 0].tolist()


def test_which_queries_count_is_seen(model, tokens) -> None:
    spec = "snap:6+window:5,observed=3,block=8"
    plain = PlainLlama(model, parse(spec))
    plain.layers[1].late = 1
    _, cache = run(model, parse(spec), tokens, [TOKENS])
    plain.run(tokens)
    assert held_positions(cache.caches[1].lanes[0]) != plain.layers[1].positions()


@pytest.mark.parametrize(
    "spec",
    [
        "sinks:3+window:8",
        "heavy:5+window:6,block=1",
        "snap:6+window:5,observed=3,block=8",
        "heads(keep-all; sinks:2+window:6)",
    ],
)
def test_a_mutated_eviction_is_seen(model, tokens, spec) -> None:
    plain = PlainLlama(model, parse(spec))
    plain.layers[1].forget = 20
    got, _ = run(model, parse(spec), tokens, [TOKENS])
    assert (got.double() - plain.run(tokens)).abs().max() > 1e-3
