"""Configs against the models that transformers builds of them, and against its defaults."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from attnspan.planner.configs import from_config
from attnspan.planner.families import FAMILIES

TINY = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2}
ROUTED = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    **ROUTED,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
GEMMA3N = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 3,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 40,
    "laurel_rank": 5,
}
CASES: dict[str, list[dict[str, Any]]] = {
    "llama": [{"attention_bias": True, "mlp_bias": True}, {"head_dim": None}],
    "granite": [{}, {"attention_bias": True, "mlp_bias": True}],
    "mistral": [{"sliding_window": 8}, {"sliding_window": None, "head_dim": None}],
    "ministral": [{"sliding_window": 8}, {"sliding_window": None}],
    "ministral3": [{}, {"sliding_window": 8}],
    "mixtral": [{"num_local_experts": 5}, {"sliding_window": 8, "num_experts_per_tok": 1}],
    "phi3": [{"head_dim": 16}, {"sliding_window": 8}],
    "qwen2": [
        {},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"tie_word_embeddings": True, "sliding_window": 8, "max_window_layers": 0},
    ],
    "qwen2_moe": [
        {**EXPERTS, "shared_expert_intermediate_size": 32},
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 16,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 3,
            "qkv_bias": False,
            "decoder_sparse_step": 2,
        },
    ],
    "qwen3": [{"tie_word_embeddings": True}, {"attention_bias": True}],
    "qwen3_moe": [
        {**EXPERTS, "mlp_only_layers": [1]},
        {**EXPERTS, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 8},
        {**EXPERTS, "mlp_only_layers": [0, 1, 2, 3]},
    ],
    "gemma": [{}, {"attention_bias": True, "tie_word_embeddings": False}],
    "gemma2": [{"sliding_window": 8}],
    "gemma3_text": [{"sliding_window": 8}, {"sliding_window": 8, "sliding_window_pattern": 3}],
    "gemma3n_text": [
        GEMMA3N,
        {**GEMMA3N, "num_kv_shared_layers": 0, "attention_bias": True},
        {**GEMMA3N, "intermediate_size": [96, 80, 64, 96, 80, 64], "altup_num_inputs": 3},
    ],
    "gpt_oss": [{"num_local_experts": 5}, {"num_local_experts": 5, "attention_bias": False}],
    "deepseek_v2": [
        {**LATENT, "n_shared_experts": 2},
        {**LATENT, "q_lora_rank": None, "mlp_bias": True, "attention_bias": True},
    ],
    "deepseek_v3": [LATENT, {**LATENT, "q_lora_rank": None, "first_k_dense_replace": 4}],
    "llama4_text": [
        {"num_local_experts": 5, "intermediate_size_mlp": 80, "attention_chunk_size": 8},
        {
            "num_local_experts": 5,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 0, 1, 0],
        },
        {"num_local_experts": 5, "moe_layers": [0], "no_rope_layer_interval": 2},
    ],
    "glm": [{}, {"attention_bias": False}],
    "glm4": [{}],
    "glm4_moe": [
        {**ROUTED, "use_qk_norm": True},
        {**ROUTED, "attention_bias": True, "n_shared_experts": 2, "first_k_dense_replace": 0},
    ],
    "olmo": [{"attention_bias": True}],
    "olmo2": [{"head_dim": 16}, {"attention_bias": True}],
    "olmo3": [{"sliding_window": 8}],
    "smollm3": [{}, {"use_sliding_window": True, "sliding_window": 8, "mlp_bias": True}],
    "cohere": [{"head_dim": 16, "use_qk_norm": True}, {"attention_bias": True}],
    "cohere2": [{"sliding_window": 8, "head_dim": None}, {"sliding_window_pattern": 2}],
    "exaone4": [{}, {"sliding_window_pattern": 2}],
    "seed_oss": [{}, {"attention_out_bias": True, "mlp_bias": True, "attention_bias": False}],
    "gpt_neox": [{"head_dim": 16}, {"attention_bias": False}],
    "phi": [{"head_dim": 16, "qk_layernorm": True}, {"head_dim": None}],
    "starcoder2": [{"sliding_window": 8}, {"use_bias": False}],
}


def built(config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def without_nones(given: dict[str, Any]) -> dict[str, Any]:
    """Some families' configs take no null for a head_dim, but may leave it out."""
    return {key: value for key, value in given.items() if key != "head_dim" or value is not None}


