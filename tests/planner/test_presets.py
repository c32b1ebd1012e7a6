"""Presets: bytes and weights beside what was published, and names."""

import re
from pathlib import Path

import pytest

from attnspan.planner.presets import MODELS, OPAQUE, model

# Bytes of a token in bf16: keys and values x layers x KV heads x head_dim x 2 bytes.
KV_BYTES = {
    "bundled": 2 * 10 * 2 * 64 * 2,
    "mistral-7b": 2 * 32 * 8 * 128 * 2,
    "mistral-7b-v0.3": 2 * 32 * 8 * 128 * 2,
    "mixtral-8x7b": 2 * 32 * 8 * 128 * 2,
    "llama-2-7b": 2 * 32 * 32 * 128 * 2,
    "llama-2-13b": 2 * 40 * 40 * 128 * 2,
    "llama-2-70b": 2 * 80 * 8 * 128 * 2,
    "llama-3-8b": 2 * 32 * 8 * 128 * 2,
    "llama-3-70b": 2 * 80 * 8 * 128 * 2,
    "llama-3.1-8b": 2 * 32 * 8 * 128 * 2,
    "llama-3.1-70b": 2 * 80 * 8 * 128 * 2,
    "llama-3.1-405b": 2 * 126 * 8 * 128 * 2,
    "llama-3.2-1b": 2 * 16 * 8 * 64 * 2,
    "llama-3.2-3b": 2 * 28 * 8 * 128 * 2,
    "qwen3-0.6b": 2 * 28 * 8 * 128 * 2,
    "qwen3-1.7b": 2 * 28 * 8 * 128 * 2,
    "qwen3-4b": 2 * 36 * 8 * 128 * 2,
    "qwen3-8b": 2 * 36 * 8 * 128 * 2,
    "qwen3-14b": 2 * 40 * 8 * 128 * 2,
    "qwen3-32b": 2 * 64 * 8 * 128 * 2,
    "qwen3-30b-a3b": 2 * 48 * 4 * 128 * 2,
    "qwen3-235b-a22b": 2 * 94 * 4 * 128 * 2,
    "gemma-3-1b": 2 * 26 * 1 * 256 * 2,
    "gemma-3-4b": 2 * 34 * 4 * 256 * 2,
    "gemma-3-12b": 2 * 48 * 8 * 256 * 2,
    "gemma-3-27b": 2 * 62 * 16 * 128 * 2,
    "gpt-oss-20b": 2 * 24 * 8 * 64 * 2,
    "gpt-oss-120b": 2 * 36 * 8 * 64 * 2,
    "phi-3-mini-4k": 2 * 32 * 32 * 96 * 2,
    "phi-3-mini-128k": 2 * 32 * 32 * 96 * 2,
    "phi-3-medium-4k": 2 * 40 * 10 * 128 * 2,
    "phi-3-medium-128k": 2 * 40 * 10 * 128 * 2,
    # The rank of keys and values, and the channels that are rotated, of all heads together.
    "deepseek-v3": 61 * (512 + 64) * 2,
}


def test_bytes_of_a_token() -> None:
    assert {name: model(name).kv_bytes() for name in MODELS} == KV_BYTES
    assert [model(name).kv_bytes(1) * 2 for name in MODELS] == list(KV_BYTES.values())
    # DeepSeek's heads' own keys, with the rotated channels in each, and values.
    assert model("deepseek-v3").kv_bytes(expanded=True) == 61 * 128 * (128 + 64 + 128) * 2
    assert model("mistral-7b").kv_bytes(expanded=True) == KV_BYTES["mistral-7b"]


