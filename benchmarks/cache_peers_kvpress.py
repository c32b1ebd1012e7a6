"""kvpress's presses, as its own pipeline calls them, for cache_peers_worker.py.

https://github.com/NVIDIA/kvpress: the prompt goes through the model whole, under a press; questions
come after it, at the positions that they would have in the whole text, except where a press turns
kept keys to positions next to each other. A `DecodingPress` counts calls, so tokens come one at a
time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import kvpress
import torch
from cache_peers_worker import Plain, Row
from transformers import DynamicCache, LlamaForCausalLM, QuantizedCache

INTERVAL = 16
CALLS = "a DecodingPress counts calls"
LAYERS = "its layers hold different numbers of tokens, and a mask of several queries is the first's"
REQUANTISED = "the whole cache is quantised anew every 128 tokens, counted from the prompt"


@lru_cache
def llama(path: str, attention: str = "sdpa") -> Any:
    return LlamaForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation=attention
    ).eval()


def rows(path: str, setting: dict[str, Any]) -> list[Row]:
    budget = setting["budget"]
    found = [Row("DynamicCache", "whole", lambda _: Plain(llama(path), DynamicCache()))]
    if setting["few"]:
        streaming = kvpress.StreamingLLMPress(), Ordered(), kvpress.TOVAPress()
        found += [bounded(path, budget, press) for press in streaming]
        return found + [bounded(path, budget, press, closed_up=True) for press in streaming[1:]]
    scorers = (
        kvpress.StreamingLLMPress(),
        kvpress.SnapKVPress(),
        kvpress.KnormPress(),
        kvpress.ExpectedAttentionPress(),
        kvpress.TOVAPress(),
        kvpress.KeyDiffPress(),
    )
    found += [cut(path, budget, press) for press in scorers]
    found += [
        cut(path, budget, kvpress.ObservedAttentionPress(), attention="eager"),
        cut(path, budget, kvpress.PyramidKVPress(), steps=LAYERS),
        cut(path, budget, kvpress.KeyRerotationPress(kvpress.StreamingLLMPress()), closed_up=True),
        cut(path, budget, kvpress.KeyRerotationPress(kvpress.SnapKVPress()), closed_up=True),
        cut(path, budget, kvpress.AdaKVPress(kvpress.SnapKVPress())),
        cut(path, budget, kvpress.SnapKVPress(), bits=4, steps=REQUANTISED),
    ]
    if setting["name"] == "tasks":
        return found  # questions are short: there is next to nothing to cut after the prompt
    return found + [bounded(path, budget, press) for press in (*scorers, Ordered())]


def cut(
    path: str,
    budget: int,
    press: Any,
    *,
    attention: str = "sdpa",
    bits: int | None = None,
    closed_up: bool = False,
    steps: str = "",
) -> Row:
    """The prompt is cut to `budget` tokens once; what comes after it is all kept."""

    def opened(_: int) -> Plain:
        model = llama(path, attention)
        masked = [layer.self_attn for layer in model.model.layers]
        for module in masked:
            module.masked_key_indices = None
        cache = DynamicCache()
        if bits is not None:
            cache = QuantizedCache("quanto", model.config, nbits=bits)
        return Plain(
            model,
            cache,
            pressed=lambda: _CutTo(press, budget)(model),
            also=lambda: [module.masked_key_indices for module in masked],
            stepped=bool(steps),
            closed_up=closed_up,
        )

    name = named(press)
    if attention != "sdpa":
        name += f", {attention} attention"
    if bits is not None:
        name += f" and QuantizedCache, quanto, {bits} bits"
    return Row(name, "cut", opened, steps)


def bounded(path: str, budget: int, press: Any, closed_up: bool = False) -> Row:
    """The prompt is cut, and every `INTERVAL` tokens the cache is cut again, so that it never holds
    more than `budget`."""
    later = press
    if isinstance(press, kvpress.SnapKVPress):
        # It scores by the last queries that the press holds: those since the last cut.
        later = kvpress.SnapKVPress(window_size=INTERVAL // 2)

    def opened(_: int) -> Plain:
        model = llama(path)
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
        later.compression_ratio = 0.0
        decoding = kvpress.DecodingPress(
            later, compression_interval=INTERVAL, target_size=budget - INTERVAL
        )
        both = kvpress.PrefillDecodingPress(_CutTo(press, budget - INTERVAL), decoding)
        return Plain(
            model,
            DynamicCache(),
            always=lambda: both(model),
            state=decoding,
            stepped=True,
            closed_up=closed_up,
        )

    where = ", positions after the tokens held" if closed_up else ""
    name = f"DecodingPress({named(later)}){where}"
    return Row(name, "bounded", opened, CALLS)


def named(press: Any) -> str:
    if isinstance(press, Ordered):
        return "StreamingLLMPress, kept in order by us"
    inner = getattr(press, "press", None)
    options = "" if inner is None else f"({named(inner)})"
    if isinstance(press, kvpress.SnapKVPress) and press.window_size != 64:
        options = f"(window_size={press.window_size})"
    return type(press).__name__ + options


class Ordered(kvpress.StreamingLLMPress):
    """StreamingLLMPress with what it keeps in its order.

    kvpress takes the best scores by `topk`, which puts equal ones in any order, and this press
    gives all that it keeps the same: from the second cut on its first are no longer the first.
    """

    def compress(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> Any:
        if not self.compression_ratio:
            return keys, values
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        kept = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        order = scores.topk(kept, dim=-1).indices.sort(dim=-1).values
        index = order[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, index), values.gather(2, index)


class _CutTo(kvpress.BasePress):
    """A press at the ratio that leaves `budget` tokens of a prompt."""

    def __init__(self, press: Any, budget: int) -> None:
        self.press, self.budget = press, budget

    def post_init_from_model(self, model: Any) -> None:
        self.press.post_init_from_model(model)

    def compress(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> Any:
        # Half a token more, since the press rounds down.
        kept = (self.budget + 0.5) / keys.shape[2]
        self.press.compression_ratio = 1 - kept if kept < 1 else 0.0
        return self.press.compress(module, hidden_states, keys, values, attentions, kwargs)
