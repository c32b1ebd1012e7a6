"""Which layers need all that the model was trained to see, and which do with a small window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from attnspan.evaluation.shrink import Ledger, Paired
from attnspan.policies import PerLayer, Policy

MOST_GROUPS = 12
"""Layers of a deeper model go in so many groups of neighbours, so that the work is bounded."""


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        large: the policy of a layer that keeps all.
        small: the policy of one that doesn't.
        groups: the layers that were tried together; those with a window of their own are in none.
        alone: for each group and passage, the perplexity with just that group under `small`, over
            that with none.
        tried: sets of groups under `small` that were measured, and over the best what they gave.
        chosen: the largest of these within the demand; None: not even the empty one is.
    """

    large: Policy
    small: Policy
    groups: tuple[tuple[int, ...], ...]
    alone: tuple[tuple[Paired, ...], ...]
    tried: tuple[tuple[frozenset[int], tuple[Paired, ...]], ...]
    chosen: frozenset[int] | None

    @property
    def full_layers(self) -> list[int]:
        """Layers that keep all in what was chosen."""
        chosen = self.chosen or frozenset()
        return sorted(
            layer for i, group in enumerate(self.groups) if i not in chosen for layer in group
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "large": str(self.large),
            "small": str(self.small),
            "groups": [list(group) for group in self.groups],
            "alone": [[each.as_dict() for each in pairs] for pairs in self.alone],
            "tried": [
                {"small_groups": sorted(some), "over_best": [each.as_dict() for each in pairs]}
                for some, pairs in self.tried
            ],
            "full_layers": None if self.chosen is None else self.full_layers,
        }


def grouped(layers: Sequence[int], most: int = MOST_GROUPS) -> tuple[tuple[int, ...], ...]:
    """Neighbours in up to `most` groups of sizes as equal as can be.

    >>> grouped([0, 1, 2, 3, 4], 2), grouped([3, 5], 12)
    (((0, 1, 2), (3, 4)), ((3,), (5,)))
    """
    count = min(most, len(layers))
    edges = [-(-i * len(layers) // count) for i in range(count + 1)] if count else [0]
    return tuple(tuple(layers[a:b]) for a, b in pairwise(edges))


def assigned(
    count: int, groups: Sequence[Sequence[int]], some: frozenset[int], large: Policy, small: Policy
) -> PerLayer:
    """`small` for the layers of the groups `some`, `large` for all others."""
    reduced = {layer for i in some for layer in groups[i]}
    return PerLayer(tuple(small if layer in reduced else large for layer in range(count)))


def search(
    ledger: Ledger,
    windows: Sequence[int | None],
    large: Policy,
    small: Policy,
    demand: float,
    most: int = MOST_GROUPS,
) -> Search:
    """Puts each group under `small` alone, then more and more of those that cost least.

    The groups are ordered by what each costs alone. How many of them can be put under `small`
    together is found by halving, with each set that is tried measured as a whole: losses add up in
    ways that single ones don't show. What is chosen has itself been measured.

    Args:
        windows: of each layer of the model; one that has a window keeps it, whatever the policy.
        demand: the largest perplexity over the best that is allowed, the interval's upper end
            included, on every passage.
    """
    count = len(windows)
    hybrid = None in windows
    groups = grouped([i for i, window in enumerate(windows) if window is None or not hybrid], most)

    def over_best(some: frozenset[int]) -> tuple[Paired, ...]:
        if some not in tried:
            # The same for all layers has been measured under its own name.
            everything = len(some) in (0, len(groups)) and not hybrid
            policy: Policy | PerLayer = assigned(count, groups, some, large, small)
            if everything:
                policy = small if some else large
            tried[some] = tuple(ledger.against_best(policy))
        return tried[some]

    def within(some: frozenset[int]) -> bool:
        return all(pair.high <= demand for pair in over_best(some))

    tried: dict[frozenset[int], tuple[Paired, ...]] = {}
    nothing = assigned(count, groups, frozenset(), large, small) if hybrid else large
    alone = tuple(
        tuple(
            ledger.against(assigned(count, groups, frozenset({i}), large, small), nothing)
            if len(groups) > 1 or hybrid
            else ledger.against(small, large)
        )
        for i in range(len(groups))
    )
    order = sorted(range(len(groups)), key=lambda i: max(pair.ratio for pair in alone[i]))
    chosen = None
    if within(frozenset()):
        # As many as are within the demand: a number that is, and one above it that isn't.
        good, bad = 0, len(groups) + 1
        if within(frozenset(order)):
            good = len(groups)
        else:
            bad = len(groups)
        while bad - good > 1 and good < len(groups):
            middle = (good + bad) // 2
            if within(frozenset(order[:middle])):
                good = middle
            else:
                bad = middle
        chosen = frozenset(order[:good])
    return Search(large, small, groups, alone, tuple(tried.items()), chosen)