# As its maker gives it, in billions: all weights, then those that a token uses.
PUBLISHED = {
    "mistral-7b": ("7.24", None, "https://huggingface.co/mistralai/Mistral-7B-v0.1"),
    "mistral-7b-v0.3": ("7.25", None, "https://huggingface.co/mistralai/Mistral-7B-v0.3"),
    "mixtral-8x7b": ("46.7", "12.9", "https://mistral.ai/news/mixtral-of-experts"),
    "llama-2-7b": ("6.74", None, "https://huggingface.co/meta-llama/Llama-2-7b-hf"),
    "llama-2-13b": ("13.0", None, "https://huggingface.co/meta-llama/Llama-2-13b-hf"),
    "llama-2-70b": ("69.0", None, "https://huggingface.co/meta-llama/Llama-2-70b-hf"),
    "llama-3-8b": ("8.03", None, "https://huggingface.co/meta-llama/Meta-Llama-3-8B"),
    "llama-3-70b": ("70.6", None, "https://huggingface.co/meta-llama/Meta-Llama-3-70B"),
    "llama-3.1-8b": ("8.03", None, "https://huggingface.co/meta-llama/Llama-3.1-8B"),
    "llama-3.1-70b": ("70.6", None, "https://huggingface.co/meta-llama/Llama-3.1-70B"),
    "llama-3.1-405b": ("405", None, "https://arxiv.org/abs/2407.21783"),
    "llama-3.2-1b": ("1.23", None, "https://huggingface.co/meta-llama/Llama-3.2-1B"),
    "llama-3.2-3b": ("3.21", None, "https://huggingface.co/meta-llama/Llama-3.2-3B"),
    "qwen3-0.6b": ("0.6", None, "https://huggingface.co/Qwen/Qwen3-0.6B"),
    "qwen3-1.7b": ("1.7", None, "https://huggingface.co/Qwen/Qwen3-1.7B"),
    "qwen3-4b": ("4.0", None, "https://huggingface.co/Qwen/Qwen3-4B"),
    "qwen3-8b": ("8.2", None, "https://huggingface.co/Qwen/Qwen3-8B"),
    "qwen3-14b": ("14.8", None, "https://huggingface.co/Qwen/Qwen3-14B"),
    "qwen3-32b": ("32.8", None, "https://huggingface.co/Qwen/Qwen3-32B"),
    "qwen3-30b-a3b": ("30.5", "3.3", "https://huggingface.co/Qwen/Qwen3-30B-A3B"),
    "qwen3-235b-a22b": ("235", "22", "https://huggingface.co/Qwen/Qwen3-235B-A22B"),
    "gpt-oss-20b": ("20.9", None, "https://arxiv.org/abs/2508.10925"),
    "gpt-oss-120b": ("116.8", None, "https://arxiv.org/abs/2508.10925"),
    "phi-3-mini-4k": ("3.8", None, "https://arxiv.org/abs/2404.14219"),
    "phi-3-mini-128k": ("3.8", None, "https://arxiv.org/abs/2404.14219"),
    "phi-3-medium-4k": ("14", None, "https://arxiv.org/abs/2404.14219"),
    "phi-3-medium-128k": ("14", None, "https://arxiv.org/abs/2404.14219"),
    "deepseek-v3": ("671", "37", "https://arxiv.org/abs/2412.19437"),
}
# Without embeddings and output layer, which are published apart.
BODIES = {
    "qwen3-0.6b": "0.44",
    "qwen3-1.7b": "1.4",
    "qwen3-4b": "3.6",
    "qwen3-8b": "6.95",
    "qwen3-14b": "13.2",
    "qwen3-32b": "31.2",
    # Gemma 3's report, https://arxiv.org/abs/2503.19786, table 1.
    "gemma-3-1b": "0.698",
    "gemma-3-4b": "3.209",
    "gemma-3-12b": "10.759",
    "gemma-3-27b": "25.600",
}


def near(count: int, published: str) -> bool:
    """As far off as its last digit says; some makers round, some cut."""
    digits = len(published.partition(".")[2])
    return abs(count / 1e9 - float(published)) < 10**-digits


def test_weights_as_published() -> None:
    for name, (total, active, source) in PUBLISHED.items():
        spec = model(name)
        assert near(spec.parameters, total), (name, spec.parameters, source)
        if active is not None:
            assert near(spec.active_parameters, active), (name, spec.active_parameters, source)
        assert (spec.experts is None) == (spec.active is None)
    for name, body in BODIES.items():
        assert near(model(name).linear_parameters, body), name
    assert set(MODELS) == {"bundled", *PUBLISHED, *BODIES}
    # OpenAI counts the output layer, but not the embedding, as used.
    for name, active in (("gpt-oss-20b", "3.61"), ("gpt-oss-120b", "5.13")):
        spec = model(name)
        assert near(spec.active_parameters - spec.vocabulary * spec.hidden, active)
    # A layer less is not what was published, wherever three digits are.
    for name, (total, _, _) in PUBLISHED.items():
        spec = model(name)
        layer = spec.feed_forward // spec.layers
        assert len(total.replace(".", "")) < 3 or not near(spec.parameters - layer, total), name


