"""Where a step of one token stands, known to the device alone.

A captured CUDA graph repeats what it was captured with, so nothing in it may depend on a number
that the host holds. Here are the numbers that a rolling buffer's step needs, made from one tensor
that counts the stream.

>>> position = torch.tensor([21])
>>> clock = Clock(position)
>>> clock.slot(sinks=4, slots=6, front=4), clock.length(sinks=4, slots=6, front=4)
(tensor([9]), tensor([10], dtype=torch.int32))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clock:
    """What a step may know of its place.

    Attributes:
        position: int64 `(1,)` on the device, the stream position of the one new token of each row.
        counters: int32 zeros on the device for the attention, see `attnspan.views.attend`; None
            where it does without.
    """

    position: Tensor
    counters: Tensor | None = None

    def slot(self, sinks: int, slots: int | None, front: int) -> Tensor:
        """The slot of the new token, int64 `(1,)`: `slots` that roll, behind `front` others."""
        place = self.position - sinks
        return (place if slots is None else place % slots) + front

    def length(self, sinks: int, slots: int | None, front: int) -> Tensor:
        """The slots in use once it is there, `front` included, int32 `(1,)`."""
        held = self.position + 1 - sinks
        return ((held if slots is None else held.clamp(max=slots)) + front).int()

    def least(self, sinks: int, window: int | None, block: int) -> Tensor:
        """The first token past the sinks that the new one sees, int64 `(1,)`."""
        if window is None:
            return torch.full_like(self.position, sinks)
        decided = self.position - self.position % block
        return (decided - window + 1).clamp(min=sinks)

    def positions(self, sinks: int, slots: int | None, size: int) -> Tensor:
        """The stream position of what lies in each of `size` slots, int64 `(size,)`.

        Of slots that hold nothing yet, some number: their length leaves them out.
        """
        slot = torch.arange(size, device=self.position.device)
        if slots is None:
            return slot + sinks
        last = self.position
        return last - ((last - sinks) % slots - slot) % slots
