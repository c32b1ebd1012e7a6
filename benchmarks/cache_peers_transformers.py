"""transformers' own caches, as its documentation makes them, for cache_peers_worker.py.

https://huggingface.co/docs/transformers/kv_cache
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from cache_peers_worker import Plain, Row
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    QuantizedCache,
    StaticCache,
)

REQUANTISED = "the whole cache is quantised anew every 128 tokens, counted from the prompt"


@lru_cache
def llama(path: str) -> Any:
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


@lru_cache
def sliding(path: str, window: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The same weights as a Mistral, which is a Llama with a window that its caches know."""
    config = llama(path).config.to_dict()
    for name in ("architectures", "model_type", "dtype", "attention_bias", "mlp_bias"):
        config.pop(name, None)
    # Loaded so and not cast, since a cast would take the rotary frequencies along.
    return MistralForCausalLM.from_pretrained(
        path, config=MistralConfig(**config, sliding_window=window), dtype=dtype
    ).eval()


def rows(path: str, setting: dict[str, Any]) -> list[Row]:
    model, budget = llama(path), setting["budget"]

    def row(name: str, kind: str, cache: Callable[[], Any], **options: Any) -> Row:
        stepped = bool(options.get("steps"))
        return Row(name, kind, lambda _: Plain(model, cache(), stepped=stepped), **options)

    def windowed(_: int) -> Plain:
        narrow = sliding(path, budget)
        return Plain(narrow, DynamicCache(config=narrow.config))

    found = [
        row("DynamicCache", "whole", lambda: DynamicCache(config=model.config)),
        Row("DynamicCache, sliding_window", "bounded", windowed),
    ]
    if setting["few"]:
        return found
    most = setting["most"]
    found.append(row("StaticCache", "whole", lambda: StaticCache(model.config, max_cache_len=most)))
    for backend, bits in (("quanto", 4), ("quanto", 2), ("hqq", 8), ("hqq", 4)):
        found.append(
            row(
                f"QuantizedCache, {backend}, {bits} bits",
                "whole",
                lambda b=backend, n=bits: QuantizedCache(b, model.config, nbits=n),
                steps=REQUANTISED,
            )
        )
    found.append(
        row(
            "QuantizedCache, quanto, 4 bits, residual_length=1",
            "whole",
            lambda: QuantizedCache("quanto", model.config, nbits=4, residual_length=1),
            steps="the whole cache is quantised anew at every token",
        )
    )
    found.append(row("QuantizedCache, fp8", "whole", lambda: QuantizedCache("fp8", model.config)))
    return found
