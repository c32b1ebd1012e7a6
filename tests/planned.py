"""Small random models whose memory is planned: those of `tiny`, and families with more parts."""

from __future__ import annotations

from typing import Any

import tiny
import torch
import transformers

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
HYBRID = ["sliding_attention", "full_attention"]
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": (
        "Gemma2",
        {"layer_types": HYBRID, "sliding_window": 128, "query_pre_attn_scalar": 32},
    ),
    "olmo3": ("Olmo3", {"layer_types": HYBRID, "sliding_window": 128}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None, **EXPERTS}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, **EXPERTS}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "kv_lora_rank": 48,
            "q_lora_rank": 40,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 24,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            **EXPERTS,
        },
    ),
}
FAMILIES = (*tiny.FAMILIES, *MORE)
EAGER_ONLY = ("gpt_oss", "gemma2")


def planned(family: str, **changes: Any) -> Any:
    """A model of two layers, hidden 128, windows of 128 where it has any; fp32, in eval mode."""
    if family not in MORE:
        sizes = {**SHAPE, "query_pre_attn_scalar": 32} if family == "gemma3" else {**SHAPE}
        if tiny.FAMILIES[family][1].get("sliding_window"):
            sizes["sliding_window"] = 128
        return tiny.tiny(family, **{**sizes, **changes})
    name, more = MORE[family]
    sizes = {**tiny.COMMON, **SHAPE, **more, **changes}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()
