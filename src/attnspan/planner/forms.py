"""The work of a ring in closed form.

A sequence lies over the ranks in chunks, one a rank or two (`attnspan.ring.layout`). A pattern is
taken apart into rectangles of queries and keys, each with a band of distances in it. How many pairs
a band has in two chunks, and which keys of the one a query of the other needs, are formulas: no
token is looked at, so a million of them on a thousand ranks cost milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import Any

import numpy as np

from attnspan.patterns.algebra import And, Or, Pattern
from attnspan.patterns.library import (
    Blockwise,
    Causal,
    Documents,
    Full,
    GlobalTokens,
    Longformer,
    Sinks,
    SlidingWindow,
    Strided,
)
from attnspan.planner.quantities import MOST_RANKS, MOST_TOKENS
from attnspan.planner.work import Table, Work

LAYOUTS = ("contiguous", "zigzag", "striped")
_FAR = 2**40
_TERMS = 5  # pairs of a union are counted by inclusion and exclusion, 2**5 sums at the most


def work(pattern: Pattern, n: int, size: int, layout: str) -> Work:
    """The work of a ring of `size` ranks for a pattern that has a closed form.

    Those are `Full`, `Causal`, `SlidingWindow`, `Sinks`, `GlobalTokens` and `Longformer` with the
    first tokens global, joined by `|`, or by `&` among each other; and `Blockwise`, `Documents` and
    `Strided` alone. A stride's pairs, and a dilation's, are estimates: the mean over the stride.

    Raises:
        ValueError: one sentence: another pattern, an unknown layout, a number out of range.

    >>> causal = work(Causal(), 1_048_576, 1024, "zigzag")
    >>> causal.imbalance, float(causal.sent.mean() / (1023 * 1024))
    (0.0, 0.75)
    >>> work(SlidingWindow(4096), 1_048_576, 128, "contiguous").rounds[1].received
    4095
    """
    for name, value, most in (("n", n, MOST_TOKENS), ("size", size, MOST_RANKS)):
        if not 1 <= value <= most:
            raise ValueError(f"work: {name} is {value}; a whole number from 1 to {most} is allowed")
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known; allowed are {', '.join(LAYOUTS)}")
    if layout == "striped":
        return _striped(pattern, n, size)
    each = 2 if layout == "zigzag" else 1
    grid = _Grid(-(-n // (each * size)), each * size, each)
    match pattern:
        case Strided(window, stride):
            near, far = _counts(grid, [_Term(0, window)]), _counts(grid, [_Term(0)])
            pairs, needs = near + (far - near) // stride, _needs(grid, [_Term(0)])
            # Shards shorter than a stride see but some of each other's keys.
            inside = _needs(grid, [_Term(0, window)])
            needs = inside + (needs - inside) * min(grid.width * each, stride) // stride
            return _folded(grid, pairs, needs, stride == 1)
        case SlidingWindow(window, include, dilation, right) if dilation > 1:
            least, end = (-right, window) if include else (1, window + 1)
            reach = _Term(least * dilation, (end - 1) * dilation + 1)
            # As wide as `end - least` strides, of which each holds one key.
            band = _Term(least * dilation, end * dilation)
            return _folded(grid, _counts(grid, [band]) // dilation, _needs(grid, [reach]), False)
        case Blockwise(block, before, causal):
            bounds = np.arange(0, grid.n + 2 * block, block)
            return _blocks(grid, bounds, causal, before)
        case Documents(lengths, causal):
            bounds = np.array([0, *accumulate(lengths)])
            return _blocks(grid, bounds, causal, False)
    terms = _terms(pattern)
    if len(terms) > _TERMS:
        raise _no_form(pattern)
    return _folded(grid, _counts(grid, terms), _needs(grid, terms), True)


def works(pattern: Pattern, n: int, layout: str) -> Callable[[int], Work]:
    """`work` for each size of a ring, each made once."""
    made: dict[int, Work] = {}

    def of(size: int) -> Work:
        if size not in made:
            made[size] = work(pattern, n, size, layout)
        return made[size]

    return of


def sees_ahead(pattern: Pattern) -> bool:
    """Whether some query sees a later key, of a pattern made of bands.

    Raises:
        ValueError: the pattern has another form.

    >>> sees_ahead(SlidingWindow(4) | Sinks(2)), sees_ahead(SlidingWindow(4, right=1) & Causal())
    (False, False)
    >>> sees_ahead(Longformer(4, 2, right=3))
    True
    """
    # Of token 0 alone nothing lies ahead.
    return any(term.least < 0 and term.keys > 1 for term in _terms(pattern))


@dataclass(frozen=True)
class _Term:
    """`least <= i - j < end`, queries before `queries`, keys before `keys`."""

    least: int = -_FAR
    end: int = _FAR
    queries: int = _FAR
    keys: int = _FAR

    def __and__(self, other: _Term) -> _Term:
        return _Term(
            max(self.least, other.least),
            min(self.end, other.end),
            min(self.queries, other.queries),
            min(self.keys, other.keys),
        )


def _no_form(pattern: Pattern) -> ValueError:
    return ValueError(
        f"pattern {pattern} has no closed form here; allowed are Full, Causal, SlidingWindow, "
        "Sinks, GlobalTokens and Longformer with the first tokens global, joined by | and &, and "
        "Blockwise, Documents or Strided alone"
    )


def _terms(pattern: Pattern) -> list[_Term]:
    """Rectangles with a band, whose union is the pattern."""
    match pattern:
        case Full():
            return [_Term()]
        case Causal():
            return [_Term(0)]
        case SlidingWindow(window, include, 1, right):
            return [_Term(-right, window) if include else _Term(1, window + 1)]
        case Sinks(sinks):
            return [_Term(0, keys=sinks)] if sinks else []
        case GlobalTokens(tokens, causal) if isinstance(tokens, int):
            least = 0 if causal else -_FAR
            return [_Term(least, keys=tokens), _Term(least, queries=tokens)] if tokens else []
        case Longformer(window, tokens, right) if isinstance(tokens, int):
            return [_Term(-right, window), *_terms(GlobalTokens(tokens, not right))]
        case Or(left, right):
            return [*_terms(left), *_terms(right)]
        case And(left, right):
            both = [a & b for a in _terms(left) for b in _terms(right)]
            return [term for term in both if term.least < term.end]
    raise _no_form(pattern)


@dataclass(frozen=True)
class _Grid:
    """`chunks` chunks of `width` tokens, of which each rank holds `each`."""

    width: int
    chunks: int
    each: int

    @property
    def n(self) -> int:
        return self.width * self.chunks

    @property
    def ranks(self) -> int:
        return self.chunks // self.each

    def held(self) -> list[Table]:
        """For each rank its first chunk, and its second where it has two."""
        first = np.arange(self.ranks)
        return [first] if self.each == 1 else [first, self.chunks - 1 - first]

    def fold(self, table: Table) -> Table:
        """Columns of chunks to columns of ranks."""
        if self.each == 1:
            return table
        return table[..., : self.ranks] + table[..., : self.ranks - 1 : -1]


def _folded(grid: _Grid, pairs: Table, needs: Table, exact: bool) -> Work:
    """From pairs of (chunk, chunk) and needs of (rank, chunk)."""
    by_rank = grid.fold(grid.fold(pairs).T).T
    return Work(grid.n, grid.ranks, by_rank, grid.fold(needs), exact)


def _below(t: Any) -> Any:
    """How many whole u, v >= 0 have u + v < t."""
    t = np.maximum(t, 0)
    return t * (t + 1) // 2


def _band(term: _Term, first: Any, queries: Any, start: Any, keys: Any) -> Any:
    """Pairs of the queries from `first` and the keys from `start`, so many each, in the band."""

    def closer(end: int) -> Any:
        t = np.clip(end - (first - start) + keys - 1, 0, queries + keys)
        return _below(t) - _below(t - queries) - _below(t - keys) + _below(t - queries - keys)

    return np.maximum(closer(term.end) - closer(term.least), 0)


def _counts(grid: _Grid, terms: Sequence[_Term]) -> Table:
    """`(chunks, chunks)`: pairs of the union of the terms."""
    c, m = grid.width, grid.chunks
    apart = np.arange(1 - m, m) * c
    by_distance = np.zeros(2 * m - 1, np.int64)  # all that terms without bounds depend on
    bounded = []
    for some in range(1, len(terms) + 1):
        for chosen in combinations(terms, some):
            term = chosen[0]
            for other in chosen[1:]:
                term = term & other
            sign = 1 if some % 2 else -1
            if term.queries == term.keys == _FAR:
                by_distance += sign * _band(term, apart, c, 0, c)
            else:
                bounded.append((sign, term))
    total = np.lib.stride_tricks.sliding_window_view(by_distance, m)[:, ::-1]
    if bounded:
        total = total.copy()
    for sign, term in bounded:
        rows, columns = (min(m, -(-x // c)) for x in (term.queries, term.keys))
        first, start = np.arange(rows)[:, None] * c, np.arange(columns)[None] * c
        queries, keys = np.minimum(c, term.queries - first), np.minimum(c, term.keys - start)
        total[:rows, :columns] += sign * _band(term, first, queries, start, keys)
    return total


def _needs(grid: _Grid, terms: Sequence[_Term]) -> Table:
    """`(ranks, chunks)`: keys that a rank needs of a chunk."""
    ranks, chunks = np.arange(grid.ranks), np.arange(grid.chunks)
    wide = [term for term in terms if term.queries == term.keys == _FAR]
    total = _needed(grid, wide, ranks, chunks)
    rows = max((-(-t.queries // grid.width) for t in terms if t.queries < _FAR), default=0)
    columns = max((-(-t.keys // grid.width) for t in terms if t.keys < _FAR), default=0)
    if columns:
        total[:, :columns] = _needed(grid, terms, ranks, chunks[:columns])
    if rows:
        holds = np.any([chunk < rows for chunk in grid.held()], 0)
        total[holds] = _needed(grid, terms, ranks[holds], chunks)
    return total


def _needed(grid: _Grid, terms: Sequence[_Term], ranks: Table, chunks: Table) -> Table:
    c = grid.width
    low, high = chunks[None] * c, (chunks[None] + 1) * c
    spans = []
    for held in grid.held():
        for term in terms:
            first = held[ranks][:, None] * c
            last = np.minimum(first + c, term.queries) - 1
            start = np.maximum(first - term.end + 1, low)
            stop = np.minimum(last - term.least + 1, np.minimum(high, term.keys))
            spans.append((start, np.where(last >= first, stop, 0)))
    return _covered(spans, (len(ranks), len(chunks)))


def _covered(spans: Sequence[tuple[Table, Table]], shape: tuple[int, int]) -> Table:
    """How many keys lie in any of the ranges; those that end before they start are empty."""
    if len(spans) <= 2:
        total = np.zeros(shape, np.int64)
        for start, stop in spans:
            total += np.maximum(stop - start, 0)
        if len(spans) == 2:
            (a, b), (c, d) = spans
            total -= np.maximum(np.minimum(b, d) - np.maximum(a, c), 0)
        return total
    starts = np.stack([np.broadcast_to(start, shape) for start, _ in spans])
    stops = np.stack([np.broadcast_to(stop, shape) for _, stop in spans])
    starts = np.minimum(starts, stops)
    order = starts.argsort(0)
    starts, stops = np.take_along_axis(starts, order, 0), np.take_along_axis(stops, order, 0)
    reach = np.maximum.accumulate(stops, 0)
    starts[1:] = np.maximum(starts[1:], reach[:-1])
    return np.maximum(stops - starts, 0).sum(0)


def _blocks(grid: _Grid, bounds: Table, causal: bool, before: bool) -> Work:
    """Blocks with edges at `bounds`; with `before` all have one length."""
    lengths = np.diff(bounds)
    edges = np.arange(grid.chunks + 1) * grid.width
    pairs = np.diff(np.diff(_block_pairs(edges, bounds, causal), axis=0), axis=1)
    if before:
        pairs += _before_pairs(grid, int(lengths[0]))

    chunks = np.arange(grid.chunks)
    low, high = chunks[None] * grid.width, (chunks[None] + 1) * grid.width
    spans = []
    for held in grid.held():
        first = held[:, None] * grid.width
        last = np.minimum(first + grid.width, bounds[-1]) - 1
        mine = np.clip(np.searchsorted(bounds, first, side="right") - 1, 0, len(lengths) - 1)
        theirs = np.clip(np.searchsorted(bounds, last, side="right") - 1, 0, len(lengths) - 1)
        start = bounds[np.maximum(mine - 1, 0) if before else mine]
        stop = last + 1 if causal else bounds[theirs + 1]
        spans.append((np.maximum(start, low), np.where(last >= first, np.minimum(stop, high), 0)))
    needs = _covered(spans, (grid.ranks, grid.chunks))
    return _folded(grid, pairs, needs, True)


def _block_pairs(edges: Table, bounds: Table, causal: bool) -> Table:
    """`(edges, edges)`: pairs within blocks, of the queries before an edge and the keys before one.

    Of the blocks before the lower edge all pairs count, of the block that it cuts a corner.
    """
    lengths = np.diff(bounds)
    whole = _below(lengths) if causal else lengths**2
    done = np.concatenate((np.zeros(1, np.int64), whole.cumsum()))
    block = np.searchsorted(bounds, edges, side="right") - 1
    start, end = bounds[block], bounds[np.minimum(block + 1, len(lengths))]
    keys = np.minimum(edges, end) - start
    if not causal:
        lower = np.minimum(edges[:, None], end) - start
        lower *= keys
        lower += done[block]
        return np.where(edges[:, None] >= edges, lower, lower.T)
    more = np.minimum(edges[:, None], end) - np.minimum(edges, end)
    np.maximum(more, 0, out=more)
    more *= keys
    more += done[block] + _below(keys)
    # Keys past the last query add nothing.
    return np.where(edges[:, None] >= edges, more, more.diagonal()[:, None])


def _before_pairs(grid: _Grid, size: int) -> Table:
    """`(chunks, chunks)`: pairs whose key lies in the block before the query's."""

    def below(x: Table, y: Table) -> Table:
        def part(block: Table) -> Table:
            queries = np.clip(x - block * size, 0, size)
            return queries * np.clip(y - (block - 1) * size, 0, size)

        # Blocks 1 to `whole` are whole on both sides; of the next two a side at least is cut.
        whole = np.maximum(np.minimum(x // size - 1, y // size), 0)
        return whole * size**2 + part(whole + 1) + part(whole + 2)

    c, m = grid.width, grid.chunks
    pairs = np.zeros((m, m), np.int64)
    for apart in range(min(m - 1, -(-2 * size // c)) + 1):
        keys = np.arange(m - apart)
        x, y = (keys + apart) * c, keys * c
        count = below(x + c, y + c) - below(x, y + c) - below(x + c, y) + below(x, y)
        pairs[keys + apart, keys] = count
    return pairs


def _striped(pattern: Pattern, n: int, size: int) -> Work:
    """Rank r holds every `size`-th token from r on."""
    c = -(-n // size)
    r, s = np.arange(size)[:, None], np.arange(size)[None]
    match pattern:
        case Causal():
            pairs = np.where(s <= r, c * (c + 1) // 2, c * (c - 1) // 2)
            needs = np.where(s <= r, c, c - 1)
        case Full():
            pairs, needs = np.full((size, size), c * c), np.full((size, size), c)
        case _:
            raise ValueError(
                f"layout striped has pattern {pattern}; Causal() and Full() are allowed, as "
                "under others every rank needs keys of every other all the same"
            )
    return Work(c * size, size, pairs.astype(np.int64), needs.astype(np.int64))
