"""Bytes of a cache: by hand, against the policies themselves, and against caches that exist."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import planned
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids, tiny
from transformers import DynamicCache

import attnspan as span
from attnspan.cache import Dense, Int4, Int8, Storage
from attnspan.cache.lane import LayerSpec
from attnspan.evaluation.verify import held_bytes
from attnspan.models.anatomy import Layer
from attnspan.models.budget import resolve
from attnspan.planner import engines
from attnspan.planner.configs import from_config
from attnspan.planner.engines import cache_bytes
from attnspan.planner.held import bytes_per_token, layer_policies, slots
from attnspan.planner.presets import model
from attnspan.planner.spec import ModelSpec
from attnspan.policies import (
    Compressive,
    HeavyHitter,
    KeepAll,
    PerHead,
    PerLayer,
    Policy,
    SinkWindow,
    SnapKV,
    Window,
)
from attnspan.policies.base import Held, Keep, Pick, Pool

STORAGES: tuple[Storage, ...] = (Dense(), Int8(), Int4())

_few = st.integers(1, 40)
POLICIES = st.one_of(
    st.just(KeepAll()),
    st.builds(Window, _few, block=st.integers(1, 9)),
    st.builds(SinkWindow, st.integers(0, 80), _few, block=st.integers(1, 9)),
    st.builds(HeavyHitter, _few, _few, block=st.integers(1, 9)),
    st.builds(SnapKV, _few, _few, observed=st.just(1), block=st.integers(1, 9)),
    st.builds(
        Compressive,
        _few,
        st.integers(1, 20),
        st.integers(1, 7),
        sinks=st.integers(0, 9),
        block=st.integers(1, 12),
        pooling=st.sampled_from(("mean", "most-used")),
    ),
)
PAIRS = st.tuples(POLICIES, POLICIES).map(PerHead)
"""Of a layer with two KV heads."""


@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_a_token_are_those_of_the_storage(head_dim: int, dtype: torch.dtype) -> None:
    for storage in STORAGES:
        try:
            storage.check(head_dim)
        except ValueError as error:
            with pytest.raises(ValueError, match=str(error)):
                bytes_per_token(str(storage), head_dim, dtype.itemsize)
            continue
        expected = storage.bytes_per_token(head_dim, dtype)
        assert bytes_per_token(str(storage), head_dim, dtype.itemsize) == expected


def simulated(policy: Policy, tokens: int) -> int:
    """The most slots that a policy's own decisions leave held, token by token."""
    held = memory = most = 0
    for seen in range(1, tokens + 1):
        held += 1
        most = max(most, held)
        if seen % policy.block:
            continue
        size = 0
        pooled = 0
        scores = torch.zeros(1, 1, held) if policy.needs_scores else None
        decision = policy.decide(Held(held, memory, scores))
        for move in decision:
            match move:
                case Keep(start, stop):
                    size += stop - start
                case Pick(index):
                    size += index.shape[-1]
                case Pool():
                    size, pooled = size + move.groups, pooled + move.groups
        if pooled or memory:
            raw = sum(m.stop - m.start for m in decision[-1:] if isinstance(m, Keep))
            memory = size - raw - min(policy.leading, size)
        held = size
    return most


@settings(max_examples=150, deadline=None)
@given(policy=POLICIES, tokens=st.integers(0, 160))
def test_slots_are_what_the_policy_leaves(policy: Policy, tokens: int) -> None:
    assert slots(policy, None, tokens) == simulated(policy, tokens)


def test_the_simulation_tells_a_window_from_the_next() -> None:
    assert simulated(Window(12), 40) == 12 == slots(Window(12), None, 40)
    assert simulated(Window(13), 40) != slots(Window(12), None, 40)
    # 4 sinks, 3 pooled, up to 1 left over, 4 of the window but the next token, and a block of 4.
    policy = Compressive(5, 3, 2, sinks=4, block=4)
    assert simulated(policy, 60) == slots(policy, None, 60) == policy.capacity - 1
    assert simulated(replace(policy, memory=4), 60) == policy.capacity


def test_slots_within_the_models_window() -> None:
    assert slots(None, None, 100) == 100
    assert slots(None, 12, 100) == 12
    assert slots(None, 12, 5) == 5
    assert slots(SinkWindow(4, 20), 12, 100) == 12


