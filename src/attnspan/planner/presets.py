"""Published models by name, each with the config that its figures come from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from attnspan.planner.configs import from_config
from attnspan.planner.families import FIGURES
from attnspan.planner.fields import shown
from attnspan.planner.spec import ModelSpec


def _shape(kind: str, figures: tuple[int, ...], **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **dict(zip(FIGURES, figures, strict=True)), **more}


def _mistral(words: int, window: int | None) -> dict[str, Any]:
    return _shape("mistral", (32, 4096, 14336, 32, 8, words, 32768), sliding_window=window)


def _llama3(
    layers: int, hidden: int, wide: int, heads: int, length: int = 131072, **more: Any
) -> dict[str, Any]:
    return _shape("llama", (layers, hidden, wide, heads, 8, 128256, length), **more)


def _qwen3(
    layers: int, hidden: int, wide: int, heads: int, *, tied: bool = False
) -> dict[str, Any]:
    figures = (layers, hidden, wide, heads, 8, 151936, 40960)
    return _shape("qwen3", figures, tie_word_embeddings=tied)


def _qwen3_moe(layers: int, hidden: int, wide: int, heads: int, expert: int) -> dict[str, Any]:
    return _shape(
        "qwen3_moe",
        (layers, hidden, wide, heads, 4, 151936, 40960),
        head_dim=128,
        moe_intermediate_size=expert,
        num_experts=128,
        num_experts_per_tok=8,
    )


def _gemma3(
    layers: int, hidden: int, wide: int, heads: int, kv: int, dim: int = 256
) -> dict[str, Any]:
    figures = (layers, hidden, wide, heads, kv, 262208, 131072)
    return _shape("gemma3_text", figures, head_dim=dim, sliding_window=1024)


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return _shape("gpt_oss", (layers, 2880, 2880, 64, 8, 201088, 131072), num_local_experts=experts)


def _phi3(window: int, length: int, *, medium: bool = False) -> dict[str, Any]:
    figures = (40, 5120, 17920, 40, 10) if medium else (32, 3072, 8192, 32, 32)
    return _shape("phi3", (*figures, 32064, length), sliding_window=window)


# Names, the repository whose config.json it is, and the figures there that decide a cost.
_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", _mistral(32000, 4096)),
    "mistral-7b-v0.3": ("mistralai/Mistral-7B-v0.3", _mistral(32768, None)),
    "mixtral-8x7b": (
        "mistralai/Mixtral-8x7B-v0.1",
        _shape("mixtral", (32, 4096, 14336, 32, 8, 32000, 32768), num_local_experts=8),
    ),
    "llama-2-7b": (
        "meta-llama/Llama-2-7b-hf",
        _shape("llama", (32, 4096, 11008, 32, 32, 32000, 4096)),
    ),
    "llama-2-13b": (
        "meta-llama/Llama-2-13b-hf",
        _shape("llama", (40, 5120, 13824, 40, 40, 32000, 4096)),
    ),
    "llama-2-70b": (
        "meta-llama/Llama-2-70b-hf",
        _shape("llama", (80, 8192, 28672, 64, 8, 32000, 4096)),
    ),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", _llama3(32, 4096, 14336, 32, 8192)),
    "llama-3-70b": ("meta-llama/Meta-Llama-3-70B", _llama3(80, 8192, 28672, 64, 8192)),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", _llama3(32, 4096, 14336, 32)),
    "llama-3.1-70b": ("meta-llama/Llama-3.1-70B", _llama3(80, 8192, 28672, 64)),
    "llama-3.1-405b": ("meta-llama/Llama-3.1-405B", _llama3(126, 16384, 53248, 128)),
    "llama-3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        _llama3(16, 2048, 8192, 32, head_dim=64, tie_word_embeddings=True),
    ),
    "llama-3.2-3b": (
        "meta-llama/Llama-3.2-3B",
        _llama3(28, 3072, 8192, 24, head_dim=128, tie_word_embeddings=True),
    ),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", _qwen3(28, 1024, 3072, 16, tied=True)),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", _qwen3(28, 2048, 6144, 16, tied=True)),
    "qwen3-4b": ("Qwen/Qwen3-4B", _qwen3(36, 2560, 9728, 32, tied=True)),
    "qwen3-8b": ("Qwen/Qwen3-8B", _qwen3(36, 4096, 12288, 32)),
    "qwen3-14b": ("Qwen/Qwen3-14B", _qwen3(40, 5120, 17408, 40)),
    "qwen3-32b": ("Qwen/Qwen3-32B", _qwen3(64, 5120, 25600, 64)),
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B", _qwen3_moe(48, 2048, 6144, 32, 768)),
    "qwen3-235b-a22b": ("Qwen/Qwen3-235B-A22B", _qwen3_moe(94, 4096, 12288, 64, 1536)),
    "gemma-3-1b": (
        "google/gemma-3-1b-pt",
        _shape(
            "gemma3_text",
            (26, 1152, 6912, 4, 1, 262144, 32768),
            head_dim=256,
            sliding_window=512,
        ),
    ),
    "gemma-3-4b": ("google/gemma-3-4b-pt", _gemma3(34, 2560, 10240, 8, 4)),
    "gemma-3-12b": ("google/gemma-3-12b-pt", _gemma3(48, 3840, 15360, 16, 8)),
    "gemma-3-27b": ("google/gemma-3-27b-pt", _gemma3(62, 5376, 21504, 32, 16, 128)),
    "gpt-oss-20b": ("openai/gpt-oss-20b", _gpt_oss(24, 32)),
    "gpt-oss-120b": ("openai/gpt-oss-120b", _gpt_oss(36, 128)),
    "phi-3-mini-4k": ("microsoft/Phi-3-mini-4k-instruct", _phi3(2047, 4096)),
    "phi-3-mini-128k": ("microsoft/Phi-3-mini-128k-instruct", _phi3(262144, 131072)),
    "phi-3-medium-4k": ("microsoft/Phi-3-medium-4k-instruct", _phi3(2047, 4096, medium=True)),
    "phi-3-medium-128k": (
        "microsoft/Phi-3-medium-128k-instruct",
        _phi3(131072, 131072, medium=True),
    ),
    # The layer that predicts a token further is not in it: it is left out when the model runs.
    "deepseek-v3": (
        "deepseek-ai/DeepSeek-V3",
        _shape("deepseek_v3", (61, 7168, 18432, 128, 128, 129280, 163840)),
    ),
}
_BUNDLED = Path(__file__).parent.parent / "models" / "bundled" / "config.json"
MODELS = ("bundled", *_PRESETS)


@dataclass(frozen=True)
class Opaque:
    """A model of which the context length is public and nothing else that a cost depends on.

    Attributes:
        name: as a user writes it.
        context: tokens, as its maker counts them.
        source: where that is said.
        says: what is said there.
    """

    name: str
    context: int
    source: str
    says: str


_CLAUDE = "https://www.anthropic.com/news/claude-3-family"
_CLAUDE_SAYS = "a 200K context window at launch; inputs over 1 million tokens for some customers"
OPAQUE = {
    each.name: each
    for each in (
        Opaque(
            "gemini-1.5-pro",
            2_000_000,
            "https://developers.googleblog.com/en/new-features-for-the-gemini-api-and-google-ai-studio/",
            "2 million tokens since June 2024, 1 million before; a sparse mixture of experts",
        ),
        Opaque("claude-3-opus", 200_000, _CLAUDE, _CLAUDE_SAYS),
        Opaque("claude-3-sonnet", 200_000, _CLAUDE, _CLAUDE_SAYS),
        Opaque("claude-3-haiku", 200_000, _CLAUDE, _CLAUDE_SAYS),
        Opaque(
            "gpt-4-turbo",
            128_000,
            "https://openai.com/index/new-models-and-developer-products-announced-at-devday/",
            "a 128K context window",
        ),
    )
}


def model(name: str) -> ModelSpec:
    """A preset, or the model of a folder or a file that holds a Hugging Face config.

    Args:
        name: one of `MODELS`, the Hugging Face repository of one, both in any case, or a path.

    Raises:
        ValueError: it is none of them, nothing but its context is public, or as in `from_config`.

    >>> model("mistral-7b").kv_bytes(), model("mistralai/Mistral-7B-v0.1").windows[0]
    (131072, 4096)
    """
    key = name.lower()
    if key in OPAQUE:
        known = OPAQUE[key]
        raise ValueError(
            f"model {name}: layers, heads and weights are not public, only the context of "
            f"{known.context:,} tokens is ({known.source})"
        )
    if key == "bundled":
        source = "src/attnspan/models/bundled/config.json"
        return replace(from_config(_BUNDLED, key), source=source)
    if key in _PRESETS:
        return _preset(key)
    if _exists(name):
        return from_config(name, Path(name).name)
    for preset, (repository, _) in _PRESETS.items():
        if key in (repository.lower(), repository.lower().partition("/")[2]):
            return _preset(preset)
    near = get_close_matches(key.rpartition("/")[2], (*MODELS, *OPAQUE), n=3, cutoff=0.5)
    close = f"; close are {', '.join(near)}" if near else ""
    raise ValueError(
        f"model {shown(name)} is not known{close}; allowed are presets (`attnspan plan --list` "
        "names them), and the path of a config.json or of a folder that holds one"
    )


def _preset(name: str) -> ModelSpec:
    repository, config = _PRESETS[name]
    source = f"https://huggingface.co/{repository}/blob/main/config.json"
    return replace(from_config(config, name), source=source)


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):  # too long for a path, or a NUL in it
        return False
