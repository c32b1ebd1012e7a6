"""Plans against hand arithmetic, and what must hold of all of them."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attnspan
from attnspan.planner import plan as module
from attnspan.planner.activations import prefill_peak
from attnspan.planner.explain import Line
from attnspan.planner.links import DEVICES, LINKS
from attnspan.planner.plan import Plan, plan
from attnspan.planner.presets import MODELS, model
from attnspan.planner.ring import Heads, decode_cost
from attnspan.planner.stack import CACHE, product
from attnspan.policies import Compressive, HeavyHitter, SinkWindow, Window

H100 = DEVICES["h100"]
# Arithmetic, and nothing else.
ALLOWED = {"__builtins__": {}, "min": min, "max": max, "sum": sum, "range": range, "round": round}

HOWS: tuple[dict[str, Any], ...] = (
    {},
    {"policy": "sinks:4+window:1020", "storage": "int8", "batch": 3},
    {"policy": "heavy:512+window:449", "weights": "int8"},
    {"policy": "compressive:window=634,memory=256,rate=4", "storage": "int4", "weights": "int4"},
    {"pattern": "Strided(512, 64)"},
    {"pattern": "Blockwise(1000, before=True)"},
    {"pattern": "SlidingWindow(100) | Sinks(4)"},
    {"pattern": "Full()"},
    {"devices": 8, "batch": 2, "storage": "int8"},
    {"engine": "attnspan", "storage": "int8"},
    {"engine": "transformers"},
    {"engine": "vllm"},
    {"engine": "llama.cpp"},
    {"chunk": 512},
)


def test_mistral_by_hand() -> None:
    """Mistral 7B v0.1: 32 layers of 32 query and 8 KV heads of 128, a window of 4,096."""
    found = plan("mistral-7b", 100_000)
    token = 2 * 8 * 128 * 2  # keys and values, 8 heads of 128, bf16: 4,096 bytes in a layer
    assert found.cache.total == 32 * 4096 * token == 536_870_912
    # Of a layer: queries and output 4096 x 4096, keys and values 4096 x 1024, three of 4096 x 14336
    # in the feed-forward, two norms; then a norm, the embedding and the output layer.
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    matrices = 32 * layer + 4096
    assert matrices == 6_979_588_096
    assert found.weights == 2 * (matrices + 2 * 32_000 * 4096) == 14_483_464_192
    # Two operations for each weight and token; the output layer for the last token.
    assert found.prefill.linear == 2 * (100_000 * matrices + 32_000 * 4096)
    pairs = 100_000 * 4096 - 4095 * 4096 // 2
    assert found.prefill.attention == 32 * 32 * 4 * 128 * pairs
    assert found.prefill.bytes == 2 * (matrices + 32_000 * 4096) + 2 * 100_000 * 32 * token
    computing = found.prefill.linear / 680e12 + found.prefill.attention / 660e12
    assert found.prefill.seconds == pytest.approx(computing + 32 * 28e-6, rel=1e-12)
    assert found.prefill.bound == "compute"
    assert found.working.head == 2 * 100_000**2
    assert found.working.standard == 32 * 2 * 100_000**2
    assert found.working.flash == 32 * 4 * 100_000
    assert found.total == found.weights + found.cache.total + found.activations.bytes
    assert found.memory == 80 * 10**9
    assert (found.fits, found.spare) == (True, 80 * 10**9 - found.total)


def test_llama_3_decodes_by_hand() -> None:
    """Llama 3 8B, its 8,192nd token: all weights but the embedding, and 8,192 keys and values."""
    step = plan("llama-3-8b", 8192).decode
    assert step is not None
    matrices = 8_030_261_248 - 2 * 128_256 * 4096
    read = 2 * (matrices + 128_256 * 4096) + 8192 * 131_072
    assert step.bytes == read == 16_083_591_168
    assert step.linear == 2 * (matrices + 128_256 * 4096)
    assert step.attention == 32 * 32 * 4 * 128 * 8192
    assert step.seconds == pytest.approx(read / 3.35e12 + 32 * 28e-6, rel=1e-12)
    assert step.bound == "memory"
    assert step.intensity == step.operations / read
    assert step.ridge == 680e12 / 3.35e12


def test_mixtral_by_hand() -> None:
    """8 experts of which a token takes 2; a batch of 4 takes 8 * (1 - 0.75^4) = 5.47 of them."""
    spec = model("mixtral-8x7b")
    one = 3 * 4096 * 14336 * 32  # an expert, in all layers
    matrices = spec.parameters - 2 * 32_000 * 4096
    for batch, experts in ((1, 2.0), (4, 5.46875)):
        found = plan(spec, 32_768, batch=batch)
        assert found.decode is not None
        weights = matrices - (8 - experts) * one
        held = batch * 32_768 * 131_072
        assert found.decode.bytes == 2 * weights + 2 * 32_000 * 4096 + held
        assert found.decode.linear == 2 * batch * (matrices - 6 * one + 32_000 * 4096)
        # A prefill reads all of them.
        assert found.prefill.bytes == 2 * (matrices + 32_000 * 4096) + 2 * held
        assert any(f"reads {experts:.4g} of them" in note for note in found.notes)


def test_gemma_3_by_hand() -> None:
    """Gemma 3 27B: 52 layers of 62 have a window of 1,024; 16 KV heads of 128."""
    found = plan("gemma-3-27b", 131_072)
    token = 2 * 16 * 128 * 2
    sliding, full = found.kinds
    assert (sliding.name, sliding.layers, sliding.held, sliding.read) == ("sliding", 52, 1024, 1024)
    assert (full.name, full.layers, full.held, full.read) == ("full", 10, 131_072, 131_072)
    assert sliding.bytes == 52 * 1024 * token
    assert full.bytes == 10 * 131_072 * token
    assert found.cache.total == sliding.bytes + full.bytes
    assert found.cache.full_pages == 62 * 131_072 * token
    assert sliding.pairs == 131_072 * 1024 - 1023 * 1024 // 2
    assert full.pairs == 131_072 * 131_073 // 2
    # A policy acts on the full layers alone.
    windowed = plan("gemma-3-27b", 131_072, policy=SinkWindow(4, 2044))
    assert [kind.held for kind in windowed.kinds] == [1024, 2048]
    # One matrix embeds and gives logits: a decoded token reads it.
    assert found.decode is not None
    held = 52 * 1024 * token + 10 * 131_072 * token
    assert found.decode.bytes == 2 * found.spec.parameters + held


CHUNKED = {
    "model_type": "llama4_text",
    "num_hidden_layers": 8,
    "hidden_size": 256,
    "intermediate_size": 512,
    "intermediate_size_mlp": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "attention_chunk_size": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
}
SHARED = {
    "model_type": "gemma3n_text",
    "num_hidden_layers": 10,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "sliding_window": 128,
    "num_kv_shared_layers": 4,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
}


def test_chunks_by_hand() -> None:
    """Three layers of four see their own chunk of 128; token 5,000 is the 8th of its chunk."""
    chunked, full = plan(CHUNKED, 5000).kinds
    assert (chunked.name, chunked.layers, chunked.held, chunked.read) == ("chunked", 6, 128, 8)
    assert chunked.pairs == 39 * 128 * 129 // 2 + 8 * 9 // 2
    assert (full.layers, full.read, full.pairs) == (2, 5000, 5000 * 5001 // 2)


def test_shared_keys_by_hand() -> None:
    """The last 4 of 10 layers hold nothing, and read what earlier layers hold."""
    found = plan(SHARED, 5000)
    token = 2 * 2 * 32 * 2
    assert {kind.name: (kind.layers, kind.held, kind.read) for kind in found.kinds} == {
        "sliding": (5, 128, 128),
        "full": (1, 5000, 5000),
        "sliding, shared": (3, 0, 128),
        "full, shared": (1, 0, 5000),
    }
    assert found.cache.total == (5 * 128 + 5000) * token
    assert found.decode is not None
    reads = (8 * 128 + 2 * 5000) * token
    weights = found.decode.bytes - reads
    assert weights == 2 * (found.spec.parameters - found.spec.aside)
    patterned = plan(SHARED, 5000, pattern="SlidingWindow(100)")
    assert patterned.cache.total == 6 * 100 * token
    # Prefill writes what six layers hold, and all ten read.
    assert found.prefill.bytes == weights + 5000 * token * (6 + 10)


@pytest.mark.parametrize("chunk", [None, 2048])
def test_the_prefill_of_transformers_holds_what_its_slices_keep_alive(chunk: int | None) -> None:
    """Mistral 7B: each layer joins the 4,095 tokens before with all of the last call."""
    n = 32_768
    found = plan("mistral-7b", n, engine="transformers", chunk=chunk)
    peak = prefill_peak(
        found.spec, n, engine="transformers", chunk=chunk, threads=None
    )  # above the cache that the prefill leaves
    held = n if chunk is None else 4095 + chunk
    assert found.cache.total == 32 * (4096 * 4096 + 8)
    assert found.total == found.weights + 32 * (held * 4096 + 8) + peak.bytes
    assert sum(count for _, count in found.activations.parts) == found.activations.bytes


def test_a_token_that_takes_all_experts() -> None:
    config = {
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
    }
    found = plan(config, 100, batch=3)
    step = found.decode
    assert step is not None
    # All but the embedding, and the keys of all 100 tokens in both layers.
    rows = found.spec.vocabulary * found.spec.hidden
    assert step.bytes == found.weights - 2 * rows + 3 * 2 * 100 * found.token_bytes
    for line in found.explain():
        assert eval(line.numbers, ALLOWED) == pytest.approx(line.value)


def test_latents_by_hand() -> None:
    """DeepSeek V3: 512 + 64 numbers of a token in each of 61 layers; keys are 192 wide, values 128,
    and a decoded token reads latents."""
    found = plan("deepseek-v3", 10_000)
    assert found.token_bytes == (512 + 64) * 2
    assert found.cache.total == 61 * 10_000 * 1152
    assert found.prefill.attention == 61 * 128 * (2 * 192 + 2 * 128) * (10_000 * 10_001 // 2)
    assert found.decode is not None
    assert found.decode.attention == 61 * 128 * (2 * 576 + 2 * 512) * 10_000
    assert [each.ratio for each in found.stack if each.quantity == CACHE] == [
        2 * 128 * 192 / 576  # of 128 heads' keys and values, each 192 wide
    ]


def test_weights_of_fewer_bits_by_hand() -> None:
    matrices, rest = 6_979_588_096, 2 * 2 * 32_000 * 4096
    scales = 2 * -(-matrices // 128)
    assert plan("mistral-7b", 1, weights="int8").weights == matrices + scales + rest
    assert plan("mistral-7b", 1, weights="int4").weights == matrices // 2 + scales + rest


def test_a_ring_by_hand() -> None:
    """8 devices: a device holds all weights and an eighth of the keys and values."""
    found = plan("llama-3.1-8b", 131_072, devices=8, batch=2)
    assert found.ring is not None
    assert found.cache.total == 2 * 131_072 * 131_072
    assert found.cache_share == found.cache.total // 8
    assert found.weights == 2 * 8_030_261_248
    assert found.prefill.seconds == 2 * found.ring.seconds
    # As the ring's own model: residual stream, norm and feed-forward; two rounds, outputs in fp32.
    shard = 16_384
    assert found.working.head == 2 * shard * 131_072
    assert found.working.standard == 2 * 32 * found.working.head
    assert found.working.flash == 2 * 32 * 4 * shard
    activations = 2 * shard * (2 * 4096 + 2 * 14_336)
    extra = 2 * shard * 2 * 8 * 128 * 2 + 129 * 32 * 4 * shard
    assert found.activations.bytes == activations + extra
    assert found.total == found.weights + found.cache_share + activations + extra
    one = plan("llama-3.1-8b", 131_072, devices=8)
    assert one.decode is not None
    each = decode_cost(131_072, 8, Heads(32, 8, 128), module.Machine(H100, LINKS["ib"]))
    weights = 2 * (8_030_261_248 - 128_256 * 4096)
    assert one.decode.seconds == pytest.approx(weights / 3.35e12 + 32 * each.seconds, rel=1e-9)
    # A window's few tokens lie evenly over the devices too.
    small = plan("llama-3.1-8b", 131_072, devices=8, policy=SinkWindow(4, 4092), storage="int8")
    assert small.cache_share == 32 * 512 * 8 * 2 * 130


def test_a_ring_that_does_not_divide_the_context() -> None:
    """10 tokens on 3 devices: the fullest has 4."""
    found = plan("llama-3-8b", 10, devices=3)
    assert found.cache_share == 4 * 131_072
    assert found.decode is not None
    weights = 2 * (8_030_261_248 - 128_256 * 4096)
    assert found.decode.bytes == weights + 4 * 131_072
    assert found.decode.attention == 32 * 32 * 4 * 128 * 4


def test_what_fills_the_memory_fits() -> None:
    total = plan("llama-3-8b", 1000).total
    for memory, fits in ((total, True), (total - 1, False)):
        found = plan("llama-3-8b", 1000, memory=memory)
        assert (found.fits, found.spare) == (fits, memory - total)
        assert ("doesn't fit, 1 B too much" in str(found)) is not fits


@pytest.mark.parametrize(
    ("policy", "held"),
    [
        (Window(1024), 1024),
        (SinkWindow(4, 1020), 1024),
        (HeavyHitter(512, 449), 512 + 449 - 1 + 64),
        (Compressive(634, 256, 4), 4 + 256 + 3 + 633 + 64),
    ],
)
def test_policies_hold_what_they_may(policy: Any, held: int) -> None:
    found = plan("llama-3.1-8b", 100_000, policy=policy)
    assert found.kinds[0].held <= held
    assert found.kinds[0].held >= held - 3  # what isn't pooled yet comes and goes
    assert found.cache.total == 32 * found.kinds[0].held * 4096


def test_patterns_hold_what_later_queries_see() -> None:
    for pattern, held, read in (
        ("Strided(2048, 64)", 100_000, 2048 + (99_999 // 64 - 31)),
        ("Blockwise(4096)", 4096, 99_999 % 4096 + 1),
        ("Blockwise(4096, before=True)", 8192, 99_999 % 4096 + 1 + 4096),
        ("Longformer(4032, 64)", 4096, 4096),
        ("SlidingWindow(1000) | Sinks(4)", 1004, 1004),
    ):
        (kind,) = plan("llama-3.1-8b", 100_000, pattern=pattern).kinds
        assert (kind.held, kind.read) == (held, read), pattern
    ahead = plan("llama-3.1-8b", 1000, pattern="Full()")
    assert ahead.decode is None
    assert "can't decode" in ahead.notes[0]
    assert "one token" not in str(ahead)


def test_the_stack_multiplies_to_the_whole() -> None:
    found = plan("llama-2-70b", 100_000, policy="window:10000", storage="int8")
    ratios = [each.ratio for each in found.stack if each.quantity == CACHE]
    assert ratios[:2] == [8, 10]  # 64 query heads for 8 KV heads; a tenth of the tokens
    assert ratios[2] == pytest.approx(256 / 130)
    assert product(found.stack) == pytest.approx(8 * 10 * 256 / 130)
    assert found.stack[-1].quantity != CACHE
    assert found.stack[-1].ratio == 2 * 100_000 / 4  # scores in bf16, a log-sum-exp in fp32


def evaluates(line: Line) -> bool:
    found = eval(line.numbers, ALLOWED)
    if isinstance(line.value, int):
        return found == line.value
    return found == pytest.approx(line.value, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name in ("llama-3-8b", "gemma-3-4b", "mixtral-8x7b", CHUNKED, SHARED)
        for how in HOWS
        # Neither attnspan's cache nor a ring holds chunks or shared keys.
        if isinstance(name, str) or not (how.get("engine") == "attnspan" or "devices" in how)
    ],
    ids=lambda each: str(each)[:40],
)
def test_every_formula_gives_its_figure(name: str | dict[str, Any], how: dict[str, Any]) -> None:
    lines = plan(name, 5000, **how).explain()
    assert all(evaluates(line) for line in lines)
    for line in lines:  # what is printed is the same
        numbers, _, value = str(line).splitlines()[1].strip().rpartition(" = ")
        figure = float(value.split()[0].replace(",", ""))
        assert eval(numbers, ALLOWED) == pytest.approx(figure, rel=1e-5)


def test_explained_are_all_figures_of_the_report() -> None:
    found = plan("gemma-3-4b", 5000, storage="int8", batch=2)
    values = {line.value for line in found.explain()}
    assert found.decode is not None
    for phase in (found.prefill, found.decode):
        wanted = {phase.linear, phase.attention, phase.bytes, phase.seconds, phase.intensity}
        assert wanted <= values
    assert {found.cache.total, found.weights, found.activations.bytes, found.total} <= values
    assert {found.spare, found.working.head, found.working.standard} <= values
    assert {kind.pairs for kind in found.kinds} <= values
    wrong = found.explain()[0]
    assert not evaluates(Line("", "", wrong.numbers + " + 1", wrong.value, ""))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(MODELS),
    st.integers(1, 300_000),
    st.integers(1, 300_000),
    st.integers(1, 64),
    st.sampled_from(["theory", "attnspan", "transformers", "vllm", "llama.cpp"]),
)
def test_nothing_falls_as_context_or_batch_grows(
    name: str, first: int, second: int, batch: int, engine: str
) -> None:
    low, high = sorted((first, second))
    engine = "theory" if engine == "attnspan" and model(name).latent is not None else engine
    small = plan(name, low, engine=engine)
    for large in (plan(name, high, engine=engine), plan(name, low, engine=engine, batch=batch)):
        assert small.total <= large.total
        assert small.cache.total <= large.cache.total
        assert small.prefill.operations <= large.prefill.operations
        assert small.decode is not None
        assert large.decode is not None
        assert small.decode.bytes <= large.decode.bytes


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["llama-3.1-8b", "qwen3-4b", "gemma-3-12b", "gpt-oss-20b"]),
    st.integers(1, 200_000),
    st.integers(100, 8000),
    st.sampled_from(["dense", "int8", "int4"]),
)
def test_policies_hold_and_read_no_more_than_full(
    name: str, context: int, window: int, storage: str
) -> None:
    full = plan(name, context, storage=storage)
    for policy in (
        Window(window),
        SinkWindow(4, window),
        HeavyHitter(window, window),
        Compressive(window, window, 4),
    ):
        some = plan(name, context, storage=storage, policy=policy)
        assert some.cache.total <= full.cache.total
        assert some.prefill.attention <= full.prefill.attention
        assert some.decode is not None
        assert full.decode is not None
        assert some.decode.bytes <= full.decode.bytes
    assert plan(name, context, storage=storage, policy="keep-all").cache == full.cache


def test_the_comparison() -> None:
    found = plan("mistral-7b", 100_000)
    rows = {row.name: row for row in found.compare()}
    assert list(rows) == [
        "full",
        "as it is",
        "window",
        "sinks + window",
        "H2O",
        "compressive",
        "strided",
        "blockwise",
        "Longformer",
    ]
    full, window = rows["full"], rows["window"]
    assert full.cache == 100_000 * 131_072
    assert full.pairs == 32 * 5_000_050_000
    assert window.cache == found.cache.total
    assert window.pairs == 32 * found.kinds[0].pairs
    assert window.cache_ratio == full.cache / window.cache
    assert found.decode is not None
    assert window.decode_bytes == found.decode.bytes
    assert (full.sees, window.sees) == ("", "window:4096")
    assert rows["H2O"].sees == "heavy:2048+window:1985"
    assert rows["strided"].cache == full.cache  # its queries see every key in turn
    assert rows["blockwise"].pairs < window.pairs
    # Each holds the budget at most.
    for name in ("window", "sinks + window", "H2O", "compressive", "blockwise", "Longformer"):
        assert rows[name].cache <= window.cache
    with pytest.raises(ValueError, match="up to the smallest, 4096, are allowed"):
        found.compare(5000)
    with pytest.raises(ValueError, match="budget is 3; a whole number of at least 16"):
        found.compare(3)


def test_of_a_hybrid_the_sliding_layers_stay() -> None:
    rows = {row.name: row for row in plan("gemma-3-4b", 100_000).compare(2048)}
    token = 2 * 4 * 256 * 2
    assert rows["full"].cache == 34 * 100_000 * token
    assert rows["as it is"].cache == (29 * 1024 + 5 * 100_000) * token
    assert rows["window"].cache == (29 * 1024 + 5 * 2048) * token == rows["blockwise"].cache


def report_lines(found: Plan) -> list[str]:
    return str(found).splitlines()


@pytest.mark.parametrize("name", MODELS)
def test_reports_are_a_hundred_columns_wide_and_json(name: str) -> None:
    found = plan(name, 1_000_000, batch=16)
    assert max(map(len, report_lines(found))) <= 100
    held = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert held["total"] == found.total
    assert held["device"]["source"]
    assert held["model"]["source"].startswith(("https://", "src/"))


def test_notes() -> None:
    beyond = plan("llama-3-8b", 131_072)
    assert "trained for 8,192 positions; 131,072 tokens are beyond" in beyond.notes[0]
    assert not plan("llama-3-8b", 8192).notes
    hybrid = plan("gpt-oss-20b", 100_000, engine="llama.cpp")
    assert any("room for all tokens" in note for note in hybrid.notes)
    assert any("received" in n for n in plan("llama-3-8b", 999, policy="heavy:8+window:8").notes)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"context": 0}, "context is 0; a whole number from 1 to 2147483647 is allowed"),
        ({"context": "128K"}, "context is '128K'; a whole number"),
        ({"context": True}, "context is True"),
        ({"batch": 0}, "batch is 0"),
        ({"devices": 2000}, "devices is 2000; a whole number from 1 to 1024"),
        ({"chunk": 0}, "chunk is 0"),
        ({"memory": 0}, "memory is 0"),
        ({"memory": "80 bananas"}, "memory '80 bananas' is no size"),
        ({"storage": "int3"}, "storage 'int3' is not known; allowed are dense, int8, int4"),
        ({"weights": "fp8"}, "weights 'fp8' is not known; allowed are bf16, int8, int4"),
        ({"engine": "exllama"}, "engine 'exllama' is not known"),
        ({"device": "tpu"}, "device 'tpu' is not known; allowed are h200, h100,"),
        ({"link": "ib"}, "link is ib with one device"),
        ({"link": "rope", "devices": 2}, "link 'rope' is not known"),
        ({"policy": "window"}, "policy 'window' is not known"),
        ({"pattern": "Sparse()"}, "pattern 'Sparse()' has 'Sparse()' in it"),
        ({"policy": "window:9", "pattern": "Causal()"}, "one of them is allowed"),
        ({"policy": "window:9", "engine": "vllm"}, "engine vllm has no policies"),
        ({"pattern": "Causal()", "engine": "vllm"}, "engine vllm holds what"),
        ({"storage": "int8", "engine": "llama.cpp"}, "engine llama.cpp has no such codes"),
        ({"devices": 2, "engine": "vllm"}, "engine vllm isn't planned on a ring"),
        ({"devices": 2, "chunk": 64}, "chunk is 64 on 2 devices"),
        ({"devices": 2, "policy": "heavy:9+window:9"}, "on a ring keep-all, window:W"),
        ({"model": "gpt-4-turbo"}, "only the context of 128,000 tokens is"),
        ({"model": "mistral-7b", "policy": "window:4000,block=200"}, "holds up to 4199 tokens"),
        ({"model": "deepseek-v3", "storage": "int8"}, "latents are held dense"),
        ({"pattern": [attnspan.Causal()]}, "pattern has 1 layers; one pattern, or one for each"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(how: dict[str, Any], sentence: str) -> None:
    given = {"model": "llama-3-8b", "context": 1000, **how}
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the sentence is looked at below
        plan(given.pop("model"), given.pop("context"), **given)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_it_is_a_public_name() -> None:
    assert attnspan.plan is plan
    assert attnspan.plan(dict(MODEL), 100).spec.layers == 2


MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def test_reach_by_hand() -> None:
    assert plan("mistral-7b", 1000).reach == 32 * (4096 - 1)
    assert plan("llama-3-8b", 1000).reach is None
    assert plan("llama-3-8b", 1000, policy="sinks:4+window:100").reach == 32 * 99
    # On a grid of 10 a query sees up to 9 tokens more.
    assert plan("llama-3-8b", 1000, policy="window:100,block=10").reach == 32 * (99 + 9)
    assert plan("llama-3-8b", 1000, policy="heavy:50+window:50").reach is None
    assert plan("gemma-3-1b", 1000, policy="window:2000").reach == 22 * 511 + 4 * 1999
    assert plan("mistral-7b", 1000, pattern="SlidingWindow(10)").reach is None


def test_a_short_prompt_reads_the_experts_that_it_takes() -> None:
    """A prompt of one token reads what a decoded token reads, and writes and reads one more."""
    one = plan("qwen3-30b-a3b", 1)
    assert one.decode is not None
    assert one.prefill.bytes == one.decode.bytes + 2 * 48 * 4 * 128 * 2
    # 128 experts, 8 of them for each of 16 tokens.
    few = plan("qwen3-30b-a3b", 16).prefill.bytes - plan("qwen3-30b-a3b", 1).prefill.bytes
    expert = 48 * 3 * 2048 * 768 * 2
    taken = 128 * (1 - (120 / 128) ** 16)
    assert few == pytest.approx((taken - 8) * expert + 15 * 2 * 48 * 2 * 4 * 128 * 2, abs=2)


def test_a_device_of_a_ring_moves_its_share_and_what_it_is_sent() -> None:
    alone, shared = plan("mistral-7b", 131_072), plan("mistral-7b", 131_072, devices=8)
    keys = 131_072 * 4096 * 2 * 32  # written once and read once, 4,096 bytes in each of 32 layers
    assert shared.ring is not None
    assert alone.prefill.bytes - shared.prefill.bytes == keys - keys // 8 - 2 * shared.ring.sent
    # Windows of 4,096: a zigzag rank's two chunks each need the 4,095 tokens before them.
    assert shared.ring.sent <= 32 * 2 * 4095 * 4096


def test_steps_of_a_prefill_read_weights_and_keys_anew() -> None:
    """By a loop over the steps, and the step of one token as decoding has it."""
    whole = plan("gemma-3-1b", 1000)
    in_steps = plan("gemma-3-1b", 1000, chunk=96)
    weights = 2 * (whole.spec.parameters)  # tied: the embedding is the output layer
    token = 2 * 1 * 256 * 2
    reads, start = 0, 0
    while start < 1000:
        end = min(start + 96, 1000)
        reads += 22 * min(end, 512 + end - start - 1) + 4 * end
        start = end
    assert in_steps.prefill.bytes == 11 * weights + token * (26 * 1000 + reads)
    assert whole.prefill.bytes == weights + token * 26 * 2000
    assert in_steps.prefill.operations == whole.prefill.operations
    one = plan("mistral-7b", 1024, chunk=1)
    assert one.decode is not None
    assert one.prefill.seconds > 1000 * one.decode.seconds


def test_a_prompt_of_latents_makes_all_heads_keys_and_values() -> None:
    found = plan("deepseek-v3", 131_072, chunk=2048)
    assert dict(found.activations.parts)["keys and values of all heads"] == (
        131_072 * 128 * (192 + 128) * 2
    )


def test_the_report_sets_sinks_apart_where_some_are_kept() -> None:
    assert "tokens back, kept sinks apart." in str(
        plan("llama-3-8b", 99, policy="sinks:4+window:9")
    )
    assert "tokens back." in str(plan("llama-3-8b", 99, policy="window:9"))
