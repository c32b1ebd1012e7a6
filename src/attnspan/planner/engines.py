"""Bytes of a KV cache, as theory has it and as engines allocate it: in closed form, without torch.

`theory` counts the tokens that a query still sees, and keys and values alone. The engines hold more
(`attnspan.planner.allocated`).
"""

from __future__ import annotations

from dataclasses import replace

from attnspan.planner import allocated
from attnspan.planner.held import (
    STORAGES,
    CacheBytes,
    LayerCache,
    bytes_of,
    head_slots,
    layer_policies,
    own,
    token_of,
)
from attnspan.planner.spec import ModelSpec
from attnspan.policies import PerLayer, Policy

ENGINES = ("theory", "attnspan", "transformers", "vllm", "llama.cpp")
# What an engine takes besides, and what it is unless given.
_OPTIONS = {
    "call": ("transformers", 1),
    "page": ("vllm", 16),
    "batched": ("vllm", 2048),
    "microbatch": ("llama.cpp", 512),
}


def cache_bytes(
    spec: ModelSpec,
    tokens: int,
    *,
    batch: int = 1,
    policy: Policy | PerLayer | None = None,
    storage: object = "dense",
    itemsize: int = 2,
    engine: str = "theory",
    call: int | None = None,
    page: int | None = None,
    batched: int | None = None,
    microbatch: int | None = None,
) -> CacheBytes:
    """What a cache holds once every sequence of a batch has seen so many tokens.

    Args:
        spec: the model.
        tokens: of each sequence, without padding.
        batch: sequences.
        policy: for "theory" and "attnspan"; it acts on the layers that see everything, and on
            sliding ones where all slide. None: every token that the model itself can see.
        storage: "dense", "int8" or "int4", or a value that reads so; the codes are attnspan's.
        itemsize: bytes of a number that is held dense.
        engine: one of `ENGINES`.
        call: `transformers`: tokens that the last call brought; 1 is a step of decoding.
        page: `vllm`: tokens of a block, 16 unless given.
        batched: `vllm`: max_num_batched_tokens, 2048 unless given.
        microbatch: `llama.cpp`: n_ubatch, 512 unless given.

    Raises:
        ValueError: one sentence: a size is wrong, or the engine has no such policy, storage,
            option or model.

    >>> from attnspan.planner.presets import model
    >>> cache_bytes(model("mistral-7b"), 131_072).total // 2**20  # MiB: the window bounds it
    512
    >>> cache_bytes(model("gemma-3-4b"), 131_072, engine="llama.cpp").layers[0].slots
    1536
    """
    given = {"call": call, "page": page, "batched": batched, "microbatch": microbatch}
    counted = {"tokens": tokens, "batch": batch, "itemsize": itemsize}
    for name, value in {**counted, **{n: v for n, v in given.items() if v is not None}}.items():
        least = 0 if name == "tokens" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; a whole number of at least {least} is allowed")
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not known; allowed are {', '.join(ENGINES)}")
    if str(storage) not in STORAGES:
        raise ValueError(f"storage {storage!r} is not known; allowed are {', '.join(STORAGES)}")
    for name, value in given.items():
        owner = _OPTIONS[name][0]
        if value is not None and owner != engine:
            raise ValueError(f"{name} is {value}; engine {engine} has none, {owner} has")
    options = {name: _OPTIONS[name][1] if v is None else v for name, v in given.items()}
    if engine not in ("theory", "attnspan"):
        if policy is not None:
            raise ValueError(
                f"policy {policy}: engine {engine} has no policies; theory and attnspan have"
            )
        if str(storage) != "dense":
            raise ValueError(
                f"storage {storage}: engine {engine} has no such codes; theory and attnspan have"
            )
    match engine:
        case "attnspan":
            return allocated.attnspan(spec, tokens, batch, policy, str(storage), itemsize)
        case "transformers":
            return allocated.transformers(spec, tokens, batch, itemsize, options["call"])
        case "vllm":
            return allocated.vllm(
                spec, tokens, batch, itemsize, options["page"], options["batched"]
            )
        case "llama.cpp":
            return allocated.llama_cpp(spec, tokens, batch, itemsize, options["microbatch"])
    return _theory(spec, tokens, batch, policy, str(storage), itemsize)


def _theory(
    spec: ModelSpec,
    tokens: int,
    batch: int,
    policy: Policy | PerLayer | None,
    storage: str,
    itemsize: int,
) -> CacheBytes:
    policies, token = layer_policies(spec, policy), batch * token_of(spec, storage, itemsize)
    # Layers are often alike, and a pooled memory's slots take a few steps to count.
    found = {each: head_slots(each, spec.kv_heads, tokens) for each in set(policies)}
    # Heads' shares of a token are equal.
    layers = tuple(
        LayerCache(max(held), sum(held) * token // len(held)) if owns else LayerCache(0, 0)
        for held, owns in zip((found[each] for each in policies), own(spec), strict=True)
    )
    windows = any(window is not None for window in spec.windows)
    everything = tuple(
        replace(layer, slots=tokens, bytes=tokens * token) if window and layer.slots else layer
        for layer, window in zip(layers, spec.windows, strict=True)
    )
    return CacheBytes("theory", layers, full_pages=bytes_of(everything) if windows else None)