def test_weights_to_the_last_one() -> None:
    """Of the checkpoints' safetensors indices."""
    known = {
        "mistral-7b": 7_241_732_096,
        "mistral-7b-v0.3": 7_248_023_552,
        "mixtral-8x7b": 46_702_792_704,
        "llama-2-7b": 6_738_415_616,
        "llama-2-13b": 13_015_864_320,
        "llama-2-70b": 68_976_648_192,
        "llama-3-8b": 8_030_261_248,
        "llama-3-70b": 70_553_706_496,
        "llama-3.1-405b": 405_853_388_800,
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.2-3b": 3_212_749_824,
        "qwen3-4b": 4_022_468_096,
        "qwen3-8b": 8_190_735_360,
        "qwen3-14b": 14_768_307_200,
        "qwen3-32b": 32_762_123_264,
        "qwen3-30b-a3b": 30_532_122_624,
        "qwen3-235b-a22b": 235_093_634_560,
        "gemma-3-1b": 999_885_952,
        "phi-3-mini-4k": 3_821_079_552,
        "phi-3-medium-4k": 13_960_238_080,
    }
    assert {name: model(name).parameters for name in known} == known


def test_windows() -> None:
    assert model("mistral-7b").windows == (4096,) * 32
    assert model("mistral-7b-v0.3").windows == model("mixtral-8x7b").windows == (None,) * 32
    assert model("gemma-3-1b").windows == ((512,) * 5 + (None,)) * 4 + (512,) * 2
    assert model("gemma-3-27b").full_layers == (5, 11, 17, 23, 29, 35, 41, 47, 53, 59)
    assert set(model("gemma-3-27b").windows) == {1024, None}
    assert model("gpt-oss-120b").windows == (128, None) * 18
    assert model("gpt-oss-20b").learned_sinks
    assert model("phi-3-mini-4k").windows == (2047,) * 32
    for name in MODELS:
        if name.startswith(("llama", "qwen", "deepseek", "bundled")):
            assert set(model(name).windows) == {None}, name


def test_sources_and_names() -> None:
    for name in MODELS:
        spec = model(name.upper())
        assert (spec.name, spec) == (name, model(f"{name}"))
        assert spec.trained_length
        if name == "bundled":
            continue
        found = re.fullmatch(
            r"https://huggingface\.co/([\w-]+/[\w.-]+)/blob/main/config\.json", spec.source
        )
        assert found, spec.source
        assert model(found[1]) == model(found[1].upper()) == model(found[1].split("/")[1]) == spec


def test_the_bundled_model_is_what_ships() -> None:
    spec = model("bundled")
    assert (spec.layers, spec.kv_heads, spec.head_dim, spec.tied) == (10, 2, 64, True)
    assert Path(spec.source).name == "config.json"


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_models(name: str) -> None:
    known = OPAQUE[name]
    with pytest.raises(ValueError, match="layers, heads and weights are not public") as error:
        model(name.title())
    assert f"{known.context:,} tokens" in str(error.value)
    assert known.source.startswith("https://")
    assert known.source in str(error.value)
    assert known.says


def test_unknown_names(tmp_path) -> None:
    with pytest.raises(ValueError, match="'qwen-3-8b' is not known; close are qwen3-8b") as error:
        model("qwen-3-8b")
    assert "attnspan plan --list" in str(error.value)
    assert len(str(error.value)) < 250
    for name in ("", "\0", "x" * 5000, "no/such/model", "?\n?"):
        with pytest.raises(
            ValueError, match=r"^model .* is not known; allowed are presets"
        ) as error:
            model(name)
        assert len(str(error.value)) < 250
        assert "\n" not in str(error.value)


def test_a_folder_comes_before_a_repository_and_after_a_preset(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("mistral-7b", "mistralai/Mistral-7B-v0.1"):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    assert model("mistral-7b").layers == 32
    assert model("./mistral-7b").layers == model("mistralai/Mistral-7B-v0.1").layers == 3
