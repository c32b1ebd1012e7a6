"""Influence of tokens on others, added up by the distance between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SHARES = (0.5, 0.9, 0.99)
"""Of the influence; the distances that hold them are given."""

_BINS_PER_OCTAVE = 4


@dataclass(frozen=True)
class Influence:
    """Influence against distance, the mean over all pairs of tokens that were measured.

    Attributes:
        mean: of each distance from 0 (the token itself) on. Nats of divergence, or the norm of a
            gradient; only ratios within one curve mean something.
        pairs: how many pairs of tokens each distance's mean is over; the first tokens left out.
        within: for each of `SHARES` the smallest distance up to which the means hold that share.
        spread: the smallest and the largest of that distance, each single place by itself.
        first: the share of all influence that the first tokens have.
        beyond: the largest influence beyond the bound; zero, or the model is not what it says.
            None: there is no bound, or no distance beyond it was measured.
        beyond_pairs: pairs of tokens farther apart than the bound.
        allowed: the largest influence beyond the bound that is put down to rounding; zero but for
            changes in a mixture of experts.
    """

    mean: tuple[float, ...]
    pairs: tuple[int, ...]
    within: tuple[int, ...]
    spread: tuple[tuple[int, int], ...]
    first: float
    beyond: float | None
    beyond_pairs: int
    allowed: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON: the curve in bins of distances that widen with the distance."""
        return {
            "within": {f"{share:g}": d for share, d in zip(SHARES, self.within, strict=True)},
            "spread": {
                f"{share:g}": list(ends) for share, ends in zip(SHARES, self.spread, strict=True)
            },
            "first_tokens": self.first,
            "beyond_bound": self.beyond,
            "beyond_bound_pairs": self.beyond_pairs,
            "rounding_allowed": self.allowed,
            "curve": list(self._binned()),
        }

    def _binned(self) -> Iterator[dict[str, Any]]:
        start = 0
        while start < len(self.mean):
            stop = min(
                len(self.mean), max(start + 1, math.ceil(start * 2 ** (1 / _BINS_PER_OCTAVE)))
            )
            pairs = sum(self.pairs[start:stop])
            total = math.fsum(
                m * p for m, p in zip(self.mean[start:stop], self.pairs[start:stop], strict=True)
            )
            yield {
                "from": start,
                "to": stop - 1,
                "mean": total / pairs if pairs else None,
                "pairs": pairs,
            }
            start = stop


class Sums:
    """Adds up influences by distance, the first tokens' apart."""

    def __init__(
        self, length: int, bound: int | None, first: int, sinks: int, rounding: float = 0.0
    ) -> None:
        self.bound, self.first, self.sinks, self.rounding = bound, first, sinks, rounding
        self.sums = torch.zeros(length, dtype=torch.float64)
        self.pairs = torch.zeros(length, dtype=torch.int64)
        self.singles: list[Tensor] = []
        self.firsts: list[float] = []
        self.beyond, self.beyond_pairs = 0.0, 0

    def add_query(self, values: Tensor) -> None:
        """The influence on one place, of each distance back to the first token."""
        self._check(values[: len(values) - self.sinks])
        if self.first:
            total = float(values.sum())
            self.firsts.append(float(values[-self.first :].sum()) / total if total else 0.0)
        self._add(values[: len(values) - self.first])

    def add_source(self, place: int, values: Tensor) -> None:
        """The influence of the token at `place`, which is none of the first, on what follows."""
        assert place >= self.first
        self._check(values)
        self._add(values)

    def _check(self, values: Tensor) -> None:
        if self.bound is not None and len(values) > self.bound + 1:
            beyond = values[self.bound + 1 :]
            self.beyond = max(self.beyond, float(beyond.max()))
            self.beyond_pairs += len(beyond)

    def _add(self, values: Tensor) -> None:
        self.sums[: len(values)] += values
        self.pairs[: len(values)] += 1
        self.singles.append(values)

    def influence(self) -> Influence:
        mean = self.sums / self.pairs.clamp(min=1)
        # A place near either end has few distances: its own would say more of the end than of it.
        whole = [v for v in self.singles if 2 * len(v) >= len(mean)] or self.singles
        singles = [held(values) for values in whole]
        return Influence(
            tuple(mean.tolist()),
            tuple(self.pairs.tolist()),
            held(mean),
            tuple(
                (min(each[i] for each in singles), max(each[i] for each in singles))
                for i in range(len(SHARES))
            ),
            math.fsum(self.firsts) / len(self.firsts) if self.firsts else 0.0,
            self.beyond if self.beyond_pairs else None,
            self.beyond_pairs,
            self.rounding,
        )


def held(values: Tensor) -> tuple[int, ...]:
    """For each of `SHARES` the smallest distance up to which `values` hold that share.

    >>> held(torch.tensor([5.0, 4.0, 0.9, 0.1, 0.0]))
    (0, 1, 2)
    """
    running = values.double().cumsum(0)
    # Less a little rounding: 5 + 4 of 10 must count as nine tenths.
    wanted = running[-1] * torch.tensor(SHARES, dtype=torch.float64) * (1 - 1e-7)
    return tuple(torch.searchsorted(running, wanted).clamp(max=len(values) - 1).tolist())