@pytest.mark.parametrize(
    ("kind", "more"), [(kind, more) for kind, cases in CASES.items() for more in cases]
)
def test_weights_are_those_that_transformers_builds(kind: str, more: dict) -> None:
    config = AutoConfig.for_model(kind, **without_nones({**TINY, **more}))
    model = built(config)
    whole = json.loads(config.to_json_string(use_diff=False))
    spec = from_config(whole)
    assert spec.parameters == sum(p.numel() for p in model.parameters())
    assert spec == from_config(json.loads(config.to_json_string()))
    # What a config leaves out is what its class has: whatever equals that may go.
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(type(config))
        if field.default is not dataclasses.MISSING
    }
    short = {
        key: value
        for key, value in without_nones({**TINY, **more}).items()
        if key not in defaults or defaults[key] != value
    }
    assert from_config({"model_type": kind, **short}) == spec
    assert len(short) < len(whole)
    inner = {"model_type": "outer", "text_config": whole}
    assert from_config(inner) == spec

    experts = [
        n for name, p in model.named_parameters() if ".experts." in name for n in [p.numel()]
    ]
    if spec.experts is None:
        assert not experts
        assert spec.active is None
    else:
        taken = sum(experts) * spec.experts.active // spec.experts.total
        assert spec.active_parameters == spec.parameters - sum(experts) + taken
    mixers = sum(
        p.numel()
        for name, p in model.named_parameters()
        if any(part in name for part in (".mlp.", ".feed_forward."))
        and not any(part in name for part in ("router", ".mlp.gate.", "shared_expert_gate"))
    )
    assert spec.feed_forward == mixers
    looked_up = sum(
        p.numel()
        for name, p in model.named_parameters()
        if ("embed" in name and "altup" not in name) or "lm_head" in name
    )
    idle = spec.parameters - spec.active_parameters
    assert spec.linear_parameters == spec.parameters - looked_up - idle


def test_every_family_is_tried() -> None:
    assert set(CASES) == set(FAMILIES)


@pytest.mark.parametrize(
    ("kind", "more"), [(kind, more) for kind, cases in CASES.items() for more in cases]
)
def test_layers_see_what_transformers_says(kind: str, more: dict) -> None:
    config = AutoConfig.for_model(kind, **without_nones({**TINY, **more}))
    spec = from_config(json.loads(config.to_json_string(use_diff=False)))
    types = getattr(config, "layer_types", None)
    if types is None:
        windowed = FAMILIES[kind].windows == "all"
        window = getattr(config, "sliding_window", None) if windowed else None
        assert spec.windows == (window,) * spec.layers
    else:
        chunk = getattr(config, "attention_chunk_size", None)
        window = {"sliding_attention": config.sliding_window if not chunk else None}
        window["chunked_attention"] = chunk
        assert spec.windows == tuple(window.get(each) for each in types)
    assert spec.chunked == (types is not None and "chunked_attention" in types)
    modes = getattr(config, "kv_sharing_modes", [None] * spec.layers)
    assert [source is not None for source in spec.shares or modes] == [
        mode == "reuse" for mode in modes
    ]
    if types is not None:
        for layer, source in enumerate(spec.shares):
            assert source is None or (source < layer and types[source] == types[layer])


def test_defaults_are_those_of_the_configs_classes() -> None:
    for kind, family in FAMILIES.items():
        fields = {
            field.name: field.default
            for field in dataclasses.fields(type(AutoConfig.for_model(kind)))
        }
        # These are not fields of all classes: read when they are there, or of older configs.
        apart = {"head_dim", "sliding_window_pattern", "num_key_value_heads"}
        for key, value in family.defaults.items():
            if key not in apart or key in fields:
                assert (fields[key], type(fields[key])) == (value, type(value)), (kind, key)
    assert from_config({"model_type": "mistral"}).windows == (4096,) * 32
    assert from_config({"model_type": "gemma2"}).tied
    assert not from_config({"model_type": "llama"}).tied


def test_a_folder_a_file_and_its_name(tmp_path) -> None:
    config = AutoConfig.for_model("llama", **TINY)
    config.save_pretrained(tmp_path)
    spec = from_config(tmp_path)
    assert spec == from_config(str(tmp_path / "config.json"))
    assert spec.source == str(tmp_path / "config.json")
    assert from_config(tmp_path, "mine").name == "mine"
    for name, expected in (("a/b", "a/b"), ("", "llama"), (3, "llama"), ("a\nb", "llama")):
        assert from_config({"model_type": "llama", "_name_or_path": name}).name == expected


def test_older_configs_name_their_windows_otherwise() -> None:
    given = {"model_type": "gemma2", **TINY, "sliding_window": 8}
    assert from_config(given).windows == (8, None, 8, None)
    given = {"model_type": "gemma3_text", **TINY, "sliding_window": 8, "sliding_window_pattern": 3}
    assert from_config(given).windows == (8, 8, None, 8)
    given = {"model_type": "mistral", **TINY, "sliding_window": None}
    assert from_config(given).windows == (None,) * 4
    given = {"model_type": "qwen2", **TINY, "sliding_window": 8, "use_sliding_window": False}
    assert from_config(given).windows == (None,) * 4
    experts = {"num_local_experts": 6, "num_experts_per_tok": 2}
    spec = from_config({"model_type": "qwen3_moe", **TINY, **experts})
    assert spec.experts is not None
    assert spec.experts.total == 6


