"""Weights and config under Hugging Face's names, as `LlamaForCausalLM` reads them."""

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from training.model import EPS, THETA, Llama, Shape
from training.tokenizer import BOS, EOS, PAD, VOCAB, write_tokenizer


def export(model: Llama, folder: Path) -> None:
    """Write a model folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Weights are rounded to bfloat16. A folder that is there already is overwritten file by file,
    each at once, so that an interrupted export leaves no broken file.
    """
    write_tokenizer(folder)
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config(model.shape) | special, indent=2) + "\n")
    partial = folder / "model.safetensors.partial"
    save_file(weights(model), partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")


def config(shape: Shape) -> dict[str, object]:
    """The fields of a `LlamaConfig`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.length,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "bfloat16",
    }


def weights(model: Llama) -> dict[str, Tensor]:
    """The state dict in bfloat16, the fused projections split."""
    shape = model.shape
    heads, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    state = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    for index, block in enumerate(model.layers()):
        q, k, v = block.qkv.split([heads, kv, kv])
        gate, up = block.gate_up.chunk(2)
        layer = {
            "input_layernorm": block.attention_norm,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.out,
            "post_attention_layernorm": block.ffn_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.down,
        }
        state |= {f"model.layers.{index}.{name}.weight": value for name, value in layer.items()}
    return {name: value.detach().bfloat16().cpu().contiguous() for name, value in state.items()}
