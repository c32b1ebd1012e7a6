"""Captured steps give what uncaptured ones give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_ids, rounded, tiny, tiny_llama

import attnspan as span
from attnspan.cache import Dense, Int4, Int8
from attnspan.cache.clock import Clock
from attnspan.models import Cache, StepGraph, attach
from attnspan.models.step import _compiled, _layers
from attnspan.policies import parse

SPECS = (
    "keep-all",
    "window:9",
    "window:9,block=4",
    "sinks:3+window:8",
    "sinks:3+window:8,block=5",
)
STORAGES = (Dense(), Int8(), Int4())
PREFIX, TOKENS = 80, 120
WIDE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}


def wide(held: torch.dtype = torch.bfloat16) -> Any:
    return rounded(tiny_llama(**WIDE), torch.bfloat16, held).cuda()


def begun(model, ids, spec: str, storage) -> Cache:
    cache = Cache(model, parse(spec), storage)
    with torch.inference_mode():
        model(input_ids=ids[:, :PREFIX], past_key_values=cache)
    return cache


def uncaptured(model, cache: Cache, ids: torch.Tensor, clocked: bool) -> torch.Tensor:
    outs = []
    with torch.inference_mode():
        for i in range(PREFIX, ids.shape[1]):
            if clocked:
                position = torch.tensor([i], device="cuda")
                with cache.clocked(Clock(position, torch.zeros(64, dtype=torch.int32).cuda())):
                    outs.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits)
                cache.count_step()
            else:
                outs.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(outs, 1)


def captured(model, cache: Cache, ids: torch.Tensor, compiled: bool = False) -> torch.Tensor:
    step = StepGraph(model, cache, compiled=compiled)
    outs = [step(ids[:, i]).clone() for i in range(PREFIX, ids.shape[1])]
    return torch.stack(outs, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_a_graph_is_its_steps_bit_for_bit(spec, storage) -> None:
    model, ids = wide(), random_ids(TOKENS, batch=2).cuda()
    with attach(model):
        caches = [begun(model, ids, spec, storage) for _ in range(2)]
        expected = uncaptured(model, caches[0], ids, clocked=True)
        got = captured(model, caches[1], ids)
    assert torch.equal(got, expected)
    for name, x in caches[1].state()[0].items():
        assert torch.equal(x, caches[0].state()[0][name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_a_graph_is_as_near_as_the_loop(spec, storage) -> None:
    """Twice the loop's error against float32, and a rounding more."""
    model, ids = wide(), random_ids(TOKENS).cuda()
    exact = wide(torch.float32)
    with attach(exact):
        expected = uncaptured(exact, begun(exact, ids, spec, storage), ids, clocked=False)
    with attach(model):
        low = uncaptured(model, begun(model, ids, spec, storage), ids, clocked=False)
        got = captured(model, begun(model, ids, spec, storage), ids)
    assert_near(got, low, expected)


# What torch's compiler imports may be deprecated already.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_layers_give_what_eager_ones_give(batch) -> None:
    ids, (model, exact) = random_ids(TOKENS, batch).cuda(), (wide(), wide(torch.float32))
    spec, storage = "sinks:3+window:8", Int8()
    with attach(exact):
        expected = uncaptured(exact, begun(exact, ids, spec, storage), ids, clocked=False)
    with attach(model):
        low = uncaptured(model, begun(model, ids, spec, storage), ids, clocked=False)
        got = captured(model, begun(model, ids, spec, storage), ids, compiled=True)
    assert_near(got, low, expected)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def assert_near(got: torch.Tensor, low: torch.Tensor, expected: torch.Tensor) -> None:
    error, allowed = ((x.double() - expected).abs().mean() for x in (got, low))
    band = torch.finfo(low.dtype).eps * expected.abs().mean()
    assert error <= 2 * allowed + band, f"{error:.2e} beside {allowed:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["mistral-sliding", "qwen2", "gemma3", "gpt_oss", "cohere2"])
def test_other_families_are_captured(family) -> None:
    model, ids = rounded(tiny(family, **WIDE), torch.bfloat16).cuda(), random_ids(TOKENS).cuda()
    spec = "window:9" if family == "mistral-sliding" else "sinks:2+window:30"
    with attach(model):
        low = uncaptured(model, begun(model, ids, spec, Int8()), ids, clocked=False)
        cache = begun(model, ids, spec, Int8())
        got = captured(model, cache, ids)
    scale = low.abs().mean()
    assert (got - low).abs().mean() < 8 * torch.finfo(torch.bfloat16).eps * scale


