"""What a query sees of a stream, and which of its tokens a lane holds, both from positions alone.

>>> Span(sinks=4, window=6, block=1).least(20)  # the oldest token that token 20 sees, sinks apart
15
>>> Span(sinks=4, window=6, block=8).least(20)  # decided at token 16, which saw tokens 11 to 16
11
>>> Span(sinks=4, window=6, block=1).place(20)  # inside the cache: 4 sinks, 6 in the window
9
>>> Span(sinks=4, window=6, block=1, rank=1, size=3).own(8)  # of tokens 0 to 7: 1, 4 and 7
3
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The sinks, the window and the block of a policy with a closed form.

    Tokens are dealt out in turn to `size` lanes that share a stream, sinks and all: lane `rank`
    holds the tokens rank, rank + size, rank + 2 * size, ... So any run of tokens lies over the
    lanes as evenly as it can, and a lane's own tokens lie in its slots as all do in a lane alone.
    """

    sinks: int
    window: int | None
    block: int
    rank: int = 0
    size: int = 1

    def least(self, position: int) -> int:
        """The first token past the sinks that the query at `position` sees."""
        if self.window is None:
            return self.sinks
        decided = position - position % self.block
        return max(self.sinks, decided - self.window + 1)

    def place(self, position: int) -> int:
        """The query's own position inside the cache."""
        if position < self.sinks:
            return position
        return self.sinks + position - self.least(position)

    def own(self, stop: int) -> int:
        """How many of the stream's first `stop` tokens this lane holds or has held."""
        return -((self.rank - stop) // self.size)

    def share(self, count: int) -> int:
        """The most of any `count` tokens in a row that come to one lane."""
        return -(-count // self.size)

    def mine(self, x: Tensor, start: int) -> Tensor:
        """Of tokens `(batch, heads, tokens, width)` from position `start` on, this lane's own."""
        return x if self.size == 1 else x[:, :, (self.rank - start) % self.size :: self.size]

    def positions(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Where this lane's own tokens number `start`, ..., `stop - 1` stand in the stream."""
        first, end = (self.rank + self.size * index for index in (start, stop))
        return torch.arange(first, end, self.size, device=device)
