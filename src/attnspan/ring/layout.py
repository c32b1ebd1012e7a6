"""Which tokens of a sequence each process of a ring holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, final

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Chunk:
    """The positions `start + step * t`, `0 <= t < length`."""

    start: int
    length: int
    step: int = 1

    @property
    def positions(self) -> NDArray[np.int64]:
        return np.arange(self.length, dtype=np.int64) * self.step + self.start


class Layout(ABC):
    """How a sequence lies over the processes: as many tokens on each, in chunks."""

    @abstractmethod
    def chunks(self, n: int, world: int) -> tuple[tuple[Chunk, ...], ...]:
        """For each rank the chunks of its shard, in the order in which it holds them.

        Raises:
            ValueError: `n` tokens can't be dealt out evenly.
        """

    def positions(self, n: int, rank: int, world: int) -> NDArray[np.int64]:
        """Where the tokens of a rank's shard stand in the sequence, int64 `(n // world,)`."""
        return np.concatenate([chunk.positions for chunk in self.chunks(n, world)[rank]])

    def shard(self, x: Any, dim: int, rank: int, world: int) -> Any:
        """What `rank` holds of a whole tensor, or array, whose tokens lie along `dim`; a copy."""
        index = self.positions(x.shape[dim], rank, world)
        if isinstance(x, np.ndarray):
            return x.take(index, dim)
        from torch import from_numpy

        return x.index_select(dim, from_numpy(index).to(x.device))

    def unshard(self, parts: Sequence[Any], dim: int) -> Any:
        """The whole tensor or array, from what each rank holds of it."""
        world = len(parts)
        n = sum(part.shape[dim] for part in parts)
        order = np.concatenate([self.positions(n, rank, world) for rank in range(world)])
        back = np.empty_like(order)
        back[order] = np.arange(n)
        if isinstance(parts[0], np.ndarray):
            return np.concatenate(parts, dim).take(back, dim)
        from torch import cat, from_numpy

        return cat(list(parts), dim).index_select(dim, from_numpy(back).to(parts[0].device))


@final
@dataclass(frozen=True)
class Contiguous(Layout):
    """Rank r holds the r-th part of the sequence.

    A window then needs the last `W - 1` tokens of the rank before, and nothing else. Under a causal
    pattern without a window the last rank has twice the mean work: `ZigZag` evens that out.
    """

    def chunks(self, n: int, world: int) -> tuple[tuple[Chunk, ...], ...]:
        part = _part(self, n, world, 1)
        return tuple((Chunk(rank * part, part),) for rank in range(world))


@final
@dataclass(frozen=True)
class ZigZag(Layout):
    """Of `2 * world` parts, rank r holds part r and, counted from the end, part r.

    Under a causal pattern all ranks then have the same work (Llama 3, https://arxiv.org/abs/2407.21783).

    >>> ZigZag().positions(8, 0, 2).tolist(), ZigZag().positions(8, 1, 2).tolist()
    ([0, 1, 6, 7], [2, 3, 4, 5])
    """

    def chunks(self, n: int, world: int) -> tuple[tuple[Chunk, ...], ...]:
        if world == 1:
            return ((Chunk(0, n),),)
        part = _part(self, n, world, 2)
        return tuple(
            (Chunk(rank * part, part), Chunk((2 * world - 1 - rank) * part, part))
            for rank in range(world)
        )


@final
@dataclass(frozen=True)
class Striped(Layout):
    """Rank r holds every `world`-th token, from token r on (https://arxiv.org/abs/2311.09431).

    Every rank then needs keys of every other, so windows and strides are refused under it.
    """

    def chunks(self, n: int, world: int) -> tuple[tuple[Chunk, ...], ...]:
        part = _part(self, n, world, 1)
        return tuple((Chunk(rank, part, world),) for rank in range(world))


@dataclass(frozen=True)
class Ring:
    """A group of processes and how a sequence lies over them.

    Attributes:
        group: as in `ring_attention`, with layout, schedule, wire and deadline.
        layout: see group.
        schedule: see group.
        wire: see group.
        deadline: see group.
    """

    group: Any = None
    layout: Layout = Contiguous()
    schedule: str = "auto"
    wire: str | None = None
    deadline: float | None = None

    def options(self) -> dict[str, Any]:
        """As keyword arguments of `ring_attention`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _part(layout: Layout, n: int, world: int, each: int) -> int:
    if n % (world * each):
        raise ValueError(
            f"{type(layout).__name__}: {n} tokens on {world} ranks; a multiple of {world * each} "
            "is allowed (pad the sequence)"
        )
    return n // (world * each)