@pytest.mark.gpu
def test_float32_is_captured_as_well() -> None:
    model, ids = wide(torch.float32), random_ids(TOKENS).cuda()
    with attach(model):
        expected = uncaptured(model, begun(model, ids, "window:9", Dense()), ids, clocked=False)
        got = captured(model, begun(model, ids, "window:9", Dense()), ids)
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)


@pytest.mark.gpu
def test_keep_all_grows_and_prompts_go_in_between() -> None:
    model, ids = wide(), random_ids(700).cuda()
    with attach(model), torch.inference_mode():
        caches = [begun(model, ids, "keep-all", Int8()) for _ in range(2)]
        step = StepGraph(model, caches[1])
        for i in range(PREFIX, 300):  # past the 256 slots of the first allotment
            low = model(input_ids=ids[:, i : i + 1], past_key_values=caches[0]).logits[:, -1]
            got = step(ids[:, i])
            assert (got - low).abs().max() < 0.05 * low.abs().max()
        for cache in caches:
            model(input_ids=ids[:, 300:600], past_key_values=cache)
        low = model(input_ids=ids[:, 600:601], past_key_values=caches[0]).logits[:, -1]
        assert (step(ids[:, 600]) - low).abs().max() < 0.05 * low.abs().max()
        assert caches[0].tokens_seen == caches[1].tokens_seen == 601


@pytest.mark.gpu
def test_greedy_tokens_are_the_largest_logits() -> None:
    model, ids = wide(), random_ids(PREFIX).cuda()
    with attach(model):
        caches = [begun(model, ids, "window:9", Int8()) for _ in range(2)]
        step, again = (StepGraph(model, cache) for cache in caches)
        step(5)
        drawn = step.greedy(20)[0].tolist()
        told, token = [], 5
        for _ in range(20):
            token = int(again(token).argmax())
            told.append(token)
    assert drawn == told


@pytest.mark.gpu
def test_what_a_graph_refuses() -> None:
    model, ids = wide(), random_ids(PREFIX).cuda()
    with attach(model):
        cache = begun(model, ids, "window:9", Int8())
        step = StepGraph(model, cache)
        for token, why in ((None, "the first step takes an id"), (64, "an id from 0 to 63"),
                           (torch.zeros(2, dtype=torch.int64), "ids")):  # fmt: skip
            with pytest.raises(ValueError, match=why):
                step(token)
        with pytest.raises(ValueError, match="decides on the host"):
            StepGraph(model, begun(model, ids, "heavy:4+window:5", Int8()))
    with pytest.raises(ValueError, match="is not attached"):
        step(5)


def test_layers_share_their_compiled_graphs() -> None:
    model, graphs = tiny("mistral", num_hidden_layers=12), []

    def backend(module, inputs):
        graphs.append(module)
        return module

    ids = random_ids(21)
    with attach(model), torch.no_grad():
        cache = Cache(model, parse("window:9"), Int8())
        model(input_ids=ids[:, :20], past_key_values=cache)

        def step() -> torch.Tensor:
            with cache.clocked(Clock(torch.tensor([20]))):
                return model(input_ids=ids[:, 20:], past_key_values=cache).logits

        expected = step()
        with _compiled(_layers(model), backend):
            got = step()
            # A norm, a layer's inputs, its attention's end, its output, its MLP; and once more
            # where the layer's number turns from a constant into an input.
            assert len(graphs) <= 6
            assert torch.equal(step(), got)
    assert torch.equal(got, expected)


def test_a_cpu_is_refused() -> None:
    model = tiny_llama()
    with attach(model), pytest.raises(ValueError, match="CUDA graphs need a CUDA device"):
        span.StepGraph(model, Cache(model, parse("window:9")))


def test_what_is_no_cache_and_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"cache is a NoneType; an attnspan\.Cache is allowed"):
        StepGraph(tiny("mistral"), None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="model is a NoneType; a transformers model"), attach(None):  # pyright: ignore[reportArgumentType]
        pass
