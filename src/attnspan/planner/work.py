"""What each rank of a ring computes and must be sent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Work:
    """What a ring of `size` ranks has to do for one sequence.

    Attributes:
        n: tokens, with those that pad the sequence to whole chunks.
        size: ranks.
        pairs: int64 `(size, size)`: pairs of a query of rank r and a key of rank s.
        needs: int64 `(size, size)`: keys of rank s that a query of rank r sees.
        exact: False where a stride made the figures estimates.
    """

    n: int
    size: int
    pairs: Table
    needs: Table
    exact: bool = True

    @property
    def shard(self) -> int:
        """Tokens of a rank."""
        return self.n // self.size

    @property
    def total(self) -> int:
        return int(self.pairs.sum())

    @property
    def imbalance(self) -> float:
        """The largest share of the pairs over the mean one, less 1."""
        mean = self.total / self.size
        return float(self.pairs.sum(1).max() / mean - 1) if mean else 0.0

    @property
    def sent(self) -> Table:
        """Keys that each rank sends to others: a key that two ranks need counts twice."""
        return self.needs.sum(0) - self.needs.diagonal()

    @property
    def received(self) -> Table:
        """Keys that each rank receives."""
        return self.needs.sum(1) - self.needs.diagonal()

    @cached_property
    def rounds(self) -> tuple[Round, ...]:
        """What the ring does, round by round.

        Round 0 is a rank's own shard. In step t rank r receives from rank r - t. Steps in which
        nobody needs anything vanish, and steps are joined into a round while no rank receives or
        sends more than a shard's keys in it. All ranks wait for the slowest in each round.
        """
        ranks = np.arange(self.size)
        none = np.zeros(self.size, np.int64)
        rounds = [Round(int(self.pairs.diagonal().max()), 0, 0)]
        pairs = received = sent = none
        for step in range(1, self.size):
            other = ranks - step
            more = self.needs[ranks, other]
            if not more.any():
                continue
            gone = self.needs[ranks - self.size + step, ranks]
            most = max(int((received + more).max()), int((sent + gone).max()))
            if received.any() and most > self.shard:
                rounds.append(_round(pairs, received, sent))
                pairs = received = sent = none
            pairs, received = pairs + self.pairs[ranks, other], received + more
            sent = sent + gone
        if received.any():
            rounds.append(_round(pairs, received, sent))
        return tuple(rounds)

    @property
    def at_once(self) -> tuple[Round, ...]:
        """The same with one round for all that others hold."""
        own = self.pairs.diagonal()
        rest = _round(self.pairs.sum(1) - own, self.received, self.sent)
        first = Round(int(own.max()), 0, 0)
        return (first, rest) if rest.received else (first,)


class Round(NamedTuple):
    """The most that any rank has in a round.

    Attributes:
        pairs: that it computes.
        received: keys that come in.
        moved: keys that come in or go out, whichever are more.
    """

    pairs: int
    received: int
    moved: int


def _round(pairs: Table, received: Table, sent: Table) -> Round:
    keys = int(received.max())
    return Round(int(pairs.max()), keys, max(keys, int(sent.max())))
