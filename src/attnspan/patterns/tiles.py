"""From a pattern to tiles: which keys each block of query rows must meet, found without a mask.

A rule without strides is one pass over the sequence as it stands. A rule with a stride s adds a
pass of s jobs, one for each residue class of positions by s: within a class the stride vanishes,
and what is left is a dense rule on the class's own positions. The passes' pairs are disjoint, so
their results merge by their log-sum-exps.

Time and memory are linear in the rows of tiles, whatever n is: for 1,000,000 tokens in tiles of 64
a few milliseconds and under 1 MiB. With arbitrary global tokens they are linear in rows times runs
of global positions; and a stride beside globals, documents or blocks costs a plan for each class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import lcm
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnspan.patterns.algebra import And, Not, Or, Pattern
from attnspan.patterns.atoms import (
    ALL,
    NONE,
    Atom,
    Blocks,
    Distance,
    Keys,
    Queries,
    Segments,
    Stride,
    atoms,
)
from attnspan.patterns.library import MOST

_LENGTHS = 2**31  # tile lists hold tokens in 32 bits
_ROWS = 1408  # at a time: what stands in between stays small


@dataclass(frozen=True, eq=False)
class Tiles:
    """What `n` queries at the positions `offset`, `offset + 1`, ... see of the keys 0 to `m` - 1.

    Row r of tiles holds the queries `r * tile <= i < (r + 1) * tile`, counted from the first.

    Attributes:
        some_ptr: int32 `(rows + 1,)`: row r has the ranges `some[some_ptr[r] : some_ptr[r + 1]]`.
        some: int32 `(ranges, 2)`: rising, disjoint ranges `start <= j < stop` outside of which no
            query of the row sees a key.
        all_ptr: as `some_ptr`, for `all`.
        all: int32 `(ranges, 2)`: ranges of keys that every query of the row sees.
        rule: what decides in between.
    """

    n: int
    m: int
    offset: int
    tile: int
    some_ptr: NDArray[np.int32]
    some: NDArray[np.int32]
    all_ptr: NDArray[np.int32]
    all: NDArray[np.int32]
    rule: Pattern

    @property
    def rows(self) -> int:
        return len(self.some_ptr) - 1

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.some_ptr, self.some, self.all_ptr, self.all))

    def ranges(self, row: int) -> Iterator[tuple[Literal["full", "partial"], int, int]]:
        """The tiles of `row` that are not empty: (kind, first tile, tile after the last), in order.

        Tile t holds the keys `t * tile <= j < (t + 1) * tile`, the last one those there are. Every
        pair of a full tile is seen. A partial one may turn out full or empty where the parts of a
        combination don't tell.
        """
        t, m = self.tile, self.m
        some = self.some[self.some_ptr[row] : self.some_ptr[row + 1]].tolist()
        full = [
            (-(-a // t), -(-b // t) if b == m else b // t)
            for a, b in self.all[self.all_ptr[row] : self.all_ptr[row + 1]].tolist()
        ]
        full = [(a, b) for a, b in full if a < b]
        done = 0
        for a, b in some:
            start, stop = max(done, a // t), -(-b // t)
            for x, y in full:
                if x >= stop or y <= start:
                    continue
                if start < x:
                    yield "partial", start, x
                yield "full", x, y
                start = y
            if start < stop:
                yield "partial", start, stop
            done = max(done, stop)

    @cached_property
    def program(self) -> tuple[NDArray[np.int64], tuple[NDArray[np.generic], ...]]:
        """`rule` as a stack program `(operations, 3)` of (code, a, b), and the tables it reads."""
        code: list[tuple[int, int, int]] = []
        tables: list[NDArray[np.generic]] = []
        _emit(self.rule, self, code, tables)
        return np.array(code, np.int64), tuple(tables)


@dataclass(frozen=True, eq=False)
class Job:
    """`count` dense problems that share their tiles.

    Problem t, of the pass's step s: row r of its queries is row `first_query + t + s * r` of the
    whole, key j is key `first_key + t + s * j`.
    """

    first_query: int
    first_key: int
    count: int
    tiles: Tiles


@dataclass(frozen=True, eq=False)
class Pass:
    """Jobs over every `step`-th row and key."""

    step: int
    jobs: tuple[Job, ...]


def plan(
    pattern: Pattern, n: int, m: int | None = None, q_offset: int | None = None, tile: int = 128
) -> tuple[Pass, ...]:
    """The passes that compute `pattern`, disjoint in the pairs they see.

    Args:
        pattern: which pairs see each other.
        n: queries, at the positions `q_offset` to `q_offset + n - 1`.
        m: keys, at 0 to `m - 1`; None is `n`.
        q_offset: None is `m - n`.
        tile: query rows of a tile.

    Raises:
        ValueError: lengths that aren't whole numbers from 0 to 2**31 - 1, a `tile` below 1, an
            offset beyond `patterns.library.MOST`.
        TypeError: `pattern` is none.

    >>> from attnspan.patterns import SlidingWindow
    >>> (only,) = plan(SlidingWindow(200), 512, tile=64)
    >>> list(only.jobs[0].tiles.ranges(5))
    [('partial', 1, 3), ('full', 3, 5), ('partial', 5, 6)]
    """
    m, offset = _checked("plan", pattern, n, m, q_offset)
    if isinstance(tile, bool) or not isinstance(tile, int) or not 1 <= tile < _LENGTHS:
        raise ValueError(f"plan: tile is {tile!r}; a whole number of at least 1 is allowed")
    rule = _near(pattern.rule(), n, m, offset)
    strides = _strides(rule)
    if not strides:
        return (Pass(1, (Job(0, 0, 1, _tiles(rule, n, m, offset, tile)),)),)
    step = max(strides)
    without, within = _fixed(rule, step, False), _fixed(rule, step, True)
    passes = []
    # Where being on the stride can only add pairs, those seen without it need no stride.
    local = without if _rises(rule, step) else _and(without, _or(within, Not(Stride(step))))
    if local != NONE:
        passes.append(Pass(1, (Job(0, 0, 1, _tiles(local, n, m, offset, tile)),)))
    rest = _and(within, _not(without))
    if rest != NONE:
        passes.append(Pass(step, tuple(_classes(rest, step, n, m, offset, tile))))
    return tuple(passes)


def whole(pattern: Pattern, n: int, m: int, q_offset: int, tile: int = 128) -> Tiles:
    """The tiles of a pattern in one pass, strides and all: what they touch is then in doubt."""
    return _tiles(_near(pattern.rule(), n, m, q_offset), n, m, q_offset, tile)


def pairs(pattern: Pattern, n: int, m: int | None = None, q_offset: int | None = None) -> int:
    """How many pairs of `n` queries and `m` keys see each other: O(n) time, little memory.

    Arguments as in `plan`.

    >>> from attnspan.patterns import Causal, SlidingWindow, Strided
    >>> pairs(Causal(), 4), pairs(Causal(), 1, 4), pairs(SlidingWindow(3), 1_000_000)
    (10, 4, 2999997)
    >>> pairs(Strided(2, 3), 4)
    8
    """
    m, offset = _checked("pairs", pattern, n, m, q_offset)
    rule = _near(pattern.rule(), n, m, offset)
    total = 0
    for start in range(0, n, _ROWS):
        places = np.arange(start, min(start + _ROWS, n), dtype=np.int64) + offset
        total += _count(rule, places, m, 1)
    return total


def seen(pattern: Pattern, places: NDArray[np.int64], m: int) -> NDArray[np.bool_]:
    """Which of the keys 0 to `m` - 1 some query sees, queries standing at `places`: bool `(m,)`.

    >>> from attnspan.patterns import Sinks, SlidingWindow
    >>> seen(SlidingWindow(2) | Sinks(1), np.array([5, 6]), 8).nonzero()[0].tolist()
    [0, 4, 5, 6]
    """
    return _seen(pattern.rule(), places, m)


def _seen(rule: Pattern, places: NDArray[np.int64], m: int) -> NDArray[np.bool_]:
    strides = _strides(rule)
    if strides:
        step = max(strides)
        without, within = _fixed(rule, step, False), _fixed(rule, step, True)
        rises = _rises(rule, step)
        found = _seen(without, places, m) if rises else np.zeros(m, bool)
        for residue in range(min(step, m)):
            keys, on = slice(residue, None, step), places % step == residue
            if not rises:  # what only queries on the stride would see without it isn't seen
                found[keys] = _seen(without, places[~on], m)[keys]
            thin = _map(within, lambda atom, c=residue: atom.thin(step, c))
            some = (places[on] - residue) // step
            found[keys] |= _seen(thin, some, -(-(m - residue) // step))
        return found
    edges = np.zeros(m + 1, np.int64)
    for start in range(0, len(places), _ROWS):
        some = places[start : start + _ROWS]
        (starts, stops), _ = rule.spans(some, some, m)
        np.add.at(edges, starts.ravel(), 1)
        np.add.at(edges, stops.ravel(), -1)
    return edges[:m].cumsum() > 0


def _checked(name: str, pattern: Any, n: Any, m: Any, q_offset: Any) -> tuple[int, int]:
    """`m` and `q_offset`, defaults filled in."""
    if not isinstance(pattern, Pattern):
        raise TypeError(f"{name}: pattern is {pattern!r}; a Pattern such as Causal() is allowed")
    for word, length in (("n", n), ("m", n if m is None else m)):
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length < _LENGTHS:
            raise ValueError(
                f"{name}: {word} is {length!r}; a whole number from 0 to {_LENGTHS - 1} is allowed"
            )
    m = n if m is None else m
    offset = m - n if q_offset is None else q_offset
    if isinstance(offset, bool) or not isinstance(offset, int) or abs(offset) > MOST:
        raise ValueError(
            f"{name}: q_offset is {q_offset!r}; None or a whole number from {-MOST} to {MOST} is "
            "allowed"
        )
    return m, offset


def _count(rule: Pattern, places: NDArray[np.int64], m: int, step: int) -> int:
    """Pairs that `rule` sees among those with `(i - j) % step == 0`."""
    strides = _strides(rule)
    if strides:
        s = max(strides)
        without, within, both = _fixed(rule, s, False), _fixed(rule, s, True), lcm(step, s)
        return (
            _count(without, places, m, step)
            - _count(without, places, m, both)
            + _count(within, places, m, both)
        )
    seen, _ = rule.spans(places, places, m)
    if step == 1:
        return int(seen.sizes.sum())
    return int(((places - seen.starts) // step - (places - seen.stops) // step).sum())


def _tiles(rule: Pattern, n: int, m: int, offset: int, tile: int) -> Tiles:
    rows = -(-n // tile)
    parts: list[list[NDArray[np.int32]]] = [
        [np.zeros(1, np.int32)],
        [],
        [np.zeros(1, np.int32)],
        [],
    ]
    for start in range(0, rows, _ROWS):
        first = np.arange(start, min(start + _ROWS, rows), dtype=np.int64) * tile + offset
        sets = rule.spans(first, np.minimum(first + tile, offset + n) - 1, m)
        for k, (starts, stops) in enumerate(sets):
            kept = (stops > starts).T
            parts[2 * k].append(kept.sum(1, dtype=np.int32))
            ranges = np.stack((starts.T[kept], stops.T[kept]), -1)
            parts[2 * k + 1].append(ranges.astype(np.int32))
    joined = []
    for part in parts:
        joined.append(np.concatenate(part) if part else np.zeros((0, 2), np.int32))
        part.clear()
    some_ptr, some, all_ptr, all_ = joined
    np.cumsum(some_ptr, out=some_ptr)
    np.cumsum(all_ptr, out=all_ptr)
    return Tiles(n, m, offset, tile, some_ptr, some, all_ptr, all_, rule)


def _classes(rule: Pattern, step: int, n: int, m: int, offset: int, tile: int) -> Iterator[Job]:
    """The jobs of a pass: the residue classes that hold a query."""
    if all(isinstance(atom, Distance | Stride) for atom in atoms(rule)):
        # Classes differ in nothing but their lengths, which change at these residues alone.
        edges = sorted({0, offset % step, (offset + n) % step, m % step, step})
    else:
        edges = list(range(step + 1))
    for residue, end in pairwise(edges):
        first = (residue - offset) % step
        rows, keys = -(-(n - first) // step), max(0, -(-(m - residue) // step))
        if rows <= 0:
            continue
        thin = _map(rule, lambda atom, c=residue: atom.thin(step, c))
        start = (offset + first - residue) // step
        tiles = _tiles(thin, rows, keys, start, tile)
        yield Job(first, residue, end - residue, tiles)


def _strides(rule: Pattern) -> set[int]:
    return {atom.step for atom in atoms(rule) if isinstance(atom, Stride)}


def _map(rule: Pattern, change: Callable[[Atom], Pattern]) -> Pattern:
    match rule:
        case And(left, right):
            return _and(_map(left, change), _map(right, change))
        case Or(left, right):
            return _or(_map(left, change), _map(right, change))
        case Not(inner):
            return _not(_map(inner, change))
        case Atom():
            return change(rule)
    raise AssertionError(f"{rule!r} is no rule")


def _fixed(rule: Pattern, step: int, value: bool) -> Pattern:
    """`rule` where `(i - j) % step == 0` holds (or doesn't)."""
    return _map(
        rule,
        lambda atom: (ALL if value else NONE) if atom == Stride(step) else atom,
    )


def _near(rule: Pattern, n: int, m: int, offset: int) -> Pattern:
    """`rule` without strides that are trivial for these lengths."""
    furthest = max(abs(offset + n - 1), abs(offset - m + 1)) if n and m else 0

    def simple(atom: Atom) -> Pattern:
        if isinstance(atom, Stride) and atom.step == 1:
            return ALL
        if isinstance(atom, Stride) and atom.step > furthest:
            return Distance(0, 1)
        return atom

    return _map(rule, simple)


def _rises(rule: Pattern, step: int) -> bool:
    """Whether every pair seen off the stride would be seen on it too, as the expression tells."""
    match rule:
        case And(left, right) | Or(left, right):
            return _rises(left, step) and _rises(right, step)
        case Not(inner):
            return step not in _strides(inner)
    return True


def _and(left: Pattern, right: Pattern) -> Pattern:
    if NONE in (left, right):
        return NONE
    if ALL in (left, right):
        return right if left == ALL else left
    return And(left, right)


def _or(left: Pattern, right: Pattern) -> Pattern:
    if ALL in (left, right):
        return ALL
    if NONE in (left, right):
        return right if left == NONE else left
    return Or(left, right)


def _not(inner: Pattern) -> Pattern:
    match inner:
        case Not(pattern):
            return pattern
        case Distance(None, None):
            return NONE
    return ALL if inner == NONE else Not(inner)


OPERATIONS = ("all", "none", "distance", "keys", "queries", "span", "stride", "and", "or", "not")
FAR = 2**62


def _emit(rule: Pattern, tiles: Tiles, code: list, tables: list) -> None:
    def put(name: str, a: int = 0, b: int = 0) -> None:
        code.append((OPERATIONS.index(name), a, b))

    def table(x: NDArray[np.generic]) -> int:
        tables.append(np.ascontiguousarray(x))
        return len(tables) - 1

    match rule:
        case And(left, right) | Or(left, right):
            _emit(left, tiles, code, tables)
            _emit(right, tiles, code, tables)
            put("and" if isinstance(rule, And) else "or")
        case Not(inner):
            _emit(inner, tiles, code, tables)
            put("not")
        case Distance(least, end):
            put("distance", -FAR if least is None else least, FAR if end is None else end)
        case Stride(step):
            put("stride", step)
        case Keys():
            held = rule.sees(np.zeros(1, np.int64), np.arange(tiles.m, dtype=np.int64))
            put("keys", table(_bits(held)))
        case Queries():
            places = np.arange(tiles.n, dtype=np.int64) + tiles.offset
            put("queries", table(_bits(rule.sees(places, np.zeros(1, np.int64)))))
        case Segments() | Blocks():
            places = np.arange(tiles.n, dtype=np.int64) + tiles.offset
            (starts, stops), _ = rule.spans(places, places, tiles.m)
            put("span", table(np.stack((starts[0], stops[0]), -1).astype(np.int32)))
        case _:
            raise AssertionError(f"{rule!r} is no rule")


def _bits(held: NDArray[np.bool_]) -> NDArray[np.generic]:
    """Bit j of word j // 64; one word more, so that a read across the end is a read of zeros."""
    bits = np.packbits(held, bitorder="little")
    return np.pad(bits, (0, 16 - len(bits) % 8)).view(np.uint64)
