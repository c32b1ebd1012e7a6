"""What prefill takes above weights and cache: by hand, and against what torch allocates."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from planned import EAGER_ONLY, FAMILIES, planned
from transformers import DynamicCache

from attnspan.evaluation.verify import PEAK, held_bytes, packs, peak_bytes
from attnspan.models import bundled
from attnspan.planner import phases
from attnspan.planner.activations import Peak, prefill_peak
from attnspan.planner.configs import from_config
from attnspan.planner.presets import MODELS, model
from attnspan.planner.spec import ModelSpec

CPU = torch.device("cpu")


def test_theory_by_hand() -> None:
    # Llama 3.1 8B: hidden 4,096, 32 heads of 128, 14,336 wide, bf16; 1,000 tokens of 2 sequences.
    spec, rows = model("llama-3.1-8b"), 2 * 1000
    flash = prefill_peak(spec, 1000, batch=2)
    assert flash.phase == "feed-forward"
    assert flash.bytes == rows * 2 * (4096 + 4096 + 2 * 14_336)
    standard = prefill_peak(spec, 10_000, attention="standard")
    assert standard.phase == "attention"
    assert standard.working == 32 * 10_000 * 10_000 * 2
    assert standard.bytes == standard.working + 10_000 * 2 * 3 * 4096


@pytest.mark.parametrize("name", ["mistral-7b", "deepseek-v3", "gpt-oss-20b"])
@pytest.mark.parametrize("engine", ["theory", "transformers"])
@pytest.mark.parametrize("attention", ["flash", "standard"])
def test_parts_sum_up(name: str, engine: str, attention: str) -> None:
    for chunk in (None, 700):
        peak = prefill_peak(model(name), 5000, attention=attention, engine=engine, chunk=chunk)
        assert sum(size for _, size in peak.parts) == peak.bytes
        assert peak.working <= peak.bytes
        assert all(peak.parts)


def test_chunks_bound_theory() -> None:
    spec = model("llama-3.1-8b")
    whole = prefill_peak(spec, 100_000, attention="standard")
    chunked = prefill_peak(spec, 100_000, attention="standard", chunk=1000)
    assert chunked.working * 100 == whole.working
    assert prefill_peak(spec, 100, chunk=1000) == prefill_peak(spec, 100)


def test_experts_count_where_a_token_takes_them() -> None:
    spec = model("gpt-oss-20b")
    assert spec.experts is not None
    peak = dict(prefill_peak(spec, 1000).parts)
    assert peak["the other half"] == 1000 * spec.experts.active * spec.experts.intermediate * 2


def measured(loaded: Any, tokens: int, batch: int = 1, chunk: int | None = None) -> int:
    cache = DynamicCache(config=loaded.config)
    ids = torch.ones(batch, tokens, dtype=torch.long)

    def prefill() -> None:
        with torch.no_grad():
            for part in ids.split(chunk or tokens, dim=1):
                loaded(part, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return peak_bytes(prefill, CPU) - held_bytes(cache)


def plan(loaded: Any, tokens: int, spec: ModelSpec | None = None, **more: Any) -> Peak:
    eager = loaded.config._attn_implementation == "eager"
    return prefill_peak(
        spec or from_config(loaded.config.to_dict()),
        tokens,
        itemsize=loaded.dtype.itemsize,
        attention="standard" if eager else "flash",
        engine="transformers",
        threads=torch.get_num_threads(),
        packs=packs(loaded.dtype),
        **more,
    )


def implementations(family: str) -> tuple[str, ...]:
    return ("eager",) if family in EAGER_ONLY else ("sdpa", "eager")


# One of each way in which layers are built.
BUILT = [
    "llama",
    "gemma3",
    "phi3",
    "gpt_neox",
    "olmo2",
    "cohere2",
    "gpt_oss",
    "mixtral",
    "deepseek_v3",
    "mistral-sliding",
]
# What is off by more: the planner isn't told what share of a head these rotate.
PARTIAL = {"phi3": 0.02, "gpt_neox": 0.02, "mixtral": 0.002}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_peak_in_fp32(family: str) -> None:
    loaded = planned(family)
    for implementation in implementations(family):
        loaded.set_attn_implementation(implementation)
        real = measured(loaded, 512)
        off = plan(loaded, 512).bytes / real - 1
        assert abs(off) < PARTIAL.get(family, 0.001), (implementation, off)


@pytest.mark.parametrize("family", BUILT)
def test_the_peak_in_bf16_for_a_batch(family: str) -> None:
    loaded = planned(family).to(torch.bfloat16)
    for implementation in implementations(family):
        loaded.set_attn_implementation(implementation)
        off = plan(loaded, 200, batch=2).bytes / measured(loaded, 200, batch=2) - 1
        assert abs(off) < PEAK, (implementation, off)


@pytest.mark.parametrize("family", ["mistral-sliding", "gemma3", "deepseek_v3"])
def test_the_peak_in_chunks(family: str) -> None:
    loaded = planned(family)
    for implementation in implementations(family):
        loaded.set_attn_implementation(implementation)
        for tokens, chunk in ((450, 150), (500, 300)):
            real = measured(loaded, tokens, chunk=chunk)
            off = plan(loaded, tokens, chunk=chunk).bytes / real - 1
            assert abs(off) < 0.01, (implementation, tokens, off)


NARROW = {"intermediate_size": 32}
SHAPES = [
    ("feed-forward", {}, 300),
    ("rotation", NARROW, 190),
    ("attention", NARROW, 1000),
    ("feed-forward", {"intermediate_size": 16, "head_dim": 8}, 300),
]


@pytest.mark.parametrize(("phase", "changes", "tokens"), SHAPES)
def test_each_phase_where_it_is_the_widest(
    phase: str, changes: dict[str, int], tokens: int
) -> None:
    loaded = planned("llama", **changes)
    loaded.set_attn_implementation("sdpa")
    peak = plan(loaded, tokens)
    assert peak.phase == phase
    assert abs(peak.bytes / measured(loaded, tokens) - 1) < 0.001


@pytest.mark.parametrize("heads", [1, 4])
def test_one_kv_head_is_repeated_as_a_view(heads: int) -> None:
    loaded = planned("mistral-sliding", num_key_value_heads=heads)
    for implementation in ("sdpa", "eager"):
        loaded.set_attn_implementation(implementation)
        peak = plan(loaded, 300, batch=2)
        assert "keys and values, a copy for each query head" not in dict(peak.parts)
        assert abs(peak.bytes / measured(loaded, 300, batch=2) - 1) < 0.001


@pytest.mark.parametrize(("tokens", "chunk"), [(1, None), (2, None), (150, 1), (129, 64)])
def test_short_calls(tokens: int, chunk: int | None) -> None:
    loaded = planned("mistral-sliding")
    loaded.set_attn_implementation("sdpa")
    real = measured(loaded, tokens, chunk=chunk)
    assert abs(plan(loaded, tokens, chunk=chunk).bytes / real - 1) < 0.02


@pytest.mark.parametrize(
    ("family", "implementation", "changes"),
    [
        ("llama", "sdpa", {"intermediate": 176}),
        ("llama", "eager", {"heads": 2, "kv_heads": 2}),
        ("mistral-sliding", "sdpa", {"windows": (None, None), "intermediate": 176}),
        ("phi3", "sdpa", {"family": "llama"}),
        ("mixtral", "sdpa", {"experts": None}),
    ],
)
def test_a_wrong_spec_is_a_miss(family: str, implementation: str, changes: dict[str, Any]) -> None:
    loaded = planned(family)
    loaded.set_attn_implementation(implementation)
    spec = from_config(loaded.config.to_dict())
    real = measured(loaded, 512)
    assert abs(plan(loaded, 512, spec).bytes / real - 1) < PEAK
    assert abs(plan(loaded, 512, replace(spec, **changes)).bytes / real - 1) > PEAK


def test_the_measure_sees_what_kernels_allocate() -> None:
    q = torch.ones(1, 4, 256, 32)
    name = torch.nn.functional.scaled_dot_product_attention
    # Its output, a log-sum-exp, and a tile of 64 queries for each thread.
    own = 64 * (256 + 2 + 32) * 4 * torch.get_num_threads()
    assert peak_bytes(lambda: name(q, q, q, is_causal=True), CPU) == q.nbytes + 4 * 256 * 4 + own


def test_the_measure_takes_the_highest_moment() -> None:
    def run() -> None:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(5000, dtype=torch.uint8)
        del first
        third = torch.empty(2000, dtype=torch.uint8)
        del second, third
        torch.empty(100, dtype=torch.uint8)

    assert peak_bytes(run, CPU) == 7000


def test_a_gpu_has_no_tiles_in_memory() -> None:
    spec = model("llama-3.1-8b")
    sizes: dict[str, Any] = {"itemsize": 2, "engine": "transformers"}
    steps = {
        threads: {
            step.name: step.bytes
            for step in phases.steps(
                spec,
                1000,
                1000,
                batch=1,
                itemsize=2,
                eager=False,
                threads=threads,
                packs=False,
            )
        }
        for threads in (None, 2)
    }
    tile = 256 * (512 + 2 + 128) * 4 + 256 * 512 * 2
    assert steps[2]["attention"] - steps[None]["attention"] == 2 * tile
    # bf16 scores, their copy in fp32, and fp32 probabilities.
    peak = prefill_peak(spec, 1000, attention="standard", threads=None, **sizes)
    assert peak.working == 32 * 1000 * 1000 * (2 + 4 + 4)


def test_tiles_of_bf16_lay_keys_and_values_out_anew_where_that_pays() -> None:
    spec = model("llama-3.1-8b")

    def attention(tokens: int, packs: bool, itemsize: int = 2) -> int:
        found = phases.steps(
            spec,
            tokens,
            tokens,
            batch=1,
            itemsize=itemsize,
            eager=False,
            threads=2,
            packs=packs,
        )
        return next(step.bytes for step in found if step.name == "attention")

    # Keys and values of 8 heads once more, and for each thread a block of 512 keys turned around.
    again = 2 * 8 * 1000 * 128 * 2 + 2 * 512 * 128 * 2
    assert attention(1000, True) - attention(1000, False) == again
    for tokens, itemsize in ((1000, 4), (63, 2)):
        assert attention(tokens, True, itemsize) == attention(tokens, False, itemsize)


def test_what_a_gpu_allocated() -> None:
    """The bundled model's prefill of 1,024 tokens with eager attention: measured on an H200."""
    spec = from_config(json.loads((bundled.path() / "config.json").read_text()))
    sizes: dict[str, Any] = {"itemsize": 2, "engine": "transformers", "threads": None}
    assert prefill_peak(spec, 1024, attention="standard", **sizes).bytes == 47_456_256
    assert prefill_peak(spec, 1024, **sizes).bytes == 12_132_352 - 5_242_880


