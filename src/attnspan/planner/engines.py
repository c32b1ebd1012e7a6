"""Bytes of a KV cache, as theory has it and as engines allocate it: in closed form, without torch.

`theory` counts the tokens that a query still sees, and keys and values alone. The engines hold
more: buffers grow ahead, pages and cells are rounded up, a slice keeps its whole tensor alive.
`attnspan` and `transformers` are held to the byte against the caches themselves in the tests;
`vllm` and `llama.cpp` follow their sources, which were read and not run:

- https://github.com/vllm-project/vllm/blob/001cabc1be16a59a70d720ed61a13b678c060a18/vllm/v1/kv_cache_interface.py
  and https://docs.vllm.ai/en/latest/design/hybrid_kv_cache_manager/
- https://github.com/ggml-org/llama.cpp/blob/02c28f533ebba3e4ea944fc4a0719a012b3e7097/src/llama-kv-cache-iswa.cpp
  and `llama-context.cpp` beside it, which rounds the context up to 256 cells.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import gcd

from attnspan.planner.spec import ModelSpec
from attnspan.policies import Compressive, KeepAll, PerLayer, Policy, Window

ENGINES = ("theory", "attnspan", "transformers", "vllm", "llama.cpp")
STORAGES = ("dense", "int8", "int4")

# Of attnspan.cache: slots come in steps, and int4 learns the means of so many keys, after at least
# so many that it skips.
_GROWTH = 256
_WARMUP, _SKIP, _GROUP = 64, 4, 32
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
# What an engine takes besides, and what it is unless given.
_OPTIONS = {
    "call": ("transformers", 1),
    "page": ("vllm", 16),
    "batched": ("vllm", 2048),
    "microbatch": ("llama.cpp", 512),
}


@dataclass(frozen=True)
class LayerCache:
    """One layer's part.

    Attributes:
        slots: places for tokens that are allocated, of one sequence.
        bytes: of the whole batch.
    """

    slots: int
    bytes: int


@dataclass(frozen=True)
class CacheBytes:
    """A cache after some tokens.

    Attributes:
        engine: as it was asked for.
        layers: one for each layer of the model.
        other: bytes that belong to no one layer's tokens: an engine's own tables, and padding.
        notes: what else should be known, in sentences.
        full_pages: bytes where the sliding layers hold all tokens; None: that doesn't happen. For
            `transformers` it is right after one call that brought all tokens; for `vllm` it is
            without the hybrid manager; for `llama.cpp` it is with `--swa-full`.
    """

    engine: str
    layers: tuple[LayerCache, ...]
    other: int = 0
    notes: tuple[str, ...] = ()
    full_pages: int | None = None

    @property
    def total(self) -> int:
        return sum(layer.bytes for layer in self.layers) + self.other


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
            return _attnspan(spec, tokens, batch, policy, str(storage), itemsize)
        case "transformers":
            return _transformers(spec, tokens, batch, itemsize, options["call"])
        case "vllm":
            return _vllm(spec, tokens, batch, itemsize, options["page"], options["batched"])
        case "llama.cpp":
            return _llama_cpp(spec, tokens, batch, itemsize, options["microbatch"])
    return _theory(spec, tokens, batch, policy, str(storage), itemsize)


# What a layer must hold ---------------------------------------------------------------------------


def slots(policy: Policy | None, window: int | None, tokens: int) -> int:
    """The most tokens that one layer has held, once it has seen `tokens`.

    A token counts for as long as a query sees it, its own included. Between two points of its grid
    a policy holds every new token.

    Args:
        policy: None: every token that `window` leaves.
        window: that the model was trained with, the token itself included; None: it sees all.

    >>> from attnspan.policies import HeavyHitter, SinkWindow
    >>> slots(None, 4096, 100_000), slots(SinkWindow(4, 1020), None, 100_000)
    (4096, 1024)
    >>> slots(HeavyHitter(8, 4, block=16), None, 100)  # 8, the last 3, and a block
    27
    """
    held = tokens if policy is None else _held(policy, tokens)
    return held if window is None else min(held, window)


def _held(policy: Policy, tokens: int) -> int:
    if policy.capacity is None:
        return tokens
    # What is held rises with the grid points passed, but for the remainder that Compressive has not
    # pooled yet, and the remainders come round within `period` points.
    rate = policy.rate if isinstance(policy, Compressive) else 1
    period = rate // gcd(rate, policy.block)
    last = max(0, tokens - 1) // policy.block
    return max(
        _after(policy, point * policy.block) + min(policy.block, tokens - point * policy.block)
        for point in range(max(0, last - period), last + 1)
    )


def _after(policy: Policy, tokens: int) -> int:
    """Held right after the policy has decided at `tokens`."""
    if isinstance(policy, Compressive):
        past = tokens - policy.sinks
        groups = max(0, past - (policy.window - 1)) // policy.rate
        if past <= 0:
            return tokens
        return policy.sinks + min(groups, policy.memory) + past - groups * policy.rate
    assert policy.capacity is not None
    return min(tokens, policy.capacity - policy.block)


def layer_policies(spec: ModelSpec, policy: Policy | PerLayer | None) -> tuple[Policy, ...]:
    """Each layer's policy, as `attnspan.Cache` has it.

    In a hybrid model sliding layers keep exactly their window and the policy acts on the others.
    Where every layer slides, it acts on all of them, and none may look further than its layer was
    trained to.

    Raises:
        ValueError: the policy has another number of layers, or looks past a layer's window.
    """
    chosen = (policy or KeepAll(),) * spec.layers
    if isinstance(policy, PerLayer):
        if len(policy.policies) != spec.layers:
            raise ValueError(
                f"policy has {len(policy.policies)} layers; the model's {spec.layers} are allowed"
            )
        chosen = policy.policies
    hybrid = any(window is None for window in spec.windows)
    return tuple(
        each
        if window is None
        else Window(window)
        if hybrid
        else _within(each, window, "chunks" if spec.chunked else "a sliding window")
        for each, window in zip(chosen, spec.windows, strict=True)
        if not isinstance(each, PerLayer)
    )


def _within(policy: Policy, window: int, kind: str) -> Policy:
    if isinstance(policy, KeepAll) or (isinstance(policy, Window) and policy.window >= window):
        return Window(window)
    if policy.capacity is None or policy.capacity > window:
        raise ValueError(
            f"policy {policy} holds up to {policy.capacity} tokens; every layer of this model was "
            f"trained with {kind} of {window}, and no more are allowed"
        )
    return policy


def bytes_per_token(storage: str, head_dim: int, itemsize: int) -> int:
    """Bytes of one token's key and value in one KV head, as `attnspan.cache.storage` holds them.

    int8: a code for each number and an fp16 scale for each vector. int4: two codes a byte; an fp16
    scale for each 32 channels of a key; an fp16 scale and an fp16 least value for a value.

    Raises:
        ValueError: int4 can't hold heads of `head_dim`.

    >>> [bytes_per_token(storage, 64, 2) for storage in STORAGES]
    [256, 132, 72]
    """
    if storage == "int8":
        return 2 * (head_dim + 2)
    if storage == "int4":
        if head_dim % _GROUP:
            raise ValueError(
                f"storage int4: head_dim is {head_dim}; a multiple of {_GROUP} is allowed"
            )
        return head_dim + 2 * (head_dim // _GROUP) + 4
    return 2 * head_dim * itemsize


def _token(spec: ModelSpec, storage: str, itemsize: int) -> int:
    """Bytes of one token in one layer that has keys and values of its own."""
    if spec.latent is None:
        return spec.kv_heads * bytes_per_token(storage, spec.head_dim, itemsize)
    if storage != "dense":
        raise ValueError(
            f"storage {storage}: {spec.name} has latent attention, and its latents are held dense"
        )
    return (spec.latent.rank + spec.latent.rope) * itemsize


def _own(spec: ModelSpec) -> tuple[bool, ...]:
    """For each layer, whether it has keys and values of its own."""
    return tuple(of is None for of in spec.shares) or (True,) * spec.layers


def _layers(spec: ModelSpec, places: tuple[int, ...], token: int) -> tuple[LayerCache, ...]:
    """Layers with so many places for a sequence; `token` is the bytes of one, of all the batch."""
    return tuple(
        LayerCache(count, count * token) if own else LayerCache(0, 0)
        for count, own in zip(places, _own(spec), strict=True)
    )


def _bytes(layers: tuple[LayerCache, ...]) -> int:
    return sum(layer.bytes for layer in layers)


def _theory(
    spec: ModelSpec,
    tokens: int,
    batch: int,
    policy: Policy | PerLayer | None,
    storage: str,
    itemsize: int,
) -> CacheBytes:
    policies, token = layer_policies(spec, policy), batch * _token(spec, storage, itemsize)
    # Layers are often alike, and a pooled memory's slots take a few steps to count.
    found = {each: slots(each, None, tokens) for each in set(policies)}
    windows = any(window is not None for window in spec.windows)
    everything = _layers(
        spec,
        tuple(
            tokens if window is not None else found[each]
            for each, window in zip(policies, spec.windows, strict=True)
        ),
        token,
    )
    return CacheBytes(
        "theory",
        _layers(spec, tuple(found[each] for each in policies), token),
        full_pages=_bytes(everything) if windows else None,
    )


# attnspan ----------------------------------------------------------------------------------------


def _attnspan(
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
        (not all(_own(spec)), "layers that share keys and values"),
    ):
        if lacks:
            raise ValueError(
                f"engine attnspan: {spec.name} has {why}, which attnspan.Cache refuses"
            )
    lanes = [
        _lane(spec, each, tokens, batch, storage, itemsize) for each in layer_policies(spec, policy)
    ]
    layers = tuple(LayerCache(lane[0], lane[1]) for lane in lanes)
    warm = sum(lane[2] for lane in lanes)
    notes = ()
    if storage == "int4" and warm > _bytes(layers):
        notes = (
            f"While int4 learned the means of the keys, up to {warm} bytes were held; a call that "
            "passes the warm-up never sees them at its end.",
        )
    return CacheBytes("attnspan", layers, notes=notes)


def _lane(
    spec: ModelSpec, policy: Policy, tokens: int, batch: int, storage: str, itemsize: int
) -> tuple[int, int, int]:
    """Slots, bytes, and the bytes at the end of int4's warm-up, of one layer.

    As `attnspan.cache` allocates: a policy with a bound its capacity at the first token, one
    without half as much again whenever it is full; sinks dense and, beside codes, of their own.
    """
    heads, dim = batch * spec.kv_heads, spec.head_dim
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


# transformers ------------------------------------------------------------------------------------


def _transformers(spec: ModelSpec, tokens: int, batch: int, itemsize: int, call: int) -> CacheBytes:
    """`DynamicCache(config=model.config)` of transformers 5.23.

    A sliding layer joins what it has with what is new, attends, and keeps the last `window - 1` as
    a slice, which keeps the joined tensor alive until the next call. So its memory is that of
    `window - 1` tokens and those of the last call, and right after one call for the whole prompt it
    is that of all tokens. Chunks are held as windows are. With a window of 1 the slice is of
    everything, and nothing is ever given up. Each sliding layer has a tensor of 8 bytes besides.
    """
    token, last = batch * _token(spec, "dense", itemsize), min(call, tokens)
    sliding = sum(w is not None and own for w, own in zip(spec.windows, _own(spec), strict=True))

    def held(last: int) -> tuple[LayerCache, ...]:
        before = tokens - last
        places = tuple(
            tokens if window in (None, 1) else min(before, window - 1) + last
            for window in spec.windows
        )
        return _layers(spec, places, token)

    layers, at_once, other = held(last), _bytes(held(tokens)), 8 * sliding
    notes = ()
    if spec.latent is not None:
        expanded = tokens * batch * spec.kv_bytes(itemsize, expanded=True)
        notes = (
            "transformers 5.17 and 5.23 hold latents; 5.3 held all heads' keys and values, "
            f"{expanded} bytes.",
        )
    if sliding:
        notes = (
            "A sliding layer keeps window - 1 tokens as a slice of the tensor that its last call "
            f"joined; after one call for all tokens that is {at_once + other} bytes.",
        )
    full = at_once + other if sliding else None
    return CacheBytes("transformers", layers, other if tokens else 0, notes, full)


# vLLM and llama.cpp ------------------------------------------------------------------------------


def _vllm(
    spec: ModelSpec, tokens: int, batch: int, itemsize: int, page: int, batched: int
) -> CacheBytes:
    """What vLLM reserves of its blocks for a batch of requests of `tokens` tokens each.

    A full layer has blocks for all tokens; a sliding one for `window - 1` tokens and those that are
    scheduled at once, and one block more, for a window may start inside a block; a chunked one for
    a chunk and those scheduled. Layers of one kind are split into groups of equal size, and a group
    that lacks layers is padded with empty ones.
    """
    token = batch * _token(spec, "dense", itemsize)
    full = -(-tokens // page) * page

    def places(window: int | None) -> int:
        if window is None or not tokens:
            return full
        if spec.chunked:
            return -(-min(window + batched, tokens) // page) * page
        return (-(-min(window - 1 + batched, tokens) // page) + 1) * page

    own = _own(spec)
    layers = _layers(spec, tuple(places(window) for window in spec.windows), token)
    kinds = Counter(w for w, mine in zip(spec.windows, own, strict=True) if mine)
    fewest, most = min(kinds.values()), max(kinds.values())
    size = most if most < 1.5 * fewest else fewest
    padded = {window: -count % size for window, count in kinds.items()}
    other = sum(count * places(window) for window, count in padded.items()) * token
    notes = ["Read in vLLM's source, not run."]
    if other:
        notes.append(
            f"Groups have {size} layers each, and {sum(padded.values())} empty ones pad them."
        )
    everything = full * token * sum(own) if any(w is not None for w in kinds) else None
    return CacheBytes("vllm", layers, other, tuple(notes), everything)


def _llama_cpp(
    spec: ModelSpec, tokens: int, batch: int, itemsize: int, microbatch: int
) -> CacheBytes:
    """What llama.cpp allocates for contexts of `tokens` tokens, each sequence a stream of its own.

    Cells come in 256s. Layers that slide have cells for the window and one micro-batch, in the
    families whose windows it knows; in others they have cells for all tokens.
    """
    token = batch * _token(spec, "dense", itemsize)
    base = -(-tokens // _CELLS) * _CELLS
    windows = any(window is not None for window in spec.windows)
    slides = spec.family in _LLAMA_CPP_SLIDES

    def places(window: int | None) -> int:
        if window is None or not slides:
            return base
        return -(-min(base, window + microbatch) // _CELLS) * _CELLS

    layers = _layers(spec, tuple(places(window) for window in spec.windows), token)
    notes = ["Read in llama.cpp's source, not run."]
    if windows and not slides:
        notes.append(
            f"llama.cpp doesn't use the windows of {spec.family or 'such'} models: every layer has "
            "cells for all tokens."
        )
    everything = base * token * sum(_own(spec)) if windows and slides else None
    return CacheBytes("llama.cpp", layers, notes=tuple(notes), full_pages=everything)
