"""What engines allocate for a KV cache: buffers grow ahead, pages and cells are rounded up.

`attnspan` and `transformers` are held to the byte against the caches themselves in the tests;
`vllm` and `llama_cpp` follow their sources, which were read and not run:

- https://github.com/vllm-project/vllm/blob/001cabc1be16a59a70d720ed61a13b678c060a18/vllm/v1/kv_cache_interface.py
  and https://docs.vllm.ai/en/latest/design/hybrid_kv_cache_manager/
- https://github.com/ggml-org/llama.cpp/blob/02c28f533ebba3e4ea944fc4a0719a012b3e7097/src/llama-kv-cache-iswa.cpp
  and `llama-context.cpp` beside it, which rounds the context up to 256 cells.
"""

from __future__ import annotations

from collections import Counter

from attnspan.planner.held import (
    CacheBytes,
    LayerCache,
    bytes_of,
    bytes_per_token,
    layer_caches,
    layer_policies,
    own,
    token_of,
)
from attnspan.planner.spec import ModelSpec
from attnspan.policies import PerLayer, Policy

# Of attnspan.cache: slots come in steps, and int4 learns the means of so many keys, after at least
# so many that it skips.
_GROWTH = 256
_WARMUP, _SKIP = 64, 4
# Cells of llama.cpp come in steps.
_CELLS = 256
# Families whose windows llama.cpp keeps (`src/models/` there sets `swa_type`). Mistral's it has no
# code for (`llama.cpp`), and Phi 3's it switches off (`phi3.cpp`).
_LLAMA_CPP_SLIDES = frozenset(
    {
        "cohere2",
        "exaone4",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gpt_oss",
        "llama4_text",
        "olmo3",
    }
)


def attnspan(
    spec: ModelSpec,
    tokens: int,
    batch: int,
    policy: Policy | PerLayer | None,
    storage: str,
    itemsize: int,
) -> CacheBytes:
    for lacks, why in (
        (spec.latent is not None, "latent attention"),
        (spec.chunked, "chunked attention"),
        (not all(own(spec)), "layers that share keys and values"),
    ):
        if lacks:
            raise ValueError(
                f"engine attnspan: {spec.name} has {why}, which attnspan.Cache refuses"
            )
    chosen = layer_policies(spec, policy)
    lanes = {each: _lanes(spec, each, tokens, batch, storage, itemsize) for each in set(chosen)}
    layers = tuple(LayerCache(*lanes[each][:2]) for each in chosen)
    warm = sum(lanes[each][2] for each in chosen)
    notes = ()
    if storage == "int4" and warm > bytes_of(layers):
        notes = (
            f"While int4 learned the means of the keys, up to {warm} bytes were held; a call that "
            "passes the warm-up never sees them at its end.",
        )
    return CacheBytes("attnspan", layers, notes=notes)


def _lanes(
    spec: ModelSpec, policy: Policy, tokens: int, batch: int, storage: str, itemsize: int
) -> tuple[int, int, int]:
    """Slots, bytes, and the bytes at the end of int4's warm-up, of one layer.

    KV heads with policies of their own have lanes of their own; the slots are those of the longest.
    """
    found = [
        _lane(spec.head_dim, batch * heads, each, tokens, storage, itemsize)
        for each, heads in Counter(policy.of_heads(spec.kv_heads)).items()
    ]
    slots, held, warm = zip(*found, strict=True)
    return max(slots), sum(held), sum(warm)


def _lane(
    dim: int, heads: int, policy: Policy, tokens: int, storage: str, itemsize: int
) -> tuple[int, int, int]:
    """The same of one lane, with so many KV heads, those of all rows together.

    As `attnspan.cache` allocates: a policy with a bound its capacity at the first token, one
    without half as much again whenever it is full; sinks dense and, beside codes, of their own.
    """
    coded, dense = bytes_per_token(storage, dim, itemsize), 2 * dim * itemsize
    if not tokens:
        return 0, 0, 0
    freeze = max(policy.leading, _SKIP) + _WARMUP if storage == "int4" else 0
    band, capacity = policy.band, policy.capacity
    sinks = band.sinks if band is not None else 0
    front = sinks if storage == "dense" else 0
    room = _grown(tokens) if capacity is None else capacity - sinks
    # Sinks' keys lie beside the buffer; dense lanes have places for them, turned, in front of it.
    beside = sinks * dim * itemsize * (1 if storage == "dense" else 2)
    if band is None and policy.needs_scores:
        beside += room * (4 + 8)  # float32 attention received, int64 position
    learning = min(room, freeze - sinks) * dense + beside + 8 * dim if freeze else 0
    if tokens < freeze:
        return min(room, freeze - sinks), heads * learning, 0
    frozen = front + room, heads * ((front + room) * coded + beside + (4 * dim if freeze else 0))
    return *frozen, heads * learning