def test_the_decoder_of_a_model_of_several_kinds() -> None:
    text = {**TINY, "sliding_window": 8}
    spec = from_config({"model_type": "gemma3", "text_config": text, "hidden_size": 1})
    assert spec == from_config({"model_type": "gemma3_text", **text})
    untied = {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": False}
    assert from_config(untied).parameters == spec.parameters + 50 * 64


def test_quantised_checkpoints_count_their_weights() -> None:
    plain = {"model_type": "llama", **TINY}
    quantised = {**plain, "quantization_config": {"quant_method": "fp8", "bits": [float("nan")]}}
    assert from_config(quantised) == from_config(plain)


LLAMA = {"model_type": "llama", **TINY}
GEMMA2 = {"model_type": "gemma2", **TINY, "sliding_window": 8}
MIXTRAL = {"model_type": "mixtral", **TINY}
DEEPSEEK = {"model_type": "deepseek_v3", **TINY, **LATENT}
NEST = {"model_type": "gemma3n_text", **TINY, **GEMMA3N}
WHOLE = "a whole number from 1 to 1073741824 is allowed"
BAD = [
    ({}, "model_type is None; allowed are cohere, cohere2"),
    ({"text_config": 3}, "text_config is 3; an object"),
    ({"text_config": {}}, "model_type is None; allowed are"),
    ({"model_type": "gemma3"}, "model_type is 'gemma3'; allowed are"),
    ({**LLAMA, "model_type": "mamba"}, "model_type is 'mamba'; allowed are"),
    ({**LLAMA, "model_type": ["llama"]}, r"model_type is \['llama'\]; allowed are"),
    ({**LLAMA, "num_hidden_layers": None}, "num_hidden_layers is None; a whole number from 1 to"),
    ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers is 0; a whole number from 1 to 4096"),
    ({**LLAMA, "num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; a whole number"),
    ({**LLAMA, "hidden_size": 10**9999}, "hidden_size is a number of 33216 bits; a whole"),
    ({**LLAMA, "hidden_size": 1e30}, rf"hidden_size is 1e\+30; {WHOLE}"),
    ({**LLAMA, "hidden_size": 64.0}, f"hidden_size is 64.0; {WHOLE}"),
    ({**LLAMA, "hidden_size": float("nan")}, f"hidden_size is nan; {WHOLE}"),
    ({**LLAMA, "hidden_size": "64"}, f"hidden_size is '64'; {WHOLE}"),
    ({**LLAMA, "hidden_size": [64]}, rf"hidden_size is \[64\]; {WHOLE}"),
    ({**LLAMA, "hidden_size": "\n" * 999}, "hidden_size is '.{1,40}'; a whole"),
    ({**LLAMA, "hidden_size": True}, f"hidden_size is True; {WHOLE}"),
    ({**LLAMA, "vocab_size": -1}, f"vocab_size is -1; {WHOLE}"),
    ({**LLAMA, "intermediate_size": [96]}, r"intermediate_size is \[96\]; a whole"),
    ({**LLAMA, "max_position_embeddings": "x"}, "max_position_embeddings is 'x'; null or"),
    ({**LLAMA, "tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; true or false"),
    ({**LLAMA, "attention_bias": 1}, "attention_bias is 1; true or false"),
    ({**LLAMA, "num_key_value_heads": 3}, "num_attention_heads is 4 and num_key_value_heads 3"),
    ({**LLAMA, "num_key_value_heads": -2}, "num_key_value_heads is -2; null or a whole number"),
    (
        {**LLAMA, "num_attention_heads": 6, "head_dim": None},
        "hidden_size is 64 and num_attention_heads 6; without a head_dim",
    ),
    ({**LLAMA, "num_local_experts": 8}, "num_local_experts is 8; no llama decoder with that"),
    ({**LLAMA, "kv_lora_rank": 512}, "kv_lora_rank is 512; no llama decoder with that"),
    ({**LLAMA, "num_kv_shared_layers": 2}, "num_kv_shared_layers is 2; no llama"),
    ({**LLAMA, "attention_chunk_size": 8}, "attention_chunk_size is 8; no llama decoder"),
    ({**LLAMA, "per_layer_config": {"1": {}}}, "per_layer_config is {'1': {}}; no llama"),
    ({**GEMMA2, "use_bidirectional_attention": True}, "use_bidirectional_attention is True; no"),
    ({**GEMMA2, "head_dim": None}, "head_dim is None; a whole number"),
    ({**GEMMA2, "sliding_window": None}, "sliding_window is None; with layers of sliding_att"),
    ({**GEMMA2, "layer_types": "full"}, "layer_types is 'full'; a list of 4 of full_attention"),
    ({**GEMMA2, "layer_types": ["full_attention"]}, r"layer_types is \['full_attention'\]; a list"),
    ({**GEMMA2, "layer_types": [["full_attention"]] * 4}, "a list of 4 of full_attention and"),
    ({**GEMMA2, "layer_types": ["linear_attention"] * 4}, "a list of 4 of full_attention and slid"),
    ({**GEMMA2, "layer_types": ["chunked_attention"] * 4}, "a list of 4 of full_attention and sl"),
    ({**LLAMA, "model_type": "mistral", "sliding_window": 0}, "sliding_window is 0; null or"),
    (
        {**LLAMA, "model_type": "qwen3", "layer_types": ["sliding_attention"] * 4},
        "use_sliding_window is False; with layers of sliding_attention",
    ),
    (
        {**LLAMA, "model_type": "gemma3_text", "sliding_window_pattern": 0},
        "sliding_window_pattern is 0; a whole",
    ),
    (
        {**LLAMA, "model_type": "llama4_text", "no_rope_layers": [1]},
        r"no_rope_layers is \[1\]; null or 4 of 0 and 1",
    ),
    (
        {**LLAMA, "model_type": "llama4_text", "no_rope_layers": {"1": 0}},
        "no_rope_layers is {'1': 0}; null or a list",
    ),
    (
        {**LLAMA, "model_type": "llama4_text", "attention_chunk_size": None},
        "attention_chunk_size is None; with layers of chunked_attention",
    ),
    ({**MIXTRAL, "num_local_experts": "8"}, "num_local_experts is '8'; a whole number"),
    ({**MIXTRAL, "num_experts_per_tok": 9}, "num_experts_per_tok is 9; a whole number from 1 to 8"),
    (
        {**LLAMA, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 1409},
        "shared_expert_intermediate_size is 1409; a multiple of moe_intermediate_size, which is",
    ),
    (
        {**LLAMA, "model_type": "qwen3_moe", "mlp_only_layers": [4]},
        r"mlp_only_layers is \[4\]; null or a list of whole numbers below 4",
    ),
    ({**DEEPSEEK, "kv_lora_rank": None}, "kv_lora_rank is None; a whole number"),
    ({**DEEPSEEK, "v_head_dim": 0}, "v_head_dim is 0; a whole number"),
    ({**DEEPSEEK, "q_lora_rank": 0}, "q_lora_rank is 0; null or a whole number"),
    ({**DEEPSEEK, "first_k_dense_replace": None}, "first_k_dense_replace is None; a whole"),
    ({**NEST, "num_kv_shared_layers": 6}, "num_kv_shared_layers is 6; a whole number from 0 to 5"),
    ({**NEST, "num_kv_shared_layers": 5}, "num_kv_shared_layers is 5; for each kind of layer"),
    ({**NEST, "intermediate_size": [96]}, r"intermediate_size is \[96\]; 6 whole numbers"),
]


@pytest.mark.parametrize(("config", "expected"), BAD)
def test_bad_configs_are_refused_in_one_sentence(config: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        from_config(config)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("a config: ")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "it is no JSON"),
        (b"{", "it is no JSON"),
        (b"[1]", "it holds no config; an object is allowed"),
        (b"null", "it holds no config; an object is allowed"),
        (b"\xff\xfe{}", "it is no text in UTF-8"),
        (b"[" * 200_000, "it is nested too deep for a config"),
        (b'{"hidden_size": ' + b"1" * 5000 + b"}", "it is no JSON"),
        (b"{}" + b" " * 2**24, "it has 16777218 bytes; a config of 16 MiB is allowed"),
        (b'{"model_type": "llama", "hidden_size": NaN}', "hidden_size is nan; a whole"),
    ],
)
def test_bad_files(tmp_path, content: bytes, expected: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    for given in (tmp_path, file):
        with pytest.raises(ValueError, match=expected) as error:
            from_config(given)
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: No such file"):
        from_config(tmp_path)
    with pytest.raises(ValueError, match="none: No such file"):
        from_config(tmp_path / "none")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json: it is no file"):
        from_config(tmp_path)
    with pytest.raises(ValueError, match="it is no file"):
        from_config("/dev/null")


def test_a_weight_too_many_shows() -> None:
    """The comparison above can fail: each figure of a config that is off by one shows in it."""
    config = AutoConfig.for_model("gemma3n_text", **{**TINY, **GEMMA3N})
    total = sum(p.numel() for p in built(config).parameters())
    given = json.loads(config.to_json_string(use_diff=False))
    assert from_config(given).parameters == total
    for key in ("hidden_size", "head_dim", "vocab_size", "laurel_rank", "num_kv_shared_layers"):
        assert (
            from_config({**given, key: given[key] + 1 - 2 * (key[:3] == "num")}).parameters != total
        )
