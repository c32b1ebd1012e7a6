"""One layer's cache for a batch: a lane for each group of rows that go in step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnspan.cache.compact import CompactLane
from attnspan.cache.heads import HeadLanes
from attnspan.cache.lane import Call, Lane, LayerSpec
from attnspan.cache.ring import RingLane
from attnspan.cache.storage import Fields, Storage
from attnspan.cache.tables import Tables
from attnspan.policies.base import Policy

LaneMaker = Callable[[LayerSpec, Policy, Storage, int, torch.dtype, torch.device, int | None], Lane]
"""What makes an empty lane of these arguments, which are those of `Lane`."""


@dataclass(frozen=True)
class Span:
    """The new tokens of some rows in one call: columns `start <= c < stop`; rows None is all."""

    lane: int
    rows: Tensor | None
    start: int
    stop: int


@dataclass
class LayerCache:
    """The lanes of one layer, which `maker` makes; None: those of this process alone.

    Raises:
        ValueError: when the storage can't hold the layer's heads, or the policy is for another
            number of them.
    """

    spec: LayerSpec
    policy: Policy
    storage: Storage
    limit: int | None = None
    rollback: int = 0
    maker: LaneMaker | None = None
    lanes: list[Lane | HeadLanes] = field(default_factory=list)
    journals: list[Journal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.storage.check(self.spec.head_dim)
        self.policy.of_heads(self.spec.num_kv_heads)

    def start(self, batches: list[int], dtype: torch.dtype, device: torch.device) -> None:
        """Makes the lanes, of so many rows each, that have seen nothing."""
        self._set([self.lane(batch, dtype, device) for batch in batches])

    def lane(self, batch: int, dtype: torch.dtype, device: torch.device) -> Lane | HeadLanes:
        """An empty lane for `batch` rows, within this layer's limit."""

        def made(spec: LayerSpec, policy: Policy) -> Lane:
            alone = RingLane if policy.band is not None else CompactLane
            make = self.maker or alone
            return make(spec, policy, self.storage, batch, dtype, device, self.limit)

        policies = self.policy.of_heads(self.spec.num_kv_heads)
        if len(set(policies)) == 1:
            return made(self.spec, policies[0])
        return HeadLanes.made(self.spec, policies, made)

    def _set(self, lanes: list[Lane | HeadLanes]) -> None:
        self.lanes = lanes
        self.journals = [Journal(self.rollback, lane) for lane in lanes] if self.rollback else []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spans: list[Span], call: Call) -> Tensor:
        """Takes in the new tokens and attends; columns outside all spans (padding) give zeros."""
        if (
            len(spans) == 1
            and spans[0].rows is None
            and spans[0].stop - spans[0].start == q.shape[2]
        ):
            return self._attend(spans[0].lane, q, k, v, call)
        out = q.new_zeros(q.shape)
        for span in spans:
            rows = slice(None) if span.rows is None else span.rows.to(q.device)
            columns = slice(span.start, span.stop)
            some_q, some_k, some_v = (x[rows][:, :, columns] for x in (q, k, v))
            out[rows, :, columns] = self._attend(span.lane, some_q, some_k, some_v, call)
        return out

    def _attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        lane, early = self.lanes[index], q.shape[2] - self.rollback
        if not self.rollback:
            return lane.attend(q, k, v, call)
        if early <= 0:
            self.journals[index].record(lane, q, k, v, call)
            return lane.attend(q, k, v, call)
        # Only the last `rollback` tokens can be undone, so the journal starts anew before them.
        out = lane.attend(q[:, :, :early], k[:, :, :early], v[:, :, :early], call)
        q, k, v = (x[:, :, early:] for x in (q, k, v))
        self.journals[index] = Journal(self.rollback, lane)
        self.journals[index].record(lane, q, k, v, call)
        return torch.cat((out, lane.attend(q, k, v, call)), dim=2)

    def split(self, index: int, parts: list[Tensor]) -> None:
        """Replaces a lane by one for each group of its rows."""
        lanes: list[Lane | HeadLanes] = [self.lanes[index].select(rows) for rows in parts]
        self.lanes[index : index + 1] = lanes
        if self.rollback:
            self.journals[index : index + 1] = [
                self.journals[index].select(rows, lane)
                for rows, lane in zip(parts, lanes, strict=True)
            ]

    def select(self, rows: dict[int, Tensor]) -> None:
        """Lanes of the rows that `rows` names in each old lane."""
        old, journals = self.lanes, self.journals
        if not old:
            return
        self.lanes = [old[lane].select(index) for lane, index in rows.items()]
        if self.rollback:
            self.journals = [
                journals[lane].select(index, new)
                for (lane, index), new in zip(rows.items(), self.lanes, strict=True)
            ]

    def undo(self, tokens: list[int], tables: Tables) -> None:
        """Takes back the last tokens of each lane, so many of them."""
        for index, count in enumerate(tokens if self.lanes else ()):
            if count:
                self.lanes[index] = self.journals[index].undo(self.lanes[index], count, tables)

    def bound(self, limit: int | None) -> None:
        """From now on, a policy without a bound may use `limit` slots."""
        self.limit = limit
        for lane in (*self.lanes, *(copy for journal in self.journals for copy in journal.copies)):
            lane.bound(limit)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.lanes, *self.journals))

    def state(self) -> tuple[Fields, list[dict[str, Any]]]:
        tensors = {
            f"{i}.{name}": x
            for i, lane in enumerate(self.lanes)
            for name, x in lane.tensors().items()
        }
        return tensors, [lane.counts() for lane in self.lanes]

    def restore(
        self,
        tensors: Fields,
        counts: list[dict[str, Any]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Takes over what `state()` gave."""
        lanes: list[Lane | HeadLanes] = []
        for i, count in enumerate(counts):
            lane = self.lane(count["batch"], dtype, device)
            prefix = f"{i}."
            lane.restore(
                count,
                {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)},
            )
            lanes.append(lane)
        self._set(lanes)


@dataclass(frozen=True)
class _Input:
    """What one call brought to a lane that had seen `start` tokens."""

    start: int
    qkv: tuple[Tensor, Tensor, Tensor]
    call: Call


@dataclass
class Journal:
    """What undoing up to `depth` tokens of a lane needs.

    An eviction can't be undone from what is left, so the journal keeps two earlier copies of the
    lane, taken at least `depth` tokens apart, and the queries, keys and values since the older one;
    undoing goes back to a copy and runs forward again. Its bytes are counted in the cache's.
    """

    depth: int
    lane: Lane | HeadLanes
    copies: deque[Lane | HeadLanes] = field(init=False)
    inputs: deque[_Input] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.copies = deque([self.lane.copy()])

    def record(self, lane: Lane | HeadLanes, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        if lane.seen - self.copies[-1].seen >= self.depth:
            self.copies.append(lane.copy())
            if len(self.copies) > 2:
                self.copies.popleft()
            while self.inputs and self.inputs[0].start < self.copies[0].seen:
                self.inputs.popleft()
        # Without its tables, which belong to one forward.
        call = replace(call, tables=Tables())
        self.inputs.append(_Input(lane.seen, (q.clone(), k.clone(), v.clone()), call))

    def undo(self, lane: Lane | HeadLanes, tokens: int, tables: Tables) -> Lane | HeadLanes:
        to = lane.seen - tokens
        while self.copies[-1].seen > to:
            self.copies.pop()
        lane = self.copies[-1].copy()
        kept: deque[_Input] = deque()
        for entry in self.inputs:
            size = min(to - entry.start, entry.qkv[0].shape[2])
            if size <= 0:
                break
            q, k, v = (x[:, :, :size] for x in entry.qkv)
            kept.append(replace(entry, qkv=(q, k, v)))
            if entry.start >= lane.seen:
                lane.attend(q, k, v, replace(entry.call, tables=tables))
        self.inputs = kept
        return lane

    def select(self, rows: Tensor, lane: Lane | HeadLanes) -> Journal:
        journal = Journal(self.depth, lane)
        journal.copies = deque(copy.select(rows) for copy in self.copies)
        for entry in self.inputs:
            index = rows.to(entry.qkv[0].device)
            q, k, v = (x.index_select(0, index) for x in entry.qkv)
            journal.inputs.append(replace(entry, qkv=(q, k, v)))
        return journal

    @property
    def nbytes(self) -> int:
        inputs = sum(x.nbytes for entry in self.inputs for x in entry.qkv)
        return inputs + sum(copy.nbytes for copy in self.copies)
