"""Steps whose place the device knows give what the cache's own steps give, slot for slot."""

from __future__ import annotations

import pytest
import torch
from tiny import assert_same_but_for_codes, random_ids, tiny, tiny_llama

from attnspan.cache import Dense, Int4, Int8
from attnspan.cache.clock import Clock
from attnspan.models import Cache, attach
from attnspan.policies import parse

SPECS = (
    "keep-all",
    "window:9",
    "window:1",
    "window:9,block=4",
    "sinks:3+window:8",
    "sinks:3+window:8,block=5",
    "heads(keep-all; sinks:3+window:8)",
)
STORAGES = (Dense(), Int8(), Int4(group=8))
PREFIX, TOKENS = 80, 120  # int4's means are known after 64 tokens past the sinks


def steps(model, cache, ids: torch.Tensor, clocked: bool, off: int = 0) -> torch.Tensor:
    """Logits of the tokens behind the prefix, one at a time."""
    outs = []
    with attach(model), torch.inference_mode():
        model(input_ids=ids[:, :PREFIX], past_key_values=cache)
        position = torch.tensor([PREFIX + off])
        for i in range(PREFIX, ids.shape[1]):
            if not clocked:
                outs.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits)
                continue
            with cache.clocked(Clock(position)):
                outs.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits)
            cache.count_step()
            position += 1
    return torch.cat(outs, 1)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_steps_by_a_clock_are_the_cache_s_own(spec, storage) -> None:
    model, ids = tiny_llama(), random_ids(TOKENS, batch=2)
    plain, clocked = (Cache(model, parse(spec), storage) for _ in range(2))
    expected = steps(model, plain, ids, clocked=False)
    got = steps(model, clocked, ids, clocked=True)
    if storage == Dense():
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    else:
        assert_same_but_for_codes(got, expected, 2e-5)
    assert (clocked.tokens_seen, clocked.tokens_held) == (plain.tokens_seen, plain.tokens_held)
    theirs, ours = plain.state()[0], clocked.state()[0]
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        if x.is_floating_point():
            torch.testing.assert_close(x, theirs[name], atol=1e-5, rtol=1e-3)
        else:  # a code may fall to the other side of a half
            assert (x.int() - theirs[name].int()).abs().float().mean() < 0.01, name


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_clock_that_is_off_is_seen(storage) -> None:
    model, ids = tiny_llama(), random_ids(TOKENS)
    expected = steps(model, Cache(model, parse("window:9"), storage), ids, clocked=False)
    got = steps(model, Cache(model, parse("window:9"), storage), ids, clocked=True, off=1)
    assert (got[:, :9] - expected[:, :9]).abs().max() > 1e-3
    with pytest.raises(AssertionError):
        assert_same_but_for_codes(got, expected, 2e-5)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "cohere2", "gpt_neox", "granite"])
def test_other_families_step_by_a_clock(family) -> None:
    model, ids = tiny(family), random_ids(TOKENS)
    caches = [Cache(model, parse("sinks:2+window:30"), Int8()) for _ in range(2)]
    expected = steps(model, caches[0], ids, clocked=False)
    got = steps(model, caches[1], ids, clocked=True)
    assert_same_but_for_codes(got, expected, 2e-5)


@pytest.mark.parametrize(
    ("spec", "storage", "tokens", "why"),
    [
        ("window:9", Dense(), 0, "is empty"),
        ("heavy:4+window:5", Dense(), 20, "decides on the host"),
        ("compressive:window=6,memory=3,rate=2", Dense(), 20, "decides on the host"),
        ("heads(window:9; heavy:4+window:5)", Dense(), 20, "decides on the host"),
        ("sinks:4+window:9", Dense(), 3, "the first 4 tokens go in otherwise, and 3 are in"),
        ("window:9", Int4(group=8), 20, "the first 68 tokens go in otherwise"),
    ],
)
def test_what_can_t_step_by_a_clock_is_refused(spec, storage, tokens, why) -> None:
    model = tiny_llama()
    cache = Cache(model, parse(spec), storage)
    with attach(model), torch.inference_mode():
        if tokens:
            model(input_ids=random_ids(tokens), past_key_values=cache)
        with pytest.raises(ValueError, match=why), cache.clocked(Clock(torch.tensor([tokens]))):
            pass


def test_padded_rows_and_undoing_are_refused() -> None:
    model, ids = tiny_llama(), random_ids(6, batch=2)
    padded, undoing = Cache(model, parse("window:9")), Cache(model, parse("window:9"), rollback=2)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    with attach(model), torch.inference_mode():
        model(input_ids=ids, attention_mask=mask, past_key_values=padded)
        model(input_ids=ids, past_key_values=undoing)
    assert "padded" in str(padded.lacks_step())
    assert "rollback" in str(undoing.lacks_step())
