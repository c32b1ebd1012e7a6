"""Intervals of an accuracy, where questions about one prompt are no independent trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964
"""Standard errors on either side: 95 %."""


@dataclass(frozen=True)
class Rate:
    """A share, and the interval that holds it 95 times in 100."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def wilson(rate: float, trials: float) -> Rate:
    """Wilson's score interval (1927) of a share of `trials` independent ones, perhaps no whole
    number of them.

    >>> found = wilson(0.5, 10)
    >>> round(found.low, 4), round(found.high, 4)
    (0.2366, 0.7634)
    """
    spread = Z * Z / trials
    middle = (rate + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(rate * (1 - rate) / trials + spread / trials / 4)
    # At the ends the interval ends there; rounding must not say otherwise.
    low = 0.0 if rate == 0 else max(0.0, middle - half)
    return Rate(rate, low, 1.0 if rate == 1 else min(1.0, middle + half))


def clustered(right: Sequence[int], asked: Sequence[int]) -> Rate:
    """Wilson's interval over prompts, of each of which several things were asked.

    It takes as many trials as would give the variance that the prompts' shares have (Korn and
    Graubard's effective sample size, 1998): never more than were asked, nor fewer than the prompts.
    Where all or none is right there is no variance to see, and the prompts are the trials.

    Args:
        right: of each prompt, how many answers were right.
        asked: of each, how many were asked for; at least 1.
    """
    prompts, trials = len(asked), sum(asked)
    rate = sum(right) / trials
    if trials == prompts:
        return wilson(rate, trials)
    if rate in (0, 1) or prompts == 1:
        return wilson(rate, prompts)
    off = math.fsum((r - rate * n) ** 2 for r, n in zip(right, asked, strict=True))
    variance = off * prompts / (prompts - 1) / trials**2
    effective = rate * (1 - rate) / variance if variance else trials
    return wilson(rate, min(max(effective, prompts), trials))


def mean(values: Sequence[float]) -> Rate:
    """A mean and two standard errors on either side; one value alone could lie anywhere."""
    count = len(values)
    middle = math.fsum(values) / count
    if count == 1:
        return Rate(middle, -math.inf, math.inf)
    variance = math.fsum((value - middle) ** 2 for value in values) / (count - 1)
    error = 2 * math.sqrt(variance / count)
    return Rate(middle, middle - error, middle + error)
