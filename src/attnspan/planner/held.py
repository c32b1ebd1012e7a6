"""What a layer's cache must hold, and how many bytes that takes, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from attnspan.planner.spec import ModelSpec
from attnspan.policies import Compressive, KeepAll, PerHead, PerLayer, Policy, Window

STORAGES = ("dense", "int8", "int4")
_GROUP = 32  # channels of a key that share a scale in attnspan's int4


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


def slots(policy: Policy | None, window: int | None, tokens: int) -> int:
    """The most tokens that one layer has held, once it has seen `tokens`.

    A token counts for as long as a query sees it, its own included. Between two points of its grid
    a policy holds every new token. Where heads differ, those count that hold most.

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


def head_slots(policy: Policy, kv_heads: int, tokens: int) -> tuple[int, ...]:
    """The most tokens that each KV head of a layer has held, once it has seen `tokens`."""
    each = policy.of_heads(kv_heads)
    found = {policy: _held(policy, tokens) for policy in set(each)}
    return tuple(found[policy] for policy in each)


def _held(policy: Policy, tokens: int) -> int:
    if isinstance(policy, PerHead):
        return max(_held(each, tokens) for each in policy.policies)
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
        ValueError: the policy has another number of layers or heads, or looks past a layer's
            window.
    """
    if isinstance(policy, PerLayer):
        if len(policy.policies) != spec.layers:
            raise ValueError(
                f"policy has {len(policy.policies)} layers; the model's {spec.layers} are allowed"
            )
        chosen = policy.policies
    else:
        chosen = (policy or KeepAll(),) * spec.layers
    for each in set(chosen):
        if isinstance(each, PerHead) and spec.latent is not None:
            raise ValueError(
                f"policy {each}: the heads of {spec.name} share one latent; a policy for all of "
                "them is allowed"
            )
        each.of_heads(spec.kv_heads)
    hybrid = any(window is None for window in spec.windows)
    return tuple(
        each
        if window is None
        else Window(window)
        if hybrid
        else _within(each, window, "chunks" if spec.chunked else "a sliding window")
        for each, window in zip(chosen, spec.windows, strict=True)
    )


def _within(policy: Policy, window: int, kind: str) -> Policy:
    if isinstance(policy, PerHead):
        return PerHead(tuple(_within(each, window, kind) for each in policy.policies))
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


def token_of(spec: ModelSpec, storage: str, itemsize: int) -> int:
    """Bytes of one token in one layer that has keys and values of its own."""
    if spec.latent is None:
        return spec.kv_heads * bytes_per_token(storage, spec.head_dim, itemsize)
    if storage != "dense":
        raise ValueError(
            f"storage {storage}: {spec.name} has latent attention, and its latents are held dense"
        )
    return (spec.latent.rank + spec.latent.rope) * itemsize


def own(spec: ModelSpec) -> tuple[bool, ...]:
    """For each layer, whether it has keys and values of its own."""
    return tuple(of is None for of in spec.shares) or (True,) * spec.layers


def layer_caches(spec: ModelSpec, places: tuple[int, ...], token: int) -> tuple[LayerCache, ...]:
    """Layers with so many places for a sequence; `token` is the bytes of one, of all the batch."""
    return tuple(
        LayerCache(count, count * token) if own else LayerCache(0, 0)
        for count, own in zip(places, own(spec), strict=True)
    )


def bytes_of(layers: tuple[LayerCache, ...]) -> int:
    return sum(layer.bytes for layer in layers)
