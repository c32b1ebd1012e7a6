"""Policies for the layers of a model, and what they may hold within a budget of bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from attnspan.cache.heads import HeadLanes
from attnspan.cache.lane import Lane
from attnspan.cache.layer import LayerCache
from attnspan.models.anatomy import Layer
from attnspan.policies import KeepAll, PerHead, PerLayer, Policy, Window

if TYPE_CHECKING:
    from attnspan.models.cache import Cache


def resolve(policy: Policy | PerLayer, layers: tuple[Layer, ...]) -> tuple[Policy, ...]:
    """Each layer's policy.

    In a hybrid model, layers trained with a sliding window keep exactly that window and the policy
    acts on the others. Where every layer slides, the policy acts on all of them, and none may look
    further than its layer was trained to.

    Raises:
        ValueError: where a policy has another number of layers, or looks past a layer's window.
    """
    if isinstance(policy, PerLayer):
        if len(policy.policies) != len(layers):
            raise ValueError(
                f"policy has {len(policy.policies)} layers; the model's {len(layers)} are allowed"
            )
        policies = policy.policies
    else:
        policies = (policy,) * len(layers)
    hybrid = any(layer.sliding_window is None for layer in layers)
    return tuple(
        chosen
        if layer.sliding_window is None
        else Window(layer.sliding_window)
        if hybrid
        else _within(chosen, layer.sliding_window)
        for chosen, layer in zip(policies, layers, strict=True)
    )


def _within(policy: Policy, window: int) -> Policy:
    if isinstance(policy, PerHead):
        return PerHead(tuple(_within(each, window) for each in policy.policies))
    if isinstance(policy, KeepAll) or (isinstance(policy, Window) and policy.window >= window):
        return Window(window)
    if policy.capacity is None or policy.capacity > window:
        raise ValueError(
            f"policy {policy} holds up to {policy.capacity} tokens; every layer of this model was "
            f"trained with a sliding window of {window}, and no more are allowed"
        )
    return policy


def planned_bytes(cache: Cache, batch: int, limit: int | None) -> int:
    """The most that a cache allocates, staging included, for `batch` rows.

    `limit` is the slots that layers without a bound may use.
    """
    held = staged = 0
    for layer in cache.caches:
        lane = _lane(cache, layer, batch, limit)
        allocated, staging = (
            lane.planned_bytes(),
            lane.staging_bytes(cache.chunk, cache.device.type == "cpu"),
        )
        inputs = 2 * cache.rollback * batch * (layer.spec.num_heads + 2 * layer.spec.num_kv_heads)
        journal = 3 * allocated + 2 * inputs * layer.spec.head_dim * cache.dtype.itemsize
        held += allocated + (journal if cache.rollback else 0)
        staged = max(staged, staging)
    return held + staged + planned_tables(cache, limit)


def planned_tables(cache: Cache, limit: int | None) -> int:
    """The bytes that tables may take: what one layer needs at once."""
    lanes = [_lane(cache, layer, 1, limit) for layer in cache.caches]
    return max(lane.table_bytes(cache.chunk) for lane in lanes)


def _lane(cache: Cache, layer: LayerCache, batch: int, limit: int | None) -> Lane | HeadLanes:
    return replace(layer, limit=limit, lanes=[], journals=[]).lane(
        batch, cache.dtype, torch.device("meta")
    )


def held_limit(cache: Cache, batch: int) -> int | None:
    """Slots that layers without a bound may use within the cache's `max_bytes`; None: all bounded.

    Raises:
        ValueError: when the budget is too small for the policy.
    """
    assert cache.max_bytes is not None
    bounded = all(policy.capacity is not None for policy in cache.policies)
    floor = max(_lane(cache, layer, batch, 1).least_limit for layer in cache.caches)
    least = planned_bytes(cache, batch, None if bounded else floor)
    if least > cache.max_bytes:
        raise ValueError(
            f"max_bytes is {cache.max_bytes}; policy {cache.policy} in {cache.storage} needs at "
            f"least {least} bytes for a batch of {batch}, staging included"
        )
    if bounded:
        return None
    low, high = floor, 2 * floor
    while planned_bytes(cache, batch, high) <= cache.max_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = planned_bytes(cache, batch, middle) <= cache.max_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low
