"""How the decoders of each Hugging Face `model_type` are built, and the defaults of its config.

Figures and parts are those of transformers 5.23 (https://github.com/huggingface/transformers,
`models/*/configuration_*.py` and `modeling_*.py`); tests hold them to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

# What every config of a decoder holds.
FIGURES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
# A part that is there, isn't, or that a field of the config switches on.
Switch = bool | str


@dataclass(frozen=True)
class Routed:
    """The names under which a family's config keeps its experts.

    Attributes:
        total: experts of a layer.
        other: another name of that.
        width: of one.
        dense_width: of the layers without experts.
        dense: which layers have no experts: none, the first few (`first_k_dense_replace`), all but
            every few (`decoder_sparse_step`, `mlp_only_layers`), or all but those listed
            (`moe_layers`, `interleave_moe_layer_step`).
        shared: how many experts every token takes: a field's name, or the number itself.
        shared_width: the width of all of those together, a field's name; they have a gate then.
        bias: routers and experts have biases.
    """

    total: str
    other: str | None = None
    width: str = "moe_intermediate_size"
    dense_width: str = "intermediate_size"
    dense: Literal["none", "first", "sparse", "listed"] = "none"
    shared: str | int = 0
    shared_width: str | None = None
    bias: bool = False


@dataclass(frozen=True)
class Family:
    """Beside the matrices, families differ in norms, biases and in what their layers see.

    Attributes:
        defaults: what a config that leaves a field out means.
        windows: "none"; "all" layers have `sliding_window`; "types": `layer_types` says which.
        every: where `layer_types` isn't given each layer has a window but for every so many: the
            number or the field that holds it. Otherwise those do, if there is a window:
            "window": all; "last": from `max_window_layers` on; "even": those before it with an
            even number; "rope": those that `no_rope_layers` says of.
        norms: of a layer, `hidden` wide.
        norm: weights of a norm for each channel: 2 with a bias.
        qk_norm: norms of queries and keys: none, one that heads share ("head"), or as wide as all
            heads ("wide").
        qk_norm_if: the field that switches them on.
        qkv_bias, out_bias, mlp_bias, output_bias: biases of those matrices.
        gated: feed-forward layers have three matrices, else two.
        routed: its experts.
        latent: it has multi-head latent attention.
        per_layer: it has Gemma 3n's further parts.
        sinks: each head has a logit of its own in the softmax.
        plain_heads: each head has keys and values of its own, `hidden / heads` wide, whatever the
            config says.
    """

    defaults: Mapping[str, Any]
    windows: Literal["none", "all", "types"] = "none"
    every: int | str = 1
    norms: int = 2
    norm: int = 1
    qk_norm: Literal["none", "head", "wide"] = "none"
    qk_norm_if: str | None = None
    qkv_bias: Switch = False
    out_bias: Switch = False
    mlp_bias: Switch = False
    output_bias: Switch = False
    gated: bool = True
    routed: Routed | None = None
    latent: bool = False
    per_layer: bool = False
    sinks: bool = False
    plain_heads: bool = False


def _shape(figures: tuple[int | None, ...], **more: Any) -> dict[str, Any]:
    """Values of `FIGURES`, and of other fields."""
    known = {"head_dim": None, "tie_word_embeddings": False}
    return {**dict(zip(FIGURES, figures, strict=True)), **known, **more}


_TIED = {"tie_word_embeddings": True}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_LLAMA = Family(
    _shape((32, 4096, 11008, 32, None, 32000, 2048)),
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mlp_bias="mlp_bias",
)
_MISTRAL = Family(
    _shape((32, 4096, 14336, 32, 8, 32000, 131072), sliding_window=4096), windows="all"
)
_QWEN3 = Family(
    _shape((32, 4096, 22016, 32, 32, 151936, 32768), head_dim=128, **_QWEN),
    windows="types",
    every="last",
    qk_norm="head",
    qkv_bias="attention_bias",
    out_bias="attention_bias",
)
_GEMMA = Family(
    _shape((28, 3072, 24576, 16, 16, 256000, 8192), head_dim=256, **_TIED),
    qkv_bias="attention_bias",
    out_bias="attention_bias",
)
_GEMMA2 = replace(
    _GEMMA,
    defaults=_shape(
        (26, 2304, 9216, 8, 4, 256000, 8192), head_dim=256, sliding_window=4096, **_TIED
    ),
    windows="types",
    every=2,
    norms=4,
)
_OLMO2 = Family(
    _shape((32, 4096, 11008, 32, None, 50304, 2048)),
    qk_norm="wide",
    qkv_bias="attention_bias",
    out_bias="attention_bias",
)
_GLM = Family(
    _shape((40, 4096, 13696, 32, 2, 151552, 131072), head_dim=128, attention_bias=True),
    qkv_bias="attention_bias",
)
_COHERE = Family(
    _shape((40, 8192, 22528, 64, None, 256000, 8192), **_TIED),
    norms=1,
    qk_norm="wide",
    qk_norm_if="use_qk_norm",
    qkv_bias="attention_bias",
    out_bias="attention_bias",
)
_LATENT = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
_DEEPSEEK3 = Family(
    _shape(
        (61, 7168, 18432, 128, 128, 129280, 4096),
        moe_intermediate_size=2048,
        n_shared_experts=1,
        n_routed_experts=256,
        num_experts_per_tok=8,
        first_k_dense_replace=3,
        **_LATENT,
    ),
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    latent=True,
    routed=Routed(
        "n_routed_experts", "num_local_experts", dense="first", shared="n_shared_experts"
    ),
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "mistral": _MISTRAL,
    "ministral": replace(_MISTRAL, windows="types", every="window"),
    "ministral3": replace(
        _MISTRAL,
        defaults=_shape(
            (34, 4096, 14336, 32, 8, 131072, 262144), head_dim=128, sliding_window=None
        ),
    ),
    "mixtral": replace(
        _MISTRAL,
        defaults={
            **_MISTRAL.defaults,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        routed=Routed("num_local_experts", "num_experts", width="intermediate_size"),
    ),
    "phi3": Family(
        _shape((32, 3072, 8192, 32, None, 32064, 4096), sliding_window=None), windows="all"
    ),
    "qwen2": Family(
        _shape((32, 4096, 22016, 32, 32, 151936, 32768), **_QWEN),
        windows="types",
        every="last",
        qkv_bias=True,
    ),
    "qwen2_moe": Family(
        _shape(
            (24, 2048, 5632, 16, 16, 151936, 32768),
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            num_experts_per_tok=4,
            num_experts=60,
            decoder_sparse_step=1,
            mlp_only_layers=None,
            qkv_bias=True,
            **_QWEN,
        ),
        windows="types",
        every="even",
        qkv_bias="qkv_bias",
        routed=Routed(
            "num_experts", dense="sparse", shared_width="shared_expert_intermediate_size"
        ),
    ),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(
        _QWEN3,
        defaults=_shape(
            (24, 2048, 6144, 32, 4, 151936, 32768),
            use_sliding_window=False,
            sliding_window=4096,
            moe_intermediate_size=768,
            num_experts_per_tok=8,
            num_experts=128,
            decoder_sparse_step=1,
            mlp_only_layers=None,
        ),
        windows="all",
        routed=Routed("num_experts", "num_local_experts", dense="sparse"),
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(
        _GEMMA2,
        defaults={
            **_GEMMA2.defaults,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
        },
        every="sliding_window_pattern",
        qk_norm="head",
    ),
    "gemma3n_text": replace(
        _GEMMA2,
        defaults=_shape(
            (35, 2048, 16384, 8, 2, 262400, 32768),
            head_dim=256,
            sliding_window=512,
            vocab_size_per_layer_input=262144,
            hidden_size_per_layer_input=256,
            altup_num_inputs=4,
            num_kv_shared_layers=15,
            laurel_rank=64,
            **_TIED,
        ),
        every=5,
        qk_norm="head",
        per_layer=True,
    ),
    "gpt_oss": Family(
        _shape(
            (36, 2880, 2880, 64, 8, 201088, 131072),
            head_dim=64,
            sliding_window=128,
            num_local_experts=128,
            num_experts_per_tok=4,
            attention_bias=True,
        ),
        windows="types",
        every=2,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        routed=Routed("num_local_experts", "num_experts", width="intermediate_size", bias=True),
        sinks=True,
    ),
    "deepseek_v2": replace(
        _DEEPSEEK3,
        defaults=_shape(
            (32, 4096, 11008, 32, None, 102400, 2048),
            moe_intermediate_size=1407,
            n_shared_experts=2,
            n_routed_experts=64,
            num_experts_per_tok=None,
            first_k_dense_replace=0,
            **_LATENT,
        ),
        mlp_bias="mlp_bias",
        routed=Routed("n_routed_experts", "num_experts", dense="first", shared="n_shared_experts"),
    ),
    "deepseek_v3": _DEEPSEEK3,
    "llama4_text": Family(
        _shape(
            (48, 5120, 8192, 40, 8, 202048, 131072),
            head_dim=128,
            intermediate_size_mlp=16384,
            num_experts_per_tok=1,
            num_local_experts=16,
            interleave_moe_layer_step=1,
            moe_layers=None,
            no_rope_layers=None,
            no_rope_layer_interval=4,
            attention_chunk_size=8192,
        ),
        windows="types",
        every="rope",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        routed=Routed(
            "num_local_experts",
            width="intermediate_size",
            dense_width="intermediate_size_mlp",
            dense="listed",
            shared=1,
        ),
    ),
    "glm": _GLM,
    "glm4": replace(_GLM, norms=4),
    "glm4_moe": Family(
        _shape(
            (46, 4096, 10944, 96, 8, 151552, 131072),
            moe_intermediate_size=1408,
            num_experts_per_tok=8,
            n_shared_experts=1,
            n_routed_experts=128,
            first_k_dense_replace=1,
        ),
        qkv_bias="attention_bias",
        qk_norm="head",
        qk_norm_if="use_qk_norm",
        routed=Routed(
            "n_routed_experts", "num_local_experts", dense="first", shared="n_shared_experts"
        ),
    ),
    "olmo": replace(_OLMO2, norm=0, qk_norm="none"),
    "olmo2": _OLMO2,
    "olmo3": replace(
        _OLMO2, defaults={**_OLMO2.defaults, "sliding_window": 4096}, windows="types", every=4
    ),
    "smollm3": Family(
        _shape(
            (36, 2048, 11008, 16, 4, 128256, 32768),
            use_sliding_window=False,
            sliding_window=None,
            no_rope_layers=None,
            no_rope_layer_interval=4,
            **_TIED,
        ),
        windows="types",
        every="rope",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "cohere": _COHERE,
    "cohere2": replace(
        _COHERE,
        defaults={**_COHERE.defaults, "sliding_window": 4096, "sliding_window_pattern": 4},
        windows="types",
        every="sliding_window_pattern",
        qk_norm="none",
    ),
    "exaone4": Family(
        _shape(
            (32, 4096, 16384, 32, 32, 102400, 2048), sliding_window=4096, sliding_window_pattern=4
        ),
        windows="types",
        every="sliding_window_pattern",
        qk_norm="head",
    ),
    "seed_oss": Family(
        _shape((64, 4096, 27648, 80, 8, 155136, 524288), head_dim=128, attention_bias=True),
        qkv_bias="attention_bias",
        out_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
    "gpt_neox": Family(
        _shape((44, 6144, 24576, 64, None, 50432, 2048), attention_bias=True),
        norm=2,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias=True,
        gated=False,
        plain_heads=True,
    ),
    "phi": Family(
        _shape((24, 2048, 8192, 32, None, 51200, 2048)),
        norms=1,
        norm=2,
        qk_norm="head",
        qk_norm_if="qk_layernorm",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        output_bias=True,
        gated=False,
    ),
    "starcoder2": Family(
        _shape((30, 3072, 12288, 24, 2, 49152, 4096), sliding_window=None, use_bias=True, **_TIED),
        windows="all",
        norm=2,
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        gated=False,
    ),
}
# What a model of several kinds of input calls its decoder.
TEXT = {"gemma3": "gemma3_text", "gemma3n": "gemma3n_text", "llama4": "llama4_text"}
