"""What the processes of the shared cache's tests run."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from ring.test_shared_cache import logits, yarn_llama
from tiny import assert_same_but_for_codes, random_ids, tiny_llama

from attnspan.cache import Int8
from attnspan.models import Cache, attach
from attnspan.policies import parse
from attnspan.ring import RingMismatch

SPEC, TOKENS = "sinks:4+window:28", 400


def streamed(model, cache) -> tuple[torch.Tensor, set[int]]:
    """The logits of a stream in calls of 40, 1, 3, 17, 1, ... tokens; the bytes held meanwhile."""
    ids, sizes = random_ids(TOKENS), itertools.chain([40], itertools.cycle((1, 3, 17)))
    outs, held, at = [], set(), 0
    while at < TOKENS:
        size = next(sizes)
        outs.append(logits(model, cache, ids[:, at : at + size], size))
        held.add(cache.nbytes)
        at += size
    return torch.cat(outs, 1), held


def everything(rank: int, size: int) -> dict[str, Any]:
    """A stream on the default group, which is as in this process alone, and what it took."""
    with attach(yarn_llama()) as model:
        cache = Cache(model, parse(SPEC), Int8(), ring=dist.group.WORLD)
        sent = -cache.ring.transport.sent
        got, held = streamed(model, cache)
        sent += cache.ring.transport.sent
        alone = Cache(model, parse(SPEC), Int8())
        expected, whole = streamed(model, alone)
        prompt = random_ids(11)
        settings = {"max_new_tokens": 20, "do_sample": False}
        drawn = [
            model.generate(
                prompt, past_key_values=Cache(model, parse(SPEC), Int8(), ring=ring), **settings
            )
            for ring in (dist.group.WORLD, None)
        ]
    assert_same_but_for_codes(got, expected, 2e-5)
    return {
        "same generated": torch.equal(*drawn),
        "held": sorted(held),
        "whole": sorted(whole),
        "total": cache.total_nbytes,
        "tokens held": cache.tokens_held,
        "sent": sent,
        "sum": got.double().sum().item(),
    }


def mismatch(rank: int, size: int) -> tuple[str, int, list[float]]:
    """What each rank is told when their tokens differ, and that the stream goes on."""
    with attach(tiny_llama()) as model:
        cache = Cache(model, parse("window:9"), ring=dist.group.WORLD)
        logits(model, cache, random_ids(12))
        told = ""
        try:
            logits(model, cache, random_ids(4, seed=rank))
        except RingMismatch as error:
            told = str(error)
        return told, cache.tokens_seen, logits(model, cache, random_ids(4))[0, -1, :3].tolist()
