"""What a planner knows of a model: its shape, and where the figures come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Experts:
    """Feed-forward layers of which a token takes a few: a mixture of experts.

    Attributes:
        total: experts of a layer that a token chooses from.
        active: those that it takes.
        intermediate: width of one.
        layers: how many layers have them; the others have one feed-forward layer.
        shared: experts that every token takes besides.
    """

    total: int
    active: int
    intermediate: int
    layers: int
    shared: int = 0


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434).

    A token's keys and values of all heads come from `rank` numbers, and its position from `rope`
    channels that the heads share; an engine may hold those, or the heads' own keys and values.

    Attributes:
        rank: numbers from which keys and values are made.
        rope: channels of a key that are rotated, the same for all heads.
        nope: channels of a head's key that are not.
        value: channels of a head's value.
        query_rank: numbers from which queries are made; None: made from the hidden state.
    """

    rank: int
    rope: int
    nope: int
    value: int
    query_rank: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder.

    Attributes:
        name: as a user writes it.
        layers: decoder layers.
        hidden: width of the residual stream.
        intermediate: width of the feed-forward layers.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: channels of a head.
        vocabulary: rows of the embedding.
        parameters: all weights, embeddings included.
        feed_forward: those of the feed-forward layers.
        windows: for each layer its sliding window, the token itself included; None: it sees all.
        tied: the embedding is the output layer too.
        source: where the figures come from.
        active: weights that one token uses, embeddings included; None: all of them.
        trained_length: positions that it was trained for; None: its config doesn't say.
        chunked: `windows` are chunks counted from token 0, and a query sees its own alone.
        experts: None: every layer has one feed-forward layer.
        latent: None: heads have keys and values of their own, `head_dim` wide.
        shares: for each layer the earlier one whose keys and values it reads; None: its own. Empty:
            all have their own.
        learned_sinks: each head has a logit of its own in the softmax, and no key to it.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    parameters: int
    feed_forward: int
    windows: tuple[int | None, ...]
    tied: bool
    source: str
    active: int | None = None
    trained_length: int | None = None
    chunked: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    shares: tuple[int | None, ...] = ()
    learned_sinks: bool = False

    @property
    def linear_parameters(self) -> int:
        """Weights that every token is multiplied with.

        An embedding is looked up, and prefill needs the output layer for its last token alone.
        """
        return self.parameters - self.vocabulary * self.hidden * (1 if self.tied else 2)

    def kv_bytes(self, itemsize: int = 2) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


# All have feed-forward layers with a gate, three matrices. Beside the matrices they differ in their
# norms (each `hidden` wide), the norms of queries and keys, and biases.
@dataclass(frozen=True)
class _Family:
    norms: int = 2
    head_norms: bool = False
    wide_norms: bool = False
    qkv_bias: bool = False
    windowed: bool = True


_FAMILIES = {
    "llama": _Family(windowed=False),
    "mistral": _Family(),
    "ministral": _Family(),
    "phi3": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(head_norms=True),
    "gemma": _Family(windowed=False),
    "gemma2": _Family(norms=4),
    "gemma3_text": _Family(norms=4, head_norms=True),
    "olmo2": _Family(wide_norms=True, windowed=False),
    "olmo3": _Family(wide_norms=True),
    "smollm3": _Family(),
}
# Each changes what a layer holds or costs.
_UNKNOWN = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "kv_lora_rank",
    "num_kv_shared_layers",
    "attention_chunk_size",
)
_TIED = {"gemma", "gemma2", "gemma3_text"}


