"""Tiny random models of real families, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HYBRID = ["sliding_attention", "full_attention"] * 2

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-sliding": ("Mistral", {"sliding_window": 12}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma3": (
        "Gemma3",
        {
            "layer_types": HYBRID,
            "sliding_window": 12,
            "query_pre_attn_scalar": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"attention_multiplier": 0.3}),
    "cohere2": ("Cohere2", {"layer_types": HYBRID, "sliding_window": 12}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 0]}),
    "gpt_oss": (
        "GptOss",
        {
            "layer_types": HYBRID,
            "sliding_window": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of the family, float32, in eval mode, four layers."""
    name, more = FAMILIES[family]
    sizes = {**COMMON, **more, **changes}
    layers = sizes["num_hidden_layers"]
    for listed in ("layer_types", "no_rope_layers"):
        if listed in sizes:
            sizes[listed] = sizes[listed][-layers:]
    if family == "gpt_neox":
        sizes.pop("num_key_value_heads")
    config = getattr(transformers, "Gemma3TextConfig" if family == "gemma3" else f"{name}Config")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**sizes))
    if family == "gpt_oss":  # learned sink logits of zero would hide that they are lost
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return model.eval()


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """The smallest: two layers."""
    sizes = {**COMMON, "num_hidden_layers": 2, "max_position_embeddings": 64, **changes}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def rounded(model: Any, dtype: torch.dtype, held: torch.dtype | None = None) -> Any:
    """`model` with its weights rounded to `dtype` and held in `held` (the same, if None).

    Unlike `model.to`, it leaves the frequencies of rotary embeddings in float32, as loading does.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(held or dtype)
    return model


def random_ids(n: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 64, (batch, n), generator=torch.Generator().manual_seed(seed))


def assert_same_but_for_codes(got: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    """That logits are equal to `atol`, where keys and values are held as codes.

    The last bits of a key depend on the shapes of the products that made it, so a code may fall to
    the other side of a half: a step in 127 or 7 of one channel. That moves the tokens that see it a
    little; a token too many or too few, or at another place, moves nearly all, and further.
    """
    off = (got - expected).abs()
    assert off.median() < atol
    assert off.max() < 0.01 * expected.abs().max()