def _grown(tokens: int) -> int:
    """Slots of a buffer without a bound: 256, and half as much again each time it is full."""
    room = _GROWTH
    while room < tokens:
        # It takes in up to 256 tokens at once, so the first growth is to 512 whatever comes.
        wanted = max(room + 1, room * 3 // 2)
        room = -(-wanted // _GROWTH) * _GROWTH
    return room


def transformers(spec: ModelSpec, tokens: int, batch: int, itemsize: int, call: int) -> CacheBytes:
    """`DynamicCache(config=model.config)` of transformers 5.23.

    A sliding layer joins what it has with what is new, attends, and keeps the last `window - 1` as
    a slice, which keeps the joined tensor alive until the next call. So its memory is that of
    `window - 1` tokens and those of the last call, and right after one call for the whole prompt it
    is that of all tokens. Chunks are held as windows are. With a window of 1 the slice is of
    everything, and nothing is ever given up. Each sliding layer has a tensor of 8 bytes besides.
    """
    token, last = batch * token_of(spec, "dense", itemsize), min(call, tokens)
    sliding = sum(w is not None and own for w, own in zip(spec.windows, own(spec), strict=True))

    def held(last: int) -> tuple[LayerCache, ...]:
        before = tokens - last
        places = tuple(
            tokens if window in (None, 1) else min(before, window - 1) + last
            for window in spec.windows
        )
        return layer_caches(spec, places, token)

    layers, at_once, other = held(last), bytes_of(held(tokens)), 8 * sliding
    notes = []
    if spec.latent is not None:
        expanded = tokens * batch * spec.kv_bytes(itemsize, expanded=True)
        notes.append(
            "transformers 5.17 and 5.23 hold latents; 5.3 held all heads' keys and values, "
            f"{expanded} bytes."
        )
    if sliding:
        notes.append(
            "A sliding layer keeps window - 1 tokens as a slice of the tensor that its last call "
            f"joined; after one call for all tokens that is {at_once + other} bytes."
        )
    full = at_once + other if sliding else None
    return CacheBytes("transformers", layers, other if tokens else 0, tuple(notes), full)


def vllm(
    spec: ModelSpec, tokens: int, batch: int, itemsize: int, page: int, batched: int
) -> CacheBytes:
    """What vLLM reserves of its blocks for a batch of requests of `tokens` tokens each.

    A full layer has blocks for all tokens; a sliding one for `window - 1` tokens and those that are
    scheduled at once, and one block more, for a window may start inside a block; a chunked one for
    a chunk and those scheduled. Layers of one kind are split into groups of equal size, and a group
    that lacks layers is padded with empty ones.
    """
    token = batch * token_of(spec, "dense", itemsize)
    full = -(-tokens // page) * page

    def places(window: int | None) -> int:
        if window is None or not tokens:
            return full
        if spec.chunked:
            return -(-min(window + batched, tokens) // page) * page
        return (-(-min(window - 1 + batched, tokens) // page) + 1) * page

    mine = own(spec)
    layers = layer_caches(spec, tuple(places(window) for window in spec.windows), token)
    kinds = Counter(w for w, its in zip(spec.windows, mine, strict=True) if its)
    fewest, most = min(kinds.values()), max(kinds.values())
    size = most if most < 1.5 * fewest else fewest
    padded = {window: -count % size for window, count in kinds.items()}
    other = sum(count * places(window) for window, count in padded.items()) * token
    notes = ["Read in vLLM's source, not run."]
    if other:
        notes.append(
            f"Groups have {size} layers each, and {sum(padded.values())} empty ones pad them."
        )
    everything = full * token * sum(mine) if any(w is not None for w in kinds) else None
    return CacheBytes("vllm", layers, other, tuple(notes), everything)


def llama_cpp(
    spec: ModelSpec, tokens: int, batch: int, itemsize: int, microbatch: int
) -> CacheBytes:
    """What llama.cpp allocates for contexts of `tokens` tokens, each sequence a stream of its own.

    Cells come in 256s. Layers that slide have cells for the window and one micro-batch, in the
    families whose windows it knows; in others they have cells for all tokens.
    """
    token = batch * token_of(spec, "dense", itemsize)
    base = -(-tokens // _CELLS) * _CELLS
    windows = any(window is not None for window in spec.windows)
    slides = spec.family in _LLAMA_CPP_SLIDES

    def places(window: int | None) -> int:
        if window is None or not slides:
            return base
        return -(-min(base, window + microbatch) // _CELLS) * _CELLS

    layers = layer_caches(spec, tuple(places(window) for window in spec.windows), token)
    notes = ["Read in llama.cpp's source, not run."]
    if windows and not slides:
        notes.append(
            f"llama.cpp doesn't use the windows of {spec.family or 'such'} models: every layer has "
            "cells for all tokens."
        )
    everything = base * token * sum(own(spec)) if windows and slides else None
    return CacheBytes("llama.cpp", layers, notes=tuple(notes), full_pages=everything)
