"""All-to-all over heads: each rank gets some heads of all tokens of its group, and gives them back.

DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509). With more ranks than KV heads, each KV head
goes to several of them, and their gradients add up at its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from attnspan.ring.exchange import Holding, chunk_tokens
from attnspan.ring.layout import Chunk
from attnspan.ring.transport import Transport
from attnspan.ring.wire import as_bytes, taken


@dataclass(frozen=True)
class Members:
    """The ranks that share heads among each other.

    Attributes:
        transport: carries bytes.
        ranks: of the members; the rank itself is one.
        places: for each member where its tokens stand in the joined shard, int64.
    """

    transport: Transport
    ranks: tuple[int, ...]
    places: tuple[Tensor, ...]

    def part(self, count: int, member: int) -> slice:
        """Which of `count` heads, query or KV, a member computes."""
        size = len(self.ranks)
        start = member * count // size
        return slice(start, max(start + 1, (member + 1) * count // size))

    def join(self, tensors: Sequence[Tensor], step: str) -> list[Tensor]:
        """From this rank's tokens of all heads, all members' tokens of its heads.

        Args:
            tensors: `(batch, heads, tokens, ...)` each.
            step: for errors.
        """
        me = self.ranks.index(self.transport.rank)
        sends = {
            rank: as_bytes([x[:, self.part(x.shape[1], member)] for x in tensors])
            for member, rank in enumerate(self.ranks)
            if member != me
        }
        own = [x[:, self.part(x.shape[1], me)] for x in tensors]
        lengths = [len(places) for places in self.places]
        joined = [x.new_empty((*x.shape[:2], sum(lengths), *x.shape[3:])) for x in own]
        shapes = [
            [((*x.shape[:2], length, *x.shape[3:]), x.dtype) for x in own] for length in lengths
        ]
        buffers = self._exchange(sends, shapes, step)
        for member, rank in enumerate(self.ranks):
            found = own if member == me else taken(buffers[rank], shapes[member])
            for whole, part in zip(joined, found, strict=True):
                whole[:, :, self.places[member].to(whole.device)] = part
        return joined

    def split(self, tensors: Sequence[Tensor], counts: Sequence[int], step: str) -> list[Tensor]:
        """The way back: this rank's tokens of all heads.

        Args:
            tensors: `(batch, own heads, all tokens, ...)` each.
            counts: how many heads each has in all; where members share a head, they add up.
            step: for errors.
        """
        me = self.ranks.index(self.transport.rank)
        sends = {
            rank: as_bytes([x[:, :, self.places[member].to(x.device)] for x in tensors])
            for member, rank in enumerate(self.ranks)
            if member != me
        }
        mine = self.places[me]
        own = [x[:, :, mine.to(x.device)] for x in tensors]
        shapes = [[(x.shape, x.dtype) for x in own]] * len(self.ranks)
        buffers = self._exchange(sends, shapes, step)
        whole = [
            x.new_zeros((x.shape[0], count, len(mine), *x.shape[3:]))
            for x, count in zip(own, counts, strict=True)
        ]
        for member, rank in enumerate(self.ranks):
            found = own if member == me else taken(buffers[rank], shapes[member])
            for into, part in zip(whole, found, strict=True):
                into[:, self.part(into.shape[1], member)] += part
        return whole

    def _exchange(
        self,
        sends: dict[int, Tensor],
        shapes: Sequence[Sequence[tuple[tuple[int, ...], torch.dtype]]],
        step: str,
    ) -> dict[int, Tensor]:
        device = next(iter(sends.values())).device if sends else None
        buffers = {
            rank: torch.empty(
                sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in each),
                dtype=torch.int8,
                device=device,
            )
            for rank, each in zip(self.ranks, shapes, strict=True)
            if rank != self.transport.rank
        }
        self.transport.exchange(sends, buffers, step).wait()
        return buffers


def lacks(size: int, heads: int, kv_heads: int) -> str | None:
    """Why heads can't be dealt out to `size` ranks, as the end of a sentence; None: they can."""
    if heads % size:
        return f"{heads} query heads on {size} ranks; a divisor of the heads is allowed"
    if kv_heads % size and size % kv_heads:
        return (
            f"{kv_heads} KV heads on {size} ranks; a divisor of the KV heads, or a multiple of "
            "them (each is then replicated), is allowed"
        )
    return None


def joined(holdings: Sequence[Holding]) -> tuple[Holding, tuple[Tensor, ...]]:
    """The members' chunks as one shard, adjacent ones as one, and where each one's tokens stand."""
    positions = [np.concatenate([chunk.positions for chunk in each]) for each in holdings]
    every = np.concatenate(positions)
    order = np.argsort(every, kind="stable")
    ranked = np.empty_like(order)
    ranked[order] = np.arange(len(order))
    steps = np.diff(every[order])
    if holdings[0][0].step > 1 and (steps != 1).any():
        # Stripes that leave gaps stay beside each other, so that each has one step.
        chunks = tuple(chunk for each in holdings for chunk in each)
        ranked = np.arange(len(order))
    else:
        edges = [0, *(np.flatnonzero(steps != 1) + 1).tolist(), len(order)]
        chunks = tuple(Chunk(int(every[order[a]]), b - a) for a, b in pairwise(edges))
    places, done = [], 0
    for each in holdings:
        places.append(torch.from_numpy(ranked[done : done + chunk_tokens(each)].copy()))
        done += chunk_tokens(each)
    return chunks, tuple(places)