def test_theory_by_hand() -> None:
    # Llama 3.1 8B: 32 layers, keys and values, 8 heads of 128 in bf16: 131,072 bytes a token.
    assert cache_bytes(model("llama-3.1-8b"), 1000).total == 1000 * 2 * 32 * 8 * 128 * 2
    # Mistral 7B v0.1: a window of 4,096 that counts the token itself.
    mistral = cache_bytes(model("mistral-7b"), 131_072)
    assert mistral.total == 4096 * 131_072
    assert mistral.full_pages == 131_072 * 131_072
    # int8: 2 x (128 + 2) bytes a head.
    assert cache_bytes(model("mistral-7b"), 10, storage="int8").total == 10 * 32 * 8 * 260
    # DeepSeek V3: 61 layers of 512 + 64 numbers.
    assert cache_bytes(model("deepseek-v3"), 10, batch=3).total == 3 * 10 * 61 * 576 * 2


def test_heads_hold_what_their_own_policies_leave() -> None:
    spec = replace(model("mistral-7b"), layers=2, kv_heads=3, windows=(None, 12))
    heads = PerHead((KeepAll(), SinkWindow(4, 6), SinkWindow(4, 6)))
    full, sliding = cache_bytes(spec, 100, policy=heads).layers
    # A head of 128 in bf16: 512 bytes a token.
    assert (full.slots, full.bytes) == (100, 512 * (100 + 10 + 10))
    assert (sliding.slots, sliding.bytes) == (12, 512 * 3 * 12)
    with pytest.raises(ValueError, match="has 3 heads; the layer's 8 KV heads are allowed"):
        cache_bytes(model("mistral-7b"), 100, policy=heads)
    with pytest.raises(ValueError, match="share one latent"):
        cache_bytes(model("deepseek-v3"), 100, policy=heads)
    with pytest.raises(ValueError, match="what heads with policies of their own read isn't"):
        span.plan(spec, context=100, policy=heads)


def test_a_policy_acts_on_full_layers_alone_in_a_hybrid_model() -> None:
    spec = replace(model("mistral-7b"), layers=4, windows=(12, None, 12, None))
    held = cache_bytes(spec, 100, policy=SinkWindow(4, 20))
    assert [layer.slots for layer in held.layers] == [12, 24, 12, 24]
    each = PerLayer((Window(5), Window(6), Window(7), Window(8)))
    assert [x.slots for x in cache_bytes(spec, 100, policy=each).layers] == [12, 6, 12, 8]


def test_layers_that_share_hold_nothing_and_chunks_hold_a_chunk() -> None:
    spec = replace(model("llama-3.1-8b"), layers=4, windows=(None,) * 4, shares=(None, None, 0, 1))
    assert [x.bytes for x in cache_bytes(spec, 10).layers] == [40_960, 40_960, 0, 0]
    chunked = replace(spec, shares=(), windows=(16, None, 16, None), chunked=True)
    assert [x.slots for x in cache_bytes(chunked, 100).layers] == [16, 100, 16, 100]


