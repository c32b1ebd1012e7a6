"""Sets of keys, a set for each of many rows, as sorted disjoint ranges.

A set is a pair of integer arrays `(ranges, rows)`: range `k` of row `r` holds the keys
`starts[k, r] <= j < stops[k, r]`, and is empty where the two are equal. One row stands for all
where every row has the same set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Runs(NamedTuple):
    """Ranges of keys in rising order, disjoint, within `0 <= j <= m`."""

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """How many keys each row's set holds."""
        return (self.stops - self.starts).sum(0)


def one_run(starts: NDArray[np.int64], stops: NDArray[np.int64], m: int) -> Runs:
    """The keys `start <= j < stop` of each row, of those there are."""
    starts = np.minimum(np.maximum(starts, 0), m)
    return Runs(starts[None], np.maximum(np.minimum(stops, m), starts)[None])


def where(chosen: NDArray[np.bool_], m: int) -> Runs:
    """All keys in the rows that are chosen, none in the others."""
    return one_run(np.zeros(chosen.shape, np.int64), np.where(chosen, m, 0), m)


def complement(a: Runs, m: int) -> Runs:
    """The keys that are not in `a`."""
    edge = np.zeros((1, a.starts.shape[1]), np.int64)
    # An empty range of `a` leaves two that touch.
    return _joined(np.concatenate((edge, a.stops)), np.concatenate((a.starts, edge + m)))


def union(a: Runs, b: Runs) -> Runs:
    """The keys in either set.

    >>> a = Runs(np.array([[0], [6]]), np.array([[3], [8]]))
    >>> union(a, Runs(np.array([[2]]), np.array([[5]])))
    Runs(starts=array([[0],
           [6]]), stops=array([[5],
           [8]]))
    """
    rows = max(a.starts.shape[1], b.starts.shape[1])
    starts, stops = (
        np.concatenate([np.broadcast_to(x, (len(x), rows)) for x in pair])
        for pair in ((a.starts, b.starts), (a.stops, b.stops))
    )
    if len(starts) == 2:
        order = starts[1] < starts[0]
        starts = np.stack((np.minimum(*starts), np.maximum(*starts)))
        stops = np.stack((np.where(order, *stops[::-1]), np.where(order, *stops)))
    else:
        order = np.argsort(starts, axis=0, kind="stable"), np.arange(rows)
        starts, stops = starts[order], stops[order]
    # What an earlier range covers already is cut off at the front, so that all are disjoint.
    reach = np.maximum.accumulate(stops, 0)
    starts[1:] = np.maximum(starts[1:], reach[:-1])
    return _joined(starts, np.maximum(stops, starts))


def _joined(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Runs:
    """Ranges that touch, made one."""
    touching = ((starts[1:] <= stops[:-1]) & (stops[1:] > starts[1:])).any(1)
    last = max(np.flatnonzero(touching), default=-1) + 1
    for k in range(last, 0, -1):
        touch = (starts[k] <= stops[k - 1]) & (stops[k] > starts[k])
        stops[k - 1] = np.where(touch, stops[k], stops[k - 1])
        starts[k] = np.where(touch, stops[k], starts[k])
    return _dense(starts, stops)


def intersection(a: Runs, b: Runs, m: int) -> Runs:
    """The keys in both sets."""
    if len(a.starts) == len(b.starts) == 1:
        starts, stops = np.maximum(a.starts, b.starts), np.minimum(a.stops, b.stops)
        return Runs(starts, np.maximum(stops, starts))
    return complement(union(complement(a, m), complement(b, m)), m)


def _dense(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Runs:
    """Without the ranges that are empty in every row; at least one stays."""
    used = (stops > starts).any(1)
    if not used.any():
        return Runs(starts[:1], starts[:1])
    return Runs(starts, stops) if used.all() else Runs(starts[used], stops[used])
