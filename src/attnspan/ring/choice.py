"""Which schedule is the cheapest here: the planner's cost model, fed with what was measured."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from attnspan.patterns import Pattern
from attnspan.planner.links import Machine
from attnspan.planner.ring import Choice, Heads, choose
from attnspan.planner.work import Work
from attnspan.ring.exchange import Holding, plan_exchange
from attnspan.ring.ulysses import joined


@lru_cache(maxsize=64)
def cheapest(
    pattern: Pattern,
    n: int,
    holdings: tuple[Holding, ...],
    heads: Heads,
    machine: Machine,
    backward: bool,
    among: tuple[str, ...] | None = None,
) -> Choice:
    """The schedule that takes the fewest seconds for a layer; the same on all ranks."""
    size = len(holdings)

    def of(across: int) -> Work:
        width = size // across
        shards = tuple(joined(holdings[r * width : (r + 1) * width])[0] for r in range(across))
        return work_of(pattern, n, shards if width > 1 else holdings)

    return choose(of, size, heads, machine, backward, among)


@lru_cache(maxsize=64)
def work_of(pattern: Pattern, n: int, holdings: tuple[Holding, ...]) -> Work:
    """Pairs and keys that each rank has of each other's, whatever the pattern."""
    size = len(holdings)
    pairs, needs = (np.zeros((size, size), np.int64) for _ in range(2))
    for rank in range(size):
        plan = plan_exchange(pattern, n, holdings, rank)
        for each in (plan.local, *plan.rounds):
            for piece in each.receives:
                needs[rank, piece.source] += piece.tokens
            for call in each.calls:
                pairs[rank, each.receives[call.piece].source] += call.pairs
    return Work(n, size, pairs, needs)
