"""Losses of two kinds on the same tokens, and the interval that their ratio lies in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK, MOST_BLOCKS = 64, 32
"""An interval is that of the means of blocks of neighbours, whose losses go together: single tokens
would make it look smaller than it is. Blocks have 64 tokens, or more where that would make more
than 32 of them: longer blocks depend less on each other."""

# Student's t that 97.5 % lie below, for 1, 2, ... 31 degrees of freedom, a block more. From
# https://www.itl.nist.gov/div898/handbook/eda/section3/eda3672.htm
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160),
    *(2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056),
    *(2.052, 2.048, 2.045, 2.042, 2.040),
)


@dataclass(frozen=True)
class Paired:
    """Perplexity over another's of the same tokens, and the interval that it lies in.

    Attributes:
        ratio: exp of the mean difference of nll.
        low: exp of the lower end of the mean's interval of 95 %, by blocks.
        high: the same of the upper end.
    """

    ratio: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"ratio": self.ratio, "low": self.low, "high": self.high}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """Two lists of nll of the same tokens, in nats.

    With fewer than two blocks anything may be: the interval is from 0 to the largest float.

    >>> paired([1.0, 1.5] * 64, [0.5, 1.0] * 64).ratio == math.exp(0.5)
    True
    """
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = math.fsum(gaps) / len(gaps)
    size = max(BLOCK, len(gaps) // MOST_BLOCKS)
    # A shorter last block would count as much as a whole one.
    means = [math.fsum(gaps[i : i + size]) / size for i in range(0, len(gaps) - size + 1, size)]
    if len(means) < 2:
        return Paired(bounded_exp(mean), 0.0, bounded_exp(math.inf))
    error = _error(means)
    return Paired(bounded_exp(mean), bounded_exp(mean - error), bounded_exp(mean + error))


def by_passage(gaps: Sequence[float]) -> Paired:
    """Perplexity over another's, of passages that are independent and as long as each other.

    Args:
        gaps: of each passage, its mean difference of nll.

    >>> found = by_passage([0.01, 0.03])
    >>> round(found.low, 4), round(found.ratio, 4), round(found.high, 4)  # 12.706 * 0.01
    (0.8985, 1.0202, 1.1584)
    """
    mean, error = math.fsum(gaps) / len(gaps), _spread(gaps)
    if error is None:
        return Paired(bounded_exp(mean), 0.0, bounded_exp(math.inf))
    return Paired(bounded_exp(mean), bounded_exp(mean - error), bounded_exp(mean + error))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """The mean of one list over that of another, pair by pair; the others' is above zero.

    The interval is of the pairs' differences to that ratio (Cochran, Sampling Techniques, 1977,
    chapter 6).

    >>> ratio([1.0, 2.0], [1.0, 2.0])
    Paired(ratio=1.0, low=1.0, high=1.0)
    """
    whole = math.fsum(theirs)
    found = math.fsum(ours) / whole
    error = _spread([a - found * b for a, b in zip(ours, theirs, strict=True)])
    if error is None:
        return Paired(found, 0.0, bounded_exp(math.inf))
    error *= len(theirs) / whole
    return Paired(found, found - error, found + error)


def _spread(values: Sequence[float]) -> float | None:
    """Half the interval of 95 % of a mean; None: too few to tell.

    More than `MOST_BLOCKS` are taken together, neighbours with neighbours.
    """
    size = -(-len(values) // MOST_BLOCKS)
    last = len(values) - size + 1
    means = [math.fsum(values[i : i + size]) / size for i in range(0, last, size)]
    return _error(means) if len(means) > 1 else None


def _error(means: Sequence[float]) -> float:
    middle = math.fsum(means) / len(means)
    variance = math.fsum((m - middle) ** 2 for m in means) / (len(means) - 1)
    return STUDENT[len(means) - 2] * math.sqrt(variance / len(means))


def bounded_exp(value: float) -> float:
    """At most about the largest float, so that JSON can hold it."""
    return math.exp(min(value, 709.0))
