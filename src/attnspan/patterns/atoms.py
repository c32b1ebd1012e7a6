"""The atoms that every pattern is made of.

Each atom is closed under `thin(step, residue)`: of its pairs, those whose query and key positions
are `residue + step * t`, in terms of `t`. So a pattern with a stride is computed class by class,
and each class is an ordinary dense problem; with a step of 1 it is the pattern from another origin.
All but strides are closed under `thin(step, residue, lead)` too: queries then stand `lead` further.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any, final

import numpy as np

from attnspan.patterns.algebra import And, Not, Or, Pattern, Positions
from attnspan.patterns.runs import Runs, one_run, where


class Atom(Pattern):
    """A pattern with a rule of its own."""

    def rule(self) -> Pattern:
        return self

    @abstractmethod
    def sees(self, i: Any, j: Any) -> Any: ...

    @abstractmethod
    def spans(self, first: Positions, last: Positions, m: int) -> tuple[Runs, Runs]: ...

    @abstractmethod
    def thin(self, step: int, residue: int, lead: int = 0) -> Pattern:
        """The atom for queries at `residue + lead + step * t` and keys at `residue + step * t`.

        Raises:
            ValueError: a stride, and a `lead`.
        """


@final
@dataclass(frozen=True, repr=False)
class Distance(Atom):
    """`least <= i - j < end`; None is no bound."""

    least: int | None = None
    end: int | None = None

    def sees(self, i: Any, j: Any) -> Any:
        distance = i - j
        if self.least is None and self.end is None:
            return distance == distance
        if self.least is None:
            return distance < self.end
        if self.end is None:
            return distance >= self.least
        return (distance >= self.least) & (distance < self.end)

    def spans(self, first: Positions, last: Positions, m: int) -> tuple[Runs, Runs]:
        low, high = np.zeros_like(first), np.full_like(first, m)
        some_start, all_start = (
            (low, low) if self.end is None else (first - self.end + 1, last - self.end + 1)
        )
        some_stop, all_stop = (
            (high, high) if self.least is None else (last - self.least + 1, first - self.least + 1)
        )
        return one_run(some_start, some_stop, m), one_run(all_start, all_stop, m)

    def thin(self, step: int, residue: int, lead: int = 0) -> Pattern:
        edges = (self.least, self.end)
        least, end = (None if x is None else -(-(x - lead) // step) for x in edges)
        return Distance(least, end)

    def __str__(self) -> str:
        return f"Distance({self.least}, {self.end})"


ALL = Distance()
NONE = Distance(0, 0)


@final
@dataclass(frozen=True, repr=False)
class Stride(Atom):
    """`(i - j) % step == 0`."""

    step: int

    def sees(self, i: Any, j: Any) -> Any:
        return (i - j) % self.step == 0

    def spans(self, first: Positions, last: Positions, m: int) -> tuple[Runs, Runs]:
        everything = np.ones(first.shape, bool)
        return where(everything, m), where(everything & (self.step == 1), m)

    def thin(self, step: int, residue: int, lead: int = 0) -> Pattern:
        if lead:
            raise ValueError(f"Stride({self.step}) has no form for queries {lead} apart from keys")
        rest = self.step // gcd(step, self.step)
        return ALL if rest == 1 else Stride(rest)

    def __str__(self) -> str:
        return f"Stride({self.step})"


class _Ranges:
    """Which positions lie in some sorted disjoint ranges."""

    def __init__(self, ranges: tuple[tuple[int, int], ...]) -> None:
        self.ranges = ranges
        flat = np.array(ranges, np.int64).reshape(-1, 2)
        self.starts, self.stops = flat[:, 0], flat[:, 1]

    def index(self, x: Positions) -> Positions:
        """The last range that starts at or before each position; -1 before the first."""
        return np.searchsorted(self.starts, x, side="right") - 1

    def hold(self, x: Any) -> Any:
        if len(self.ranges) > 4:
            return _looked_up(x, lambda places: self._hold_array(places).astype(np.int64)) != 0
        held = x != x
        for start, stop in self.ranges:
            held = held | ((x >= start) & (x < stop))
        return held

    def _hold_array(self, x: Positions) -> np.ndarray:
        index = self.index(x)
        return (index >= 0) & (x < np.append(self.stops, 0)[index])

    def thin(self, step: int, residue: int) -> tuple[tuple[int, int], ...]:
        thinned = [tuple(-(-(x - residue) // step) for x in each) for each in self.ranges]
        return tuple((a, b) for a, b in thinned if b > a)


@final
@dataclass(frozen=True, repr=False)
class Keys(Atom):
    """`j` lies in one of `ranges`: sorted, disjoint pairs (start, stop)."""

    ranges: tuple[tuple[int, int], ...]

    @cached_property
    def _ranges(self) -> _Ranges:
        return _Ranges(self.ranges)

    def sees(self, i: Any, j: Any) -> Any:
        return self._ranges.hold(j) & (i == i)

    def spans(self, first: Positions, last: Positions, m: int) -> tuple[Runs, Runs]:
        if not self.ranges:
            return NONE.spans(first, last, m)
        starts, stops = (
            np.clip(x, 0, m)[:, None].repeat(len(first), 1)
            for x in (self._ranges.starts, self._ranges.stops)
        )
        return Runs(starts, stops), Runs(starts, stops)

    def thin(self, step: int, residue: int, lead: int = 0) -> Pattern:
        return Keys(self._ranges.thin(step, residue))

    def __str__(self) -> str:
        return f"Keys({self.ranges})"


@final
@dataclass(frozen=True, repr=False)
class Queries(Atom):
    """`i` lies in one of `ranges`: sorted, disjoint pairs (start, stop)."""

    ranges: tuple[tuple[int, int], ...]

    @cached_property
    def _ranges(self) -> _Ranges:
        return _Ranges(self.ranges)

    def sees(self, i: Any, j: Any) -> Any:
        return self._ranges.hold(i) & (j == j)

    def spans(self, first: Positions, last: Positions, m: int) -> tuple[Runs, Runs]:
        if not self.ranges:
            return NONE.spans(first, last, m)
        stops = self._ranges.stops
        before_last, before_first = self._ranges.index(last), self._ranges.index(first)
        some = (before_last >= 0) & (stops[before_last] > first)
        all_ = (before_first >= 0) & (stops[before_first] > last)
        return where(some, m), where(all_, m)

    def thin(self, step: int, residue: int, lead: int = 0) -> Pattern:
        return Queries(self._ranges.thin(step, residue + lead))

    def __str__(self) -> str:
        return f"Queries({self.ranges})"


@final
@dataclass(frozen=True, repr=False)
class Segments(Atom):
    """`i` and `j` lie in the same segment; `bounds` are the segments' edges, first to last.

    A position outside all segments sees none and is seen by none. Where queries count from another
    place than keys, `query_bounds` are the edges in their count.
    """

    bounds: tuple[int, ...]
    query_bounds: tuple[int, ...] | None = None

    @cached_property
    def _bounds(self) -> Positions:
        return np.array(self.bounds, np.int64)

    @cached_property
    def _edges(self) -> Positions:
        return self._bounds if self.query_bounds is None else np.array(self.query_bounds, np.int64)

    def _of_key(self, j: Positions) -> Positions:
        return np.searchsorted(self._bounds, j, side="right") - 1

    def _of_query(self, i: Positions) -> Positions:
        return np.searchsorted(self._edges, i, side="right") - 1

    def sees(self, i: Any, j: Any) -> Any:
        mine, theirs = _looked_up(i, self._of_query), _looked_up(j, self._of_key)
        return (mine == theirs) & (mine >= 0) & (mine < len(self.bounds) - 1)

    def spans(self, first: Positions, last: Positions, m: int) -> tuple[Runs, Runs]:
        bounds, segments = self._bounds, len(self.bounds) - 1
        mine, theirs = self._of_query(first), self._of_query(last)
        some = one_run(
            bounds[np.clip(mine, 0, segments)], bounds[np.clip(theirs + 1, 0, segments)], m
        )
        same = (mine == theirs) & (mine >= 0) & (mine < segments)
        inside = np.where(same, mine, 0)
        return some, one_run(bounds[inside], bounds[inside + same], m)

    def thin(self, step: int, residue: int, lead: int = 0) -> Pattern:
        edges = self.bounds if self.query_bounds is None else self.query_bounds
        keys, queries = (
            tuple(-(-(bound - start) // step) for bound in each)
            for each, start in ((self.bounds, residue), (edges, residue + lead))
        )
        return Segments(keys, None if keys == queries else queries)

    def __str__(self) -> str:
        return f"Segments({self.bounds}, {self.query_bounds})"


@final
@dataclass(frozen=True, repr=False)
class Blocks(Atom):
    """The block of `i` is that of `j`, or up to `back` blocks later.

    The block of a key at p is `(p * scale + shift) // size`, that of a query `lead` more before it
    is divided.
    """

    size: int
    back: int = 0
    scale: int = 1
    shift: int = 0
    lead: int = 0

    def _of_key(self, j: Any) -> Any:
        return (j * self.scale + self.shift) // self.size

    def _of_query(self, i: Any) -> Any:
        return (i * self.scale + (self.shift + self.lead)) // self.size

    def _start(self, block: Positions) -> Positions:
        return -(-(block * self.size - self.shift) // self.scale)

    def sees(self, i: Any, j: Any) -> Any:
        mine, theirs = self._of_query(i), self._of_key(j)
        return (theirs <= mine) & (theirs >= mine - self.back)

    def spans(self, first: Positions, last: Positions, m: int) -> tuple[Runs, Runs]:
        mine, theirs = self._of_query(first), self._of_query(last)
        some = one_run(self._start(mine - self.back), self._start(theirs + 1), m)
        return some, one_run(self._start(theirs - self.back), self._start(mine + 1), m)

    def thin(self, step: int, residue: int, lead: int = 0) -> Pattern:
        scale, shift = self.scale * step, self.shift + self.scale * residue
        return Blocks(self.size, self.back, scale, shift, self.lead + self.scale * lead)

    def __str__(self) -> str:
        return f"Blocks({self.size}, {self.back}, {self.scale}, {self.shift}, {self.lead})"


def atoms(rule: Pattern) -> Iterator[Atom]:
    """The atoms of an expression."""
    match rule:
        case And(left, right) | Or(left, right):
            yield from atoms(left)
            yield from atoms(right)
        case Not(inner):
            yield from atoms(inner)
        case Atom():
            yield rule


def _looked_up(x: Any, f: Any) -> Any:
    """`f`, which takes and gives integer arrays of numpy, of a number, an array or a tensor."""
    if isinstance(x, int):
        return f(np.asarray(x)).item()
    if isinstance(x, np.ndarray | np.integer):
        return f(x)
    return x.new_tensor(f(x.numpy(force=True)))