def from_config(config: str | Path | Mapping[str, Any], name: str | None = None) -> ModelSpec:
    """Reads a Hugging Face `config.json`: its path, its folder's, or what it holds.

    Raises:
        ValueError: one sentence: it is no config, it lacks a figure, or its model has parts that
            the planner doesn't know.

    >>> spec = from_config({"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
    ...     "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100})
    >>> spec.kv_heads, spec.head_dim, spec.parameters
    (4, 16, 95040)
    """
    if isinstance(config, Mapping):
        given, source = config, "a config"
    else:
        given, source = _read(Path(config))
    inner = given.get("text_config")
    values: Mapping[str, Any] = {**given, **inner} if isinstance(inner, Mapping) else given
    kind = values.get("model_type")
    if kind not in _FAMILIES:
        raise ValueError(
            f"{source}: model_type is {kind!r}; allowed are {', '.join(sorted(_FAMILIES))}"
        )
    for part in _UNKNOWN:
        if values.get(part):
            raise ValueError(
                f"{source}: {part} is {values[part]!r}; only dense decoders with grouped-query "
                "attention are allowed so far"
            )

    def count(key: str, default: int | None = None) -> int:
        value = values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{source}: {key} is {value!r}; a whole number of at least 1 is allowed"
            )
        return value

    layers, hidden = count("num_hidden_layers"), count("hidden_size")
    heads = count("num_attention_heads")
    # Gemma's configs may leave out a head_dim that isn't hidden / heads.
    if values.get("head_dim") is None and kind.startswith("gemma"):
        raise ValueError(f"{source}: head_dim is missing; {kind} needs it")
    kv_heads, head_dim = count("num_key_value_heads", heads), count("head_dim", hidden // heads)
    if heads % kv_heads:
        raise ValueError(
            f"{source}: num_attention_heads is {heads} and num_key_value_heads {kv_heads}; a "
            "multiple of the latter is allowed"
        )
    family = _FAMILIES[kind]
    intermediate, vocabulary = count("intermediate_size"), count("vocab_size")
    feed_forward = 3 * hidden * intermediate * layers
    heads_width, kv_width = heads * head_dim, kv_heads * head_dim
    layer = 2 * hidden * (heads_width + kv_width) + family.norms * hidden
    layer += 2 * head_dim if family.head_norms else 0
    layer += heads_width + kv_width if family.wide_norms else 0
    if family.qkv_bias or values.get("attention_bias"):
        layer += heads_width + 2 * kv_width
    if values.get("attention_bias") and not family.qkv_bias:
        layer += hidden
    if values.get("mlp_bias"):
        layer += 2 * intermediate + hidden
    tied = bool(values.get("tie_word_embeddings", kind in _TIED))
    embeddings = vocabulary * hidden * (1 if tied else 2)
    return ModelSpec(
        name=name or str(values.get("_name_or_path") or kind),
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        parameters=embeddings + layers * layer + feed_forward + hidden,
        feed_forward=feed_forward,
        windows=_windows(values, layers, source) if family.windowed else (None,) * layers,
        tied=tied,
        source=source,
    )


def _read(path: Path) -> tuple[Mapping[str, Any], str]:
    file = path / "config.json" if path.is_dir() else path
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"model {file}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"model {file}: it is no JSON ({error})") from None
    if not isinstance(given, Mapping):
        raise ValueError(f"model {file}: it holds no config; an object is allowed")
    return given, str(file)


def _windows(values: Mapping[str, Any], layers: int, source: str) -> tuple[int | None, ...]:
    """As transformers reads it: `layer_types` first, then the fields that older configs have."""
    window, types = values.get("sliding_window"), values.get("layer_types")
    if values.get("use_sliding_window") is False:
        window = None
    if window is not None and (
        isinstance(window, bool) or not isinstance(window, int) or window < 1
    ):
        raise ValueError(
            f"{source}: sliding_window is {window!r}; null or a whole number of at least 1 is "
            "allowed"
        )
    if types is not None:
        known = {"full_attention": None, "sliding_attention": window}
        if len(types) != layers or not set(types) <= set(known):
            raise ValueError(
                f"{source}: layer_types has {len(types)} entries of {', '.join(sorted(set(types)))}"
                f"; {layers} of {' and '.join(known)} are allowed"
            )
        return tuple(known[kind] for kind in types)
    if values.get("use_sliding_window") and values.get("max_window_layers") is not None:
        first = values["max_window_layers"]
        return tuple(window if layer >= first else None for layer in range(layers))
    every = values.get("sliding_window_pattern") or values.get("_sliding_window_pattern")
    if every is None and values.get("model_type") == "gemma2":
        every = 2
    if every:
        return tuple(window if (layer + 1) % every else None for layer in range(layers))
    return (window,) * layers


def _preset(name: str, repository: str, config: Mapping[str, Any]) -> ModelSpec:
    source = f"https://huggingface.co/{repository}/blob/main/config.json"
    return replace(from_config(config, name), source=source)


def _llama(layers: int, hidden: int, wide: int, heads: int, kv: int, words: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": words,
    }


_MISTRAL = {**_llama(32, 4096, 14336, 32, 8, 32000), "model_type": "mistral"}
_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", {**_MISTRAL, "sliding_window": 4096}),
    "mistral-7b-v0.3": ("mistralai/Mistral-7B-v0.3", {**_MISTRAL, "vocab_size": 32768}),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", _llama(32, 4096, 11008, 32, 32, 32000)),
    "llama-2-70b": ("meta-llama/Llama-2-70b-hf", _llama(80, 8192, 28672, 64, 8, 32000)),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", _llama(32, 4096, 14336, 32, 8, 128256)),
    "llama-3.1-70b": ("meta-llama/Llama-3.1-70B", _llama(80, 8192, 28672, 64, 8, 128256)),
    "llama-3.1-405b": ("meta-llama/Llama-3.1-405B", _llama(126, 16384, 53248, 128, 8, 128256)),
    "qwen3-8b": (
        "Qwen/Qwen3-8B",
        {**_llama(36, 4096, 12288, 32, 8, 151936), "model_type": "qwen3", "head_dim": 128},
    ),
}
MODELS = tuple(_PRESETS)


def model(name: str) -> ModelSpec:
    """A preset, or the model of a folder or a file that holds a Hugging Face config.

    Raises:
        ValueError: it is neither, or as in `from_config`.

    >>> model("mistral-7b").kv_bytes(), model("mistral-7b").windows[0]
    (131072, 4096)
    """
    preset = _PRESETS.get(name.lower())
    if preset is not None:
        return _preset(name.lower(), *preset)
    if Path(name).exists():
        return from_config(name, Path(name).name)
    raise ValueError(
        f"model {name!r} is not known; allowed are {', '.join(MODELS)}, and the path of a "
        "config.json or of a folder that holds one"
    )
