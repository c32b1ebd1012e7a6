"""Angles and masks that all layers of one forward share."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from attnspan.positions import Rope


class Tables:
    """What the layers of one forward would compute alike, computed once; emptied after each.

    Beyond `limit` bytes the oldest go, to be computed again if they are wanted again.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._held: dict[Hashable, tuple[Tensor, ...]] = {}

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for made in self._held.values() for x in made)

    def clear(self) -> None:
        self._held.clear()

    def angles(
        self, rope: Rope, start: int, stop: int, length: int, like: Tensor, scaled: bool = True
    ) -> tuple[Tensor, Tensor]:
        """What `rope.turn` takes, for the positions `start <= p < stop`."""
        # By identity: layers share their ropes, and a value's hash would be computed at each call.
        key = (id(rope), start, stop, rope.regime(length), like.dtype, like.device, scaled)

        def make() -> tuple[Tensor, ...]:
            positions = torch.arange(start, stop, device=like.device)
            # fp32 at least: bf16 cosines would lose what angles from float64 gained.
            wide = torch.promote_types(like.dtype, torch.float32)
            return rope.spread(positions, length, wide, scaled)

        cos, sin = self.get(key, make)
        return cos, sin

    def get(self, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if key not in self._held:
            made = make()
            if self.limit is not None:
                room = self.limit - sum(x.nbytes for x in made)
                while self._held and self.nbytes > room:
                    self._held.pop(next(iter(self._held)))
            self._held[key] = made
        return self._held[key]
