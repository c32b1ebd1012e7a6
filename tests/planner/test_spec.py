"""Shapes of models: presets by hand arithmetic, configs against transformers' own models."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from attnspan.planner.spec import MODELS, from_config, model

# Of the checkpoints' safetensors indices on Hugging Face.
PUBLISHED = {
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-8b": 8_190_735_360,
}
# 2 (keys and values) x layers x KV heads x head_dim x 2 bytes.
KV_BYTES = {
    "mistral-7b": 2 * 32 * 8 * 128 * 2,
    "mistral-7b-v0.3": 2 * 32 * 8 * 128 * 2,
    "llama-2-7b": 2 * 32 * 32 * 128 * 2,
    "llama-2-70b": 2 * 80 * 8 * 128 * 2,
    "llama-3.1-8b": 2 * 32 * 8 * 128 * 2,
    "llama-3.1-70b": 2 * 80 * 8 * 128 * 2,
    "llama-3.1-405b": 2 * 126 * 8 * 128 * 2,
    "qwen3-8b": 2 * 36 * 8 * 128 * 2,
}


@pytest.mark.parametrize("name", MODELS)
def test_presets(name: str) -> None:
    spec = model(name.upper())
    assert spec.name == name
    assert spec.parameters == PUBLISHED[name]
    assert spec.kv_bytes() == KV_BYTES[name]
    assert spec.source.startswith("https://huggingface.co/")
    assert spec.windows == ((4096,) if name == "mistral-7b" else (None,)) * spec.layers
    untied = 2 * spec.vocabulary * spec.hidden
    assert spec.linear_parameters == spec.parameters - untied


TINY = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 50,
}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": True},
    "phi3": {"head_dim": 16, "pad_token_id": 0},
    "gemma": {},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "olmo2": {"head_dim": 16},
    "olmo3": {"head_dim": 16, "sliding_window": 8},
    "smollm3": {"head_dim": 16, "pad_token_id": 0},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_configs_count_what_transformers_builds(kind: str, tmp_path) -> None:
    config = AutoConfig.for_model(kind, **{**TINY, **FAMILIES[kind]})
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    spec = from_config(tmp_path)
    assert spec.parameters == sum(p.numel() for p in built.parameters())
    assert spec == from_config(str(tmp_path / "config.json"))
    types = getattr(config, "layer_types", None)
    if types is not None:
        slides = tuple(kind == "sliding_attention" for kind in types)
        assert tuple(w is not None for w in spec.windows) == slides
    inner = {"model_type": "outer", "text_config": json.loads(config.to_json_string())}
    assert from_config(inner).parameters == spec.parameters


def test_older_configs_name_their_windows_otherwise() -> None:
    given = {"model_type": "gemma2", **TINY, "sliding_window": 8}
    assert from_config(given).windows == (8, None, 8, None)
    given = {"model_type": "gemma3_text", **TINY, "sliding_window": 8, "sliding_window_pattern": 3}
    assert from_config(given).windows == (8, 8, None, 8)
    given = {"model_type": "mistral", **TINY, "sliding_window": None}
    assert from_config(given).windows == (None,) * 4
    given = {"model_type": "qwen2", **TINY, "sliding_window": 8, "use_sliding_window": False}
    assert from_config(given).windows == (None,) * 4


LLAMA = {"model_type": "llama", **TINY}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "model_type is None; allowed are gemma, gemma2"),
        ({**LLAMA, "model_type": "mamba"}, "model_type is 'mamba'; allowed are"),
        ({**LLAMA, "num_hidden_layers": None}, "num_hidden_layers is None; a whole number"),
        ({**LLAMA, "vocab_size": -1}, "vocab_size is -1; a whole number"),
        ({**LLAMA, "hidden_size": True}, "hidden_size is True; a whole number"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_attention_heads is 4 and num_key_value_heads 3"),
        ({**LLAMA, "num_local_experts": 8}, "num_local_experts is 8; only dense decoders"),
        ({**LLAMA, "kv_lora_rank": 512}, "kv_lora_rank is 512; only dense decoders"),
        ({**LLAMA, "model_type": "gemma", "head_dim": None}, "head_dim is missing; gemma needs it"),
        ({**LLAMA, "model_type": "mistral", "sliding_window": 0}, "sliding_window is 0; null or"),
        (
            {**LLAMA, "model_type": "qwen3", "layer_types": ["linear_attention"]},
            "layer_types has 1 entries of linear_attention; 4 of full_attention and",
        ),
    ],
)
def test_bad_configs_are_refused_in_one_sentence(config: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        from_config(config)
    assert "\n" not in str(error.value)


def test_bad_names_and_files(tmp_path) -> None:
    with pytest.raises(ValueError, match="model 'gpt-5' is not known; allowed are mistral-7b, "):
        model("gpt-5")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="it holds no config; an object is allowed"):
        model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="it is no JSON"):
        model(str(tmp_path))
    with pytest.raises(ValueError, match="No such file"):
        from_config(tmp_path / "none")