def test_families_that_were_not_followed_say_so() -> None:
    spec = replace(model("llama-3.1-8b"), family="glm4")
    peak = prefill_peak(spec, 100, engine="transformers")
    assert peak.notes == (
        "Layers are taken to be built as Llama's: model type 'glm4' wasn't followed.",
    )
    assert not prefill_peak(model("llama-3.1-8b"), 100, engine="transformers").notes


def test_every_preset_has_a_plan() -> None:
    for name in MODELS:
        for attention in ("flash", "standard"):
            for engine in ("theory", "transformers"):
                assert prefill_peak(model(name), 4096, attention=attention, engine=engine).bytes > 0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tokens": 0}, "tokens is 0; a whole number of at least 1 is allowed"),
        ({"batch": 1.5}, "batch is 1.5; a whole number of at least 1 is allowed"),
        ({"chunk": 0}, "chunk is 0; a whole number of at least 1 is allowed"),
        ({"threads": False}, "threads is False; a whole number of at least 1 is allowed"),
        ({"attention": "sparse"}, "attention 'sparse' is not known; allowed are flash, standard"),
        ({"engine": "vllm"}, "engine 'vllm' is not known; allowed are theory, transformers"),
    ],
)
def test_refusals(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        prefill_peak(model("mistral-7b"), **{"tokens": 8, **given})
