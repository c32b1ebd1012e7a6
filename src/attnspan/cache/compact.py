"""Lanes whose policy picks or pools tokens: slots stay in stream order, without gaps.

Keys are held un-rotated. Within a block a slot's position inside the cache is its index, so keys
are rotated at use by their slots, and a query by its own. At a grid point the policy's decision
moves the slots together; fields move as they are, so nothing is encoded twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnspan.cache.lane import Call, Lane
from attnspan.cache.storage import Fields
from attnspan.kernels.view import KVView, Part, RawPart
from attnspan.policies.base import Held, Keep, Pick, Pool
from attnspan.views import attend, reads_stored


@dataclass
class CompactLane(Lane):
    """A lane whose slots are moved together at each grid point."""

    held: int = 0
    memory: int = 0

    def _allocate_extra(self) -> None:
        if self.policy.needs_scores:
            self.extra["scores"] = self._zeros(1, torch.float32, self._capacity)
            self.extra["positions"] = self._zeros(1, torch.int64, self._capacity)

    @property
    def _capacity(self) -> int:
        assert self.policy.capacity is not None, "a policy without a bound has a closed form"
        return self.policy.capacity

    def _slots_needed(self) -> int:
        # Held dense until the means are known, a slot for each token: nothing pooled takes more.
        return min(self._capacity, self._freeze_at) if self._warm else self._capacity

    def _segment_most(self) -> int:
        return self.policy.block

    def _slots_full(self) -> int:
        return self._capacity

    @property
    def tokens_held(self) -> int:
        return self.held

    def _cut(self, start: int) -> int:
        stop = start - start % self.policy.block + self.policy.block
        if self.policy.observed is not None and start < stop - self.policy.observed:
            stop -= self.policy.observed  # queries that don't count go by themselves
        rope = self.spec.rope
        if rope is None or not rope.depends_on_length:
            return stop
        length = self.held + start - self.seen + 1
        regime, first = rope.regime(length), start
        while start + 1 < stop and rope.regime(length + start + 1 - first) == regime:
            start += 1
        return start + 1

    def _segment(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        m, old, tables = q.shape[2], self.held, call.tables
        n, watched = old + m, self._watches(self.seen)
        self._put(old, self._encode(k, v))
        fields = {name: x[:, :, :n] for name, x in self.fields.items()}
        query, rope = self._rotate(q, old, n, tables), self.spec.rope
        mask = self._causal(old, m, call) if m > 1 else None
        part: Part | RawPart
        if reads_stored(q, self.spec.num_kv_heads):
            angles = None if rope is None else tables.angles(rope, 0, n, n, q)
            part = RawPart(query, self._stored(fields, angles), mask)
        else:
            key, value = self._decode(fields)
            part = Part(query, self._rotate(key, 0, n, tables), value, mask)
        out, scores = attend(
            KVView((part,)),
            scale=call.scale,
            softcap=call.softcap,
            sink_logits=call.sink_logits,
            return_scores=watched,
        )
        if watched:
            assert scores is not None
            self.extra["scores"][:, :, :n] += scores[0].unsqueeze(-1)
        if self.policy.needs_scores:
            positions = torch.arange(self.seen, self.seen + m, device=self.device)
            self.extra["positions"][:, :, old:n] = positions[:, None]
        self.held = n
        self._advance(k)
        if self.seen % self.policy.block == 0:
            self._decide()
        return out

    def _watches(self, position: int) -> bool:
        """Whether the attention of the query at `position` counts."""
        block, observed = self.policy.block, self.policy.observed
        late = observed is None or position % block >= block - observed
        return self.policy.needs_scores and late

    def _causal(self, old: int, m: int, call: Call) -> Tensor:
        def make() -> tuple[Tensor]:
            mask = torch.full((m, m), float("-inf"), dtype=self.dtype, device=self.device).triu_(1)
            return (torch.nn.functional.pad(mask, (old, 0)),)

        return call.tables.get(("causal", old, m, self.dtype, self.device), make)[0]

    def _decide(self) -> None:
        scores = self.extra.get("scores")
        decision = self.policy.decide(
            Held(
                slots=self.held,
                memory=self.memory,
                scores=None if scores is None else scores[:, :, : self.held, 0],
            )
        )
        to = 0
        for move in decision:
            match move:
                case Keep(start, stop):
                    if start == to:
                        to = stop
                        continue
                    pieces = {n: x[:, :, start:stop].clone() for n, x in self._tensors()}
                    size = stop - start
                case Pick(index):
                    pieces = {n: _gather(x, index) for n, x in self._tensors()}
                    size = index.shape[-1]
                case Pool(groups=0):
                    continue
                case Pool():
                    pieces, size = self._pool(move), move.groups
            for name, x in self._tensors():
                x[:, :, to : to + size] = pieces[name]
            to += size
        if scores is not None:
            # The next tokens in these slots start from nothing, or all do.
            scores[:, :, to if self.policy.observed is None else 0 :] = 0
        pooled = sum(move.groups for move in decision if isinstance(move, Pool))
        if pooled or self.memory:
            raw = sum(m.stop - m.start for m in decision[-1:] if isinstance(m, Keep))
            self.memory = to - raw - min(self.policy.leading, to)
        self.held = to

    def _tensors(self) -> list[tuple[str, Tensor]]:
        """Every tensor that has a row for each slot."""
        slotted = [(n, self.extra[n]) for n in ("scores", "positions") if n in self.extra]
        return [*self.fields.items(), *slotted]

    def _pool(self, pool: Pool) -> Fields:
        stop = pool.start + pool.groups * pool.rate
        pieces = {n: x[:, :, pool.start : stop] for n, x in self._tensors()}
        key, value = self._decode({n: pieces[n] for n in self.fields})
        key, value = (x.unflatten(2, (pool.groups, pool.rate)) for x in (key, value))
        match pool.how:
            case "mean":
                key, value = key.mean(3), value.mean(3)
            case "max":
                key, value = key.amax(3), value.amax(3)
            case "most-used":
                groups = pieces["scores"].unflatten(2, (pool.groups, pool.rate))
                best = groups.argmax(3, keepdim=True)
                index = best.expand(*best.shape[:-1], key.shape[-1])
                key, value = key.gather(3, index).squeeze(3), value.gather(3, index).squeeze(3)
            case weights:
                w = torch.tensor(weights, dtype=key.dtype, device=key.device)[:, None]
                key, value = (key * w).sum(3), (value * w).sum(3)
        made = self._encode(key, value)
        for name in ("scores", "positions"):
            if name in self.extra:
                made[name] = pieces[name].unflatten(2, (pool.groups, pool.rate)).amax(3)
        return made

    def counts(self) -> dict[str, Any]:
        return {**super().counts(), "held": self.held, "memory": self.memory}

    def restore(self, counts: dict[str, Any], tensors: Fields) -> None:
        if not {"held", "memory"} <= counts.keys():
            raise ValueError("the state is not whole: a layer's counts are missing")
        super().restore(counts, tensors)
        self.held, self.memory = counts["held"], counts["memory"]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
