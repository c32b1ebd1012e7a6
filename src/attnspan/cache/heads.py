"""Lanes of a layer whose KV heads have policies of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnspan.cache.lane import Call, Lane, LayerSpec
from attnspan.cache.storage import Fields
from attnspan.policies.base import Policy


@dataclass
class HeadLanes:
    """What stands for a `Lane` where heads hold different tokens: a lane for each group of heads.

    Attributes:
        spec: of the whole layer.
        groups: the KV heads of each lane, ascending.
        lanes: each of its own heads, for the same rows and tokens.
    """

    spec: LayerSpec
    groups: tuple[tuple[int, ...], ...]
    lanes: list[Lane]

    @classmethod
    def made(
        cls,
        spec: LayerSpec,
        policies: Sequence[Policy],
        make: Callable[[LayerSpec, Policy], Lane],
    ) -> HeadLanes:
        """Lanes for one policy a KV head; those with the same policy share a lane."""
        heads: dict[Policy, list[int]] = {}
        for head, policy in enumerate(policies):
            heads.setdefault(policy, []).append(head)
        share = spec.num_heads // spec.num_kv_heads
        lanes = [
            make(replace(spec, num_heads=share * len(own), num_kv_heads=len(own)), policy)
            for policy, own in heads.items()
        ]
        return cls(spec, tuple(tuple(own) for own in heads.values()), lanes)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """As `Lane.attend`, each query head in the lane of its KV head."""
        out, share = torch.empty_like(q), self.spec.num_heads // self.spec.num_kv_heads
        for own, lane in zip(self.groups, self.lanes, strict=True):
            kv = _places(own, 1)
            queries = _places(own, share)
            sinks = call.sink_logits
            theirs = call if sinks is None else replace(call, sink_logits=sinks[queries])
            out[:, queries] = lane.attend(q[:, queries], k[:, kv], v[:, kv], theirs)
        return out

    @property
    def batch(self) -> int:
        return self.lanes[0].batch

    @property
    def seen(self) -> int:
        return self.lanes[0].seen

    @seen.setter
    def seen(self, tokens: int) -> None:
        for lane in self.lanes:
            lane.seen = tokens

    @property
    def tokens_held(self) -> int:
        """Slots in use in the heads that hold most."""
        return max(lane.tokens_held for lane in self.lanes)

    # A step by a clock, and budgets ---------------------------------------------------------------

    def lacks_step(self) -> str | None:
        lacks = (lane.lacks_step() for lane in self.lanes)
        return next((lack for lack in lacks if lack), None)

    @property
    def steps_from(self) -> int:
        return max(lane.steps_from for lane in self.lanes)

    def make_room(self) -> None:
        for lane in self.lanes:
            lane.make_room()

    def bound(self, limit: int | None) -> None:
        for lane in self.lanes:
            lane.bound(limit)

    @property
    def least_limit(self) -> int:
        return max(lane.least_limit for lane in self.lanes)

    @property
    def nbytes(self) -> int:
        return sum(lane.nbytes for lane in self.lanes)

    def planned_bytes(self) -> int:
        return sum(lane.planned_bytes() for lane in self.lanes)

    def staging_bytes(self, chunk: int, on_cpu: bool = True) -> int:
        """The lanes attend one after the other; their heads are taken out, and put together."""
        spec, wide = self.spec, max(lane.dtype.itemsize for lane in self.lanes)
        moved = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim * wide
        most = max(lane.staging_bytes(chunk, on_cpu) for lane in self.lanes)
        return most + self.batch * chunk * moved

    def table_bytes(self, chunk: int) -> int:
        """Those of one layer's lanes, which are not alike."""
        return sum(lane.table_bytes(chunk) for lane in self.lanes)

    # Whole-lane operations, as a lane has them ----------------------------------------------------

    def select(self, rows: Tensor) -> HeadLanes:
        return replace(self, lanes=[lane.select(rows) for lane in self.lanes])

    def copy(self) -> HeadLanes:
        return replace(self, lanes=[lane.copy() for lane in self.lanes])

    def counts(self) -> dict[str, Any]:
        counts = [lane.counts() for lane in self.lanes]
        return {"batch": self.batch, "seen": self.seen, "heads": counts}

    def tensors(self) -> Fields:
        return {
            f"{i}.{name}": x
            for i, lane in enumerate(self.lanes)
            for name, x in lane.tensors().items()
        }

    def restore(self, counts: dict[str, Any], tensors: Fields) -> None:
        """Takes over a state that `counts()` and `tensors()` gave.

        Raises:
            ValueError: it isn't the state of such lanes.
        """
        theirs = counts.get("heads")
        if (
            not isinstance(theirs, list)
            or len(theirs) != len(self.lanes)
            or any(
                not isinstance(each, dict)
                or (each.get("batch"), each.get("seen")) != (counts["batch"], counts["seen"])
                for each in theirs
            )
        ):
            raise ValueError("the state is not whole: the counts of a layer's heads are missing")
        named: list[Fields] = [{} for _ in self.lanes]
        for name, x in tensors.items():
            lane, _, rest = name.partition(".")
            if not lane.isdecimal() or int(lane) >= len(named):
                raise ValueError(f"the state has a tensor {name!r} of no heads of this layer")
            named[int(lane)][rest] = x
        for lane, each, own in zip(self.lanes, theirs, named, strict=True):
            lane.restore(each, own)


def _places(heads: Sequence[int], share: int) -> slice | list[int]:
    """Where `share` heads for each of `heads` stand; neighbours as a slice: no copy."""
    if heads[-1] - heads[0] == len(heads) - 1:
        return slice(heads[0] * share, (heads[-1] + 1) * share)
    return [head * share + i for head in heads for i in range(share)]
