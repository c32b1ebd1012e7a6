"""Which layers need all that the model was trained to see, and which do with a small window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        layers: how many the model has.
        second: sets that were held against tokens which had no part in the choice, in that order,
            and what they gave there.
        kept: the last of these that is within the demand there; None: not even the first is.
    """

    large: Policy
    small: Policy
    groups: tuple[tuple[int, ...], ...]
    alone: tuple[tuple[Paired, ...], ...]
    tried: tuple[tuple[frozenset[int], tuple[Paired, ...]], ...]
    chosen: frozenset[int] | None
    layers: int
    second: tuple[tuple[frozenset[int], tuple[Paired, ...]], ...] = ()
    kept: frozenset[int] | None = None

    def policy(self, some: frozenset[int]) -> Policy | PerLayer:
        """That of the set `some` under `small`."""
        return assigned(self.layers, self.groups, some, self.large, self.small)

    def full_layers(self, some: frozenset[int]) -> list[int]:
        """Layers that keep all where the set `some` doesn't."""
        return sorted(
            layer for i, group in enumerate(self.groups) if i not in some for layer in group
        )

    def as_dict(self) -> dict[str, Any]:
        held = dict(self.second)

        def listed(pairs: Sequence[Paired]) -> list[dict[str, float]]:
            return [each.as_dict() for each in pairs]

        return {
            "large": str(self.large),
            "small": str(self.small),
            "groups": [list(group) for group in self.groups],
            "alone": [listed(pairs) for pairs in self.alone],
            "tried": [
                {
                    "small_groups": sorted(some),
                    "over_best": listed(pairs),
                    "second_half": listed(held[some]) if some in held else None,
                }
                for some, pairs in self.tried
            ],
            "chosen": None if self.chosen is None else self.full_layers(self.chosen),
            "full_layers": None if self.kept is None else self.full_layers(self.kept),
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
) -> Policy | PerLayer:
    """`small` for the layers of the groups `some`, `large` for all others."""
    reduced = {layer for i in some for layer in groups[i]}
    if len(reduced) in (0, count):
        # The same for all layers has been measured under its own name.
        return small if reduced else large
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
            tried[some] = tuple(ledger.against_best(assigned(count, groups, some, large, small)))
        return tried[some]

    def within(some: frozenset[int]) -> bool:
        return all(pair.high <= demand for pair in over_best(some))

    tried: dict[frozenset[int], tuple[Paired, ...]] = {}
    alone = tuple(
        tuple(ledger.against(assigned(count, groups, frozenset({i}), large, small), large))
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
    return Search(large, small, groups, alone, tuple(tried.items()), chosen, count)


def confirm(found: Search, ledger: Ledger, demand: float) -> Search:
    """What was found, held against tokens that it wasn't chosen on.

    The sets that were within the demand are nested. They are asked about from the smallest, which
    drops least, up to the one that was chosen, and the first that isn't within the demand ends it:
    so the last before it is taken at the level of a single test (see `choice`).

    Args:
        found: of `search`.
        ledger: of other tokens than those of the search.
        demand: as there.
    """
    second: dict[frozenset[int], tuple[Paired, ...]] = {}
    kept = None
    for some, pairs in sorted(found.tried, key=lambda each: len(each[0])):
        if not all(pair.high <= demand for pair in pairs):
            continue
        second[some] = tuple(ledger.against_best(found.policy(some)))
        if not all(pair.high <= demand for pair in second[some]):
            break
        kept = some
    return replace(found, second=tuple(second.items()), kept=kept)