_windows = st.lists(st.sampled_from((None, 8, 12, 30)), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(windows=_windows, policies=st.lists(POLICIES, min_size=1, max_size=4))
def test_layers_have_the_policies_that_the_cache_gives_them(
    windows: list[int | None], policies: list[Policy]
) -> None:
    policy = policies[0] if len(policies) == 1 else PerLayer(tuple(policies))
    layers = tuple(Layer(LayerSpec(4, 2, 8), window) for window in windows)
    spec = replace(model("llama-2-7b"), layers=len(windows), windows=tuple(windows))
    try:
        expected: tuple[Policy, ...] | str = resolve(policy, layers)
    except ValueError as error:
        expected = str(error)
    try:
        found: tuple[Policy, ...] | str = layer_policies(spec, policy)
    except ValueError as error:
        found = str(error)
    assert found == expected


@pytest.fixture(scope="module")
def attached() -> Iterator[list[tuple[Any, ModelSpec]]]:
    """A model that sees all, one that slides in every layer but one, and one in bf16."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "head_dim": 32}
    models = [tiny("llama", **sizes), tiny("gemma3", **sizes), tiny("qwen3", **sizes)]
    models[2] = models[2].to(torch.bfloat16)
    with span.attach(models[0]), span.attach(models[1]), span.attach(models[2]):
        yield [(each, from_config(each.config.to_dict())) for each in models]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_attnspan_to_the_byte(attached: list[tuple[Any, ModelSpec]], data: st.DataObject) -> None:
    loaded, spec = data.draw(st.sampled_from(attached))
    policy, storage = data.draw(POLICIES | PAIRS), data.draw(st.sampled_from(STORAGES))
    batch = data.draw(st.integers(1, 3))
    # Calls of any size, past int4's warm-up and past where a buffer without a bound grows.
    calls = data.draw(st.lists(st.sampled_from((1, 2, 30, 66, 257, 300)), min_size=1, max_size=4))
    cache = span.Cache(loaded, policy, storage)
    with torch.no_grad():
        for count in calls:
            loaded(random_ids(count, batch), past_key_values=cache, logits_to_keep=1)
    plan = cache_bytes(
        spec,
        sum(calls),
        batch=batch,
        policy=policy,
        storage=storage,
        itemsize=loaded.dtype.itemsize,
        engine="attnspan",
    )
    assert plan.total == cache.nbytes


def test_attnspan_past_several_growths(attached: list[tuple[Any, ModelSpec]]) -> None:
    loaded, spec = attached[0]
    cache, seen = span.Cache(loaded, KeepAll()), 0
    for count in (256, 1, 255, 1, 256, 512, 1200):
        with torch.no_grad():
            loaded(random_ids(count), past_key_values=cache, logits_to_keep=1)
        seen += count
        plan = cache_bytes(spec, seen, itemsize=4, engine="attnspan")
        assert (seen, plan.total) == (seen, cache.nbytes)


@pytest.mark.parametrize(
    ("held", "planned"),
    [
        ((Window(12), Dense()), (Window(13), Dense())),
        ((SinkWindow(0, 16), Int8()), (SinkWindow(4, 12), Int8())),
        ((HeavyHitter(8, 8), Dense()), (Compressive(8, 8, 1, sinks=0), Dense())),
        ((Window(12), Int4()), (Window(12), Int8())),
        ((SnapKV(8, 8), Dense()), (Window(79), Dense())),
        ((PerHead((Window(12), Window(8))), Dense()), (PerHead((Window(12),) * 2), Dense())),
    ],
)
def test_a_plan_of_another_cache_is_off(
    attached: list[tuple[Any, ModelSpec]],
    held: tuple[Policy, Storage],
    planned: tuple[Policy, Storage],
) -> None:
    """Each pair has as many slots, or one more."""
    loaded, spec = attached[0]
    cache = span.Cache(loaded, *held)
    with torch.no_grad():
        loaded(random_ids(100), past_key_values=cache, logits_to_keep=1)
    plans = [
        cache_bytes(spec, 100, policy=p, storage=s, itemsize=4, engine="attnspan").total
        for p, s in (held, planned)
    ]
    assert plans[0] == cache.nbytes != plans[1]


def test_attnspan_notes_what_int4s_warm_up_held() -> None:
    spec = replace(model("llama-3.1-8b"), layers=1, windows=(None,))
    small = cache_bytes(spec, 500, policy=Window(16), storage="int4", engine="attnspan")
    # 16 slots of 128 / 2 x 2 codes, 4 key scales, 2 for values; and the means.
    assert small.total == 8 * (16 * (128 + 8 + 4) + 4 * 128)
    # Dense: 16 slots, and the sums in float64.
    assert str(8 * (16 * 512 + 8 * 128)) in small.notes[0]
    large = cache_bytes(spec, 500, policy=Window(4096), storage="int4", engine="attnspan")
    assert not large.notes


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shares": (None, 0)}, "layers that share keys and values"),
        ({"chunked": True, "windows": (8, None)}, "chunked attention"),
    ],
)
def test_attnspan_refuses_what_its_cache_refuses(changes: dict[str, Any], why: str) -> None:
    spec = replace(model("llama-3.1-8b"), **{"layers": 2, "windows": (None, None), **changes})
    with pytest.raises(ValueError, match=f"engine attnspan: llama-3.1-8b has {why}"):
        cache_bytes(spec, 10, engine="attnspan")
    with pytest.raises(ValueError, match="has latent attention"):
        cache_bytes(model("deepseek-v3"), 10, engine="attnspan")


SHARING = {
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 12,
    "activation_sparsity_pattern": [0.0] * 6,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
}
CHUNKED = {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 16}


def _made(family: str) -> Any:
    if family in planned.MORE:
        short = {"sliding_window": 12} if family in ("gemma2", "olmo3") else {}
        return planned.planned(family, **short)
    if family not in ("gemma3n", "llama4"):
        return tiny(family)
    name, more = ("Gemma3n", SHARING) if family == "gemma3n" else ("Llama4", CHUNKED)
    common = {k: v for k, v in planned.tiny.COMMON.items() if k != "attn_implementation"}
    config = getattr(transformers, f"{name}TextConfig")(**{**common, **more})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("family", [*planned.FAMILIES, "gemma3n", "llama4"])
def test_transformers_to_the_byte(family: str) -> None:
    loaded = _made(family)
    spec = from_config(loaded.config.to_dict())
    for tokens in (5, 30):
        cache, seen = DynamicCache(config=loaded.config), 0
        for call in (tokens, 1, 1, 7, 1):
            with torch.no_grad():
                loaded(random_ids(call, 2), past_key_values=cache, logits_to_keep=1)
            seen += call
            plan = cache_bytes(spec, seen, batch=2, itemsize=4, engine="transformers", call=call)
            assert plan.total == held_bytes(cache)


@settings(max_examples=60, deadline=None)
@given(
    windows=st.lists(st.sampled_from((None, 1, 2, 7, 16)), min_size=1, max_size=4),
    calls=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    batch=st.integers(1, 2),
)
def test_transformers_for_any_windows_and_calls(
    windows: list[int | None], calls: list[int], batch: int
) -> None:
    one = next((window for window in windows if window is not None), None)
    windows = [None if window is None else one for window in windows]
    config = transformers.Gemma2Config(
        num_hidden_layers=len(windows),
        sliding_window=one or 4096,
        layer_types=["full_attention" if w is None else "sliding_attention" for w in windows],
    )
    cache = DynamicCache(config=config)
    for call in calls:
        for layer in range(len(windows)):
            cache.update(torch.ones(batch, 2, call, 8), torch.ones(batch, 2, call, 8), layer)
    spec = replace(
        model("llama-2-7b"), layers=len(windows), windows=tuple(windows), kv_heads=2, head_dim=8
    )
    plan = cache_bytes(
        spec, sum(calls), batch=batch, itemsize=4, engine="transformers", call=calls[-1]
    )
    assert plan.total == held_bytes(cache)


def test_a_slice_keeps_its_tensor_alive() -> None:
    """What the figure is about: 11 tokens are in reach, and the memory of 30 is taken."""
    loaded = tiny("mistral-sliding")
    cache = DynamicCache(config=loaded.config)
    with torch.no_grad():
        loaded(random_ids(30), past_key_values=cache)
    keys: Any = cache.layers[0].keys
    assert keys.shape[2] == 11
    assert keys.untyped_storage().nbytes() == 30 * 2 * 8 * 4 != keys.nbytes
    spec = from_config(loaded.config.to_dict())
    step = cache_bytes(spec, 31, itemsize=4, engine="transformers")
    assert step.layers[0].slots == 12
    assert (
        step.full_pages == cache_bytes(spec, 31, itemsize=4, engine="transformers", call=31).total
    )


def test_latents_are_held_and_older_releases_held_more() -> None:
    plan = cache_bytes(model("deepseek-v3"), 10, engine="transformers")
    assert plan.total == 10 * 61 * 576 * 2
    # 128 heads of 128 + 64 channels of key and 128 of value.
    assert plan.notes[0].endswith(f"values, {10 * 61 * 128 * (192 + 128) * 2} bytes.")


def test_vllm_by_hand() -> None:
    # Three full layers and nine sliding ones: groups of three, none of them padded.
    windows = (128, 128, 128, None) * 3
    spec = replace(model("llama-3.1-8b"), layers=12, windows=windows)
    plan = cache_bytes(spec, 10_000, engine="vllm", batched=1000)
    token = 2 * 8 * 128 * 2
    # 10,000 tokens are 625 pages; 127 + 1,000 are 71, and one more.
    assert [plan.layers[i].slots for i in (3, 0)] == [625 * 16, 72 * 16]
    assert plan.other == 0
    assert plan.total == (3 * 625 + 9 * 72) * 16 * token
    assert plan.full_pages == 12 * 625 * 16 * token
    # Sliding layers never take more than all tokens' pages and one.
    assert cache_bytes(spec, 20, engine="vllm").layers[0].slots == 3 * 16


def test_vllm_pads_groups() -> None:
    # Ten full layers and 52 that slide, as in Gemma 3 27B: six groups of ten, the last of them with
    # eight empty layers (https://docs.vllm.ai/en/latest/design/hybrid_kv_cache_manager/).
    spec = replace(model("llama-3.1-8b"), layers=62, windows=(None,) * 10 + (1024,) * 52)
    plan = cache_bytes(spec, 100_000, engine="vllm")
    pages = -(-(1023 + 2048) // 16) + 1
    assert plan.other == 8 * pages * 16 * 2 * 8 * 128 * 2
    # Twelve and thirteen are near enough: two groups of thirteen.
    near = replace(spec, layers=25, windows=(128,) * 12 + (None,) * 13)
    padded = cache_bytes(near, 1000, engine="vllm")
    assert padded.other == padded.layers[0].bytes


def test_llama_cpp_by_hand() -> None:
    spec = replace(model("llama-3.1-8b"), layers=2, windows=(1024, None), family="gemma2")
    plan = cache_bytes(spec, 10_000, engine="llama.cpp", batch=2)
    token = 2 * 2 * 8 * 128 * 2
    # 10,000 round up to 40 x 256; 1,024 + 512 are 6 x 256 already.
    assert [layer.slots for layer in plan.layers] == [1536, 10_240]
    assert plan.total == (1536 + 10_240) * token
    assert plan.full_pages == 2 * 10_240 * token
    assert cache_bytes(spec, 300, engine="llama.cpp").layers[0].slots == 512


@pytest.mark.parametrize("name", ["mistral-7b", "phi-3-mini-4k"])
def test_llama_cpp_keeps_all_where_it_knows_no_window(name: str) -> None:
    # src/models/llama.cpp, which Mistral's are, has a plain cache; phi3.cpp sets swa_type to none.
    spec = model(name)
    assert spec.sliding_layers
    plan = cache_bytes(spec, 32_768, engine="llama.cpp")
    assert plan.total == 32_768 * spec.kv_bytes()
    assert plan.full_pages is None
    assert "every layer has cells for all tokens" in plan.notes[1]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tokens": -1}, "tokens is -1; a whole number of at least 0 is allowed"),
        ({"batch": 0}, "batch is 0; a whole number of at least 1 is allowed"),
        ({"itemsize": True}, "itemsize is True; a whole number of at least 1 is allowed"),
        ({"engine": "ollama"}, "engine 'ollama' is not known; allowed are theory, attnspan, "),
        ({"storage": "fp4"}, "storage 'fp4' is not known; allowed are dense, int8, int4"),
        ({"page": 32}, "page is 32; engine theory has none, vllm has"),
        ({"engine": "vllm", "call": 1}, "call is 1; engine vllm has none, transformers has"),
        (
            {"engine": "transformers", "policy": Window(8)},
            "policy window:8: engine transformers has no policies; theory and attnspan have",
        ),
        (
            {"engine": "llama.cpp", "storage": Int8()},
            "storage int8: engine llama.cpp has no such codes; theory and attnspan have",
        ),
        (
            {"policy": SinkWindow(4, 4096)},
            r"policy sinks:4\+window:4096 holds up to 4100 tokens; every layer of this model was "
            "trained with a sliding window of 4096, and no more are allowed",
        ),
        (
            {"policy": PerLayer((Window(8),))},
            "policy has 1 layers; the model's 32 are allowed",
        ),
    ],
)
def test_refusals(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        cache_bytes(model("mistral-7b"), **{"tokens": 8, **given})


def test_codes_of_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="storage int8: deepseek-v3 has latent attention"):
        cache_bytes(model("deepseek-v3"), 8, storage="int8")


def test_nothing_seen_is_nothing_held() -> None:
    for engine in engines.ENGINES:
        if engine != "attnspan":
            assert cache_bytes(model("gpt-oss-20b"), 0, engine=engine).total == 0
    assert cache_bytes(model("mistral-7b"), 0, engine="attnspan").total == 0
