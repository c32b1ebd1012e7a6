"""A cache that a ring shares equals the cache of one process, and holds its share of the bytes."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tiny import random_ids, tiny, tiny_llama

from attnspan.cache import Dense, Int4, Int8
from attnspan.models import Cache, attach
from attnspan.policies import parse
from attnspan.ring.simulated import simulate
from attnspan.ring.transport import RingMismatch

SPECS = (
    "keep-all",
    "window:9",
    "window:1",
    "window:9,block=4",
    "sinks:3+window:8",
    "sinks:3+window:8,block=5",
    "sinks:0+window:8",
    "sinks:5+window:1",
    "layers(sinks:2+window:6; keep-all)",
)
TOKENS = 75


def cuts(size: int, tokens: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, tokens)) for at in range(0, tokens, size)]


def logits(model, cache, ids, size) -> torch.Tensor:
    """Of every token, in calls of `size`."""
    with attach(model), torch.inference_mode():
        parts = [
            model(input_ids=ids[:, a:b], past_key_values=cache).logits
            for a, b in cuts(size, ids.shape[1])
        ]
    return torch.cat(parts, 1)


def shared(model, size, make, work):
    """What `work(model, cache, transport)` gives on each rank of a ring of `size`."""

    def run(transport):
        own = deepcopy(model)
        return work(own, make(own, transport), transport)

    return simulate(size, run)


@pytest.fixture(scope="module")
def model():
    return tiny_llama().double()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("spec", SPECS)
def test_logits_equal_one_process(model, spec, ranks) -> None:
    ids = random_ids(TOKENS, batch=2)
    for size in (1, 7, TOKENS):
        alone = Cache(model, parse(spec))
        expected = logits(model, alone, ids, size)

        def work(model, cache, transport, size=size):
            return logits(model, cache, ids, size), cache

        results = shared(model, ranks, lambda m, t: Cache(m, parse(spec), ring=t), work)
        for got, _ in results:
            assert torch.equal(got, results[0][0]), "ranks differ"
            assert (got - expected).abs().max() < 1e-12, f"in calls of {size}"
        held = [cache.tokens_held for _, cache in results]
        assert alone.tokens_held <= sum(held) < alone.tokens_held + 2 * ranks
