"""attnspan's caches, for cache_peers_worker.py: the prompt too goes through a bounded cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from cache_peers_worker import Row
from torch import Tensor
from transformers import LlamaForCausalLM

import attnspan
from attnspan.cache import parse_storage
from attnspan.policies import parse

BLOCK = 16
LAYERS, TRAINED = 10, 1024
WIDER = (7, 9)
RETRIEVAL = ((7, 0), (9, 1))
"""The layers whose windows cost the bundled model most, and the KV heads that retrieve, by
`attnspan doctor` (benchmarks/results/doctor_bundled.json)."""


@lru_cache
def llama(path: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    return LlamaForCausalLM.from_pretrained(path, dtype=dtype).eval()


class Attached:
    """A model with `attnspan.Cache`."""

    def __init__(self, model: Any, policy: str, storage: str, rollback: int) -> None:
        self.model = model
        self.attachment = attnspan.attach(model)
        self.attachment.__enter__()
        self.cache = attnspan.Cache(model, parse(policy), parse_storage(storage), rollback=rollback)

    def context(self, ids: Tensor) -> None:
        self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1)

    def feed(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, past_key_values=self.cache).logits

    def tried(self, ids: Tensor) -> Tensor:
        found = self.feed(ids)
        self.cache.crop(-ids.shape[1])
        return found

    def held(self) -> Sequence[Any]:
        return (self.cache.caches, self.cache.tables)

    def close(self) -> None:
        self.attachment.__exit__(None, None, None)


def rows(path: str, setting: dict[str, Any]) -> list[Row]:
    budget, most = setting["budget"], setting["most"]

    def row(policy: str, storage: str) -> Row:
        kind = "whole" if policy == "keep-all" else "bounded"
        name = policy if storage == "dense" else f"{policy}, {storage}"
        return Row(name, kind, lambda undo: Attached(llama(path), policy, storage, undo))

    chosen = few(budget) if setting["few"] else specs(budget, most)
    if setting["few"] and coded(budget, "int4") > TRAINED:
        chosen.append((sinks(TRAINED), "int4"))
    if setting["grown"]:
        chosen += few(setting["grown"])[1:3]
    return [row(policy, storage) for policy, storage in chosen]


def few(budget: int) -> list[tuple[str, str]]:
    """The policies that other libraries have too, and those for streams."""
    return [
        ("keep-all", "dense"),
        (sinks(budget), "dense"),
        (heavy(budget), "dense"),
        (compressive(budget), "dense"),
        (sinks(coded(budget, "int8")), "int8"),
        (sinks(coded(budget, "int4")), "int4"),
    ]


def specs(budget: int, most: int) -> list[tuple[str, str]]:
    """Policies with storages that take the bytes of `budget` dense tokens, or less."""
    return [
        *few(budget),
        (f"window:{budget}", "dense"),
        (heavy(coded(budget, "int8")), "int8"),
        (snap(budget), "dense"),
        (snap(coded(budget, "int8")), "int8"),
        (by_layer(budget, most), "dense"),
        (by_head(budget, most), "dense"),
        ("keep-all", "int8"),
        ("keep-all", "int4"),
    ]


def sinks(budget: int) -> str:
    return f"sinks:4+window:{budget - 4}"


def heavy(budget: int) -> str:
    half = (budget - BLOCK + 1) // 2
    return f"heavy:{half}+window:{budget - BLOCK + 1 - half},block={BLOCK}"


def compressive(budget: int) -> str:
    memory = budget // 4
    window = budget - 4 - memory - 2 - BLOCK
    return f"compressive:window={window},memory={memory},rate=4,block={BLOCK}"


def snap(budget: int) -> str:
    window = budget // 4
    return f"snap:{budget - window + 1 - BLOCK}+window:{window},block={BLOCK}"


def by_layer(budget: int, most: int) -> str:
    """Twice the budget in the layers that the doctor found to need most, less in the others."""
    wide = min(2 * budget, most)
    narrow = (LAYERS * budget - len(WIDER) * wide) // (LAYERS - len(WIDER))
    return f"layers({'; '.join(sinks(wide if i in WIDER else narrow) for i in range(LAYERS))})"


def by_head(budget: int, most: int) -> str:
    """Four times the budget in the heads that retrieve, less in the others."""
    wide = min(4 * budget, most)
    heads = 2 * LAYERS
    narrow = sinks((heads * budget - len(RETRIEVAL) * wide) // (heads - len(RETRIEVAL)))
    layers = [
        f"heads({'; '.join(sinks(wide) if (i, h) in RETRIEVAL else narrow for h in range(2))})"
        if any(i == layer for layer, _ in RETRIEVAL)
        else narrow
        for i in range(LAYERS)
    ]
    return f"layers({'; '.join(layers)})"


def coded(budget: int, storage: str) -> int:
    """Tokens in codes, after 4 dense ones, that take no more than `budget` dense tokens.

    A head's key and value take 256 bytes in bf16, 132 in int8 and 72 in int4, whose means per
    channel take 256 of each head.
    """
    room = (budget - 4) * 256
    return 4 + (room // 132 if storage == "int8" else (room - 256) // 72)
