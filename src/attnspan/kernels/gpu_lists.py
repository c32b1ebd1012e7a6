"""Masks as GPU kernels take them: the ranges of keys that each query sees, and lists of tiles.

A dense problem's mask is `low` and `high`, int32 `(K, n)`: row i sees key j iff `low[k, i] <= j <
high[k, i]` for some k. The ranges of a row are disjoint and rise; one that is not used is empty, 0
to 0. So a mask costs `8 * K` bytes a row, whatever the pattern, and a test of a pair is K pairs of
compares. What a kernel walks over are lists of tiles, made from these ranges on the host:

- `Lists.rows`: for each tile of queries, the ranges of key tiles that it touches;
- `Lists.columns`: for each tile of keys, the ranges of query tiles that touch it;
- `Lists.walk`: for each tile of queries, blocks of keys that need not lie on a grid.

Lists are made once for a pattern and lengths, kept in the object, and copied to the device then:
call the kernel once before a CUDA graph captures it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnspan.patterns.atoms import Stride, atoms
from attnspan.patterns.tiles import Tiles

MOST_RANGES = 4
WALK_COLUMNS = 16
_ROWS = 16384  # at a time: what stands in between stays small
_FAR = 2**31 - 1

Ints = NDArray[np.int64]


class Unlisted(ValueError):
    """A mask that has no lists: a row sees more than `MOST_RANGES` ranges, or it has strides."""


class Ranges(NamedTuple):
    """Ranges of tiles, by tile.

    Attributes:
        ptr: int32 `(tiles + 1,)`: tile t has `items[ptr[t] : ptr[t + 1]]`.
        items: int32 `(ranges, 4)`: first tile, last tile + 1, first full tile, last full tile + 1
            of each range; ranges are disjoint and rise, the full part lies within and may be empty.
            Every pair of a full tile is seen. One outside of the full part may turn out full or
            empty all the same.
    """

    ptr: Tensor
    items: Tensor


class Walk(NamedTuple):
    """Blocks of keys for each tile of queries, by where they start.

    A block may start anywhere, before key 0 and up to m as well. No key that a query of the tile
    sees lies in two of its blocks, and none in no block; pairs of a block that is not full are seen
    where `low` and `high` say so.

    Attributes:
        table: int32, `tiles` and then `masked`, which are views of it.
        tiles: int32 `(tiles, 16)`, those with the most blocks first. The columns of a tile:
            0: its first query;
            1: where its chunk starts, a block of `chunk` keys, not full;
            2, 3: where its first block starts, and 1 if that is not full, else 0;
            4, 5: start of its first run of full blocks, and how many; each lies before the last;
            6, 7: a second such run;
            8, 9: its other blocks are `masked[first : first + count]`;
            the rest is padding, to whole sectors of memory.
        masked: int32 `(blocks,)`: starts of blocks that are not full.
        longest: how many tiles have at least nine tenths of the blocks that the first one has.
    """

    table: Tensor
    tiles: Tensor
    masked: Tensor
    longest: int


class _Hulls(NamedTuple):
    """Ranges of keys for each tile of queries, `(ranges, tiles)`: some query sees only keys within
    `low <= j < high`, every query sees those of `full_low <= j < full_high`."""

    low: Ints
    high: Ints
    full_low: Ints
    full_high: Ints


class Lists:
    """The mask of one dense problem, on a device.

    Attributes:
        n: queries.
        m: keys.
        low: int32 `(K, n)`, with `high`: row i sees key j iff `low[k, i] <= j < high[k, i]` for
            some k. Empty ranges come first: the last range of a row is its furthest one.
        high: see low.
        bounds: int32 `(2, K, n)`: low and high, which are views of it.

    >>> from attnspan.patterns import Sinks, SlidingWindow, plan
    >>> (only,) = plan(SlidingWindow(2) | Sinks(1), 4)
    >>> lists = Lists(only.jobs[0].tiles, "cpu")
    >>> lists.low.tolist(), lists.high.tolist()
    ([[0, 0, 0, 0], [0, 0, 0, 2]], [[0, 0, 0, 1], [1, 2, 3, 4]])
    """

    def __init__(self, tiles: Tiles, device: torch.device | str) -> None:
        """Lists of the mask `tiles.rule`.

        Raises:
            Unlisted: a row sees more than `MOST_RANGES` ranges of keys; or the rule has strides,
                which a plan leaves in a job where keys off the stride are what is seen.
        """
        if any(isinstance(atom, Stride) for atom in atoms(tiles.rule)):
            raise Unlisted("queries see all keys but every so many")
        low, high = _row_ranges(tiles)
        self.n, self.m, self.device = tiles.n, tiles.m, torch.device(device)
        self.bounds = self._tensor(np.stack((low, high)))
        self.low, self.high = self.bounds
        self._host = low, high
        self._made: dict[tuple[str, int, int, int], Ranges | Walk] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on the device, with the lists made so far."""
        made = [x[:1] if isinstance(x, Walk) else x for x in self._made.values()]
        return sum(x.nbytes for x in (self.bounds, *(x for lists in made for x in lists)))

    def rows(self, tile_q: int, tile_k: int) -> Ranges:
        """For each tile of `tile_q` queries the ranges of tiles of `tile_k` keys that it touches.

        A full tile has all its `tile_k` keys; of the queries of the last tile, those there are see
        them.
        """
        return self._ranges("rows", tile_q, tile_k)

    def columns(self, tile_k: int, tile_q: int) -> Ranges:
        """For each tile of `tile_k` keys the ranges of tiles of `tile_q` queries that touch it.

        A full tile has all its keys and all its queries.
        """
        return self._ranges("columns", tile_q, tile_k)

    def walk(self, tile_q: int, block: int, chunk: int) -> Walk:
        """For each tile of `tile_q` queries, blocks of `block` keys and one of `chunk` keys.

        Blocks are laid from where the full part ends, so a window of W keys costs a tile
        `tile_q + W - 1` keys, rounded up to blocks; and one remainder of up to `chunk` keys, for a
        window that on its right edge, goes to the chunk.
        """
        key = "walk", tile_q, block, chunk
        if key not in self._made:
            tiles, masked, longest = _walk(_hulls(*self._host, tile_q), tile_q, block, chunk)
            table = self._tensor(np.concatenate((tiles.ravel(), masked)))
            self._made[key] = Walk(
                table, table[: tiles.size].view(tiles.shape), table[tiles.size :], longest
            )
        made = self._made[key]
        assert isinstance(made, Walk)
        return made

    def _ranges(self, kind: str, tile_q: int, tile_k: int) -> Ranges:
        key = kind, tile_q, tile_k, 0
        if key not in self._made:
            hulls = _on_grid(_hulls(*self._host, tile_q), tile_k)
            if kind == "rows":
                made = _by_row(hulls)
            else:
                made = _by_column(hulls, self.n // tile_q, -(-self.m // tile_k))
            self._made[key] = Ranges(*map(self._tensor, made))
        made = self._made[key]
        assert isinstance(made, Ranges)
        return made

    def _tensor(self, x: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, np.int32)).to(self.device)


def _row_ranges(tiles: Tiles) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    parts = []
    for start in range(0, tiles.n, _ROWS):
        places = np.arange(start, min(start + _ROWS, tiles.n), dtype=np.int64) + tiles.offset
        (low, high), _ = tiles.rule.spans(places, places, tiles.m)
        used = high > low
        most = int(used.sum(0).max())
        if most > MOST_RANGES:
            raise Unlisted(f"a query sees {most} ranges of keys, not up to {MOST_RANGES}")
        low, high = np.where(used, low, 0), np.where(used, high, 0)
        # Empty ranges first, so that in neighbouring rows a window has the same index.
        order = np.argsort(used, axis=0, kind="stable")[len(used) - max(1, most) :]
        pair = [np.take_along_axis(x, order, 0).astype(np.int32) for x in (low, high)]
        parts.append([np.broadcast_to(x, (len(x), len(places))) for x in pair])
    count = max((len(low) for low, _ in parts), default=1)
    none = np.zeros((count, 0), np.int32)
    low, high = (
        np.concatenate(
            [none, *(np.pad(part[k], ((count - len(part[k]), 0), (0, 0))) for part in parts)], 1
        )
        for k in range(2)
    )
    return low, high


def _hulls(low: NDArray[np.int32], high: NDArray[np.int32], tile_q: int) -> _Hulls:
    starts = np.arange(0, low.shape[1], tile_q)
    if not len(starts):
        return _Hulls(*(np.zeros((len(low), 0), np.int64) for _ in range(4)))
    used = high > low
    low = np.where(used, low, _FAR)
    return _Hulls(
        *(
            f.reduceat(x, starts, axis=1).astype(np.int64)
            for f, x in (
                (np.minimum, low),
                (np.maximum, high),
                (np.maximum, low),
                (np.minimum, high),
            )
        )
    )


def _merged(hulls: _Hulls, gap: int) -> _Hulls:
    """Hulls in rising order, at least `gap` apart; those that were nearer are one.

    Of several full parts in one hull the longest stays.
    """
    order = np.argsort(hulls.low, axis=0, kind="stable")
    given = _Hulls(*(np.take_along_axis(x, order, 0) for x in hulls))
    low, high, full_low, full_high = (np.zeros_like(given.low) for _ in range(4))
    low[:] = _FAR
    last = np.full(given.low.shape[1], -1)
    for a, b, x, y in zip(*given, strict=True):
        used = a < b
        (at,) = np.nonzero(used & (last >= 0))
        at = at[a[at] - high[last[at], at] < gap]
        joins = np.zeros_like(used)
        joins[at] = True
        (new,) = np.nonzero(used & ~joins)
        last[new] += 1
        low[last[new], new], high[last[new], new] = a[new], b[new]
        full_low[last[new], new], full_high[last[new], new] = x[new], y[new]
        high[last[at], at] = np.maximum(high[last[at], at], b[at])
        at = at[y[at] - x[at] > full_high[last[at], at] - full_low[last[at], at]]
        full_low[last[at], at], full_high[last[at], at] = x[at], y[at]
    return _Hulls(low, high, full_low, full_high)


def _on_grid(hulls: _Hulls, tile_k: int) -> _Hulls:
    """Hulls in tiles instead of keys; those with no full tile have a full part from `low` to `low`.

    A last tile of fewer keys is never full: its missing keys are none that anybody sees.
    """
    low, high = hulls.low // tile_k, -(-hulls.high // tile_k)
    full_low, full_high = -(-hulls.full_low // tile_k), hulls.full_high // tile_k
    merged = _merged(_Hulls(low, np.where(hulls.high > hulls.low, high, 0), full_low, full_high), 0)
    full = merged.full_high > merged.full_low
    return merged._replace(
        full_low=np.where(full, merged.full_low, merged.low),
        full_high=np.where(full, merged.full_high, merged.low),
    )


def _by_row(hulls: _Hulls) -> tuple[Ints, Ints]:
    used = (hulls.high > hulls.low).T
    items = np.stack([x.T[used] for x in hulls], -1)
    return _ptr(used.sum(1)), items


def _by_column(hulls: _Hulls, whole_rows: int, columns: int) -> tuple[Ints, Ints]:
    """The transpose; only the first `whole_rows` tiles of queries can be full."""
    column, first, stop = _runs(hulls.low, hulls.high)
    full_low, full_high = hulls.full_low.copy(), hulls.full_high.copy()
    full_high[:, whole_rows:] = full_low[:, whole_rows:]
    full_column, full_first, full_stop = _runs(full_low, full_high)
    items = np.stack([first, stop, first, first], -1)
    # The run that a full run lies in: the last of its column that starts at or before it.
    rows = hulls.low.shape[1] + 1
    owner = np.searchsorted(column * rows + first, full_column * rows + full_first, "right") - 1
    # In rising order of length, the longest last: it overwrites the others.
    order = np.argsort(full_stop - full_first, kind="stable")
    items[owner[order], 2] = full_first[order]
    items[owner[order], 3] = full_stop[order]
    return _ptr(np.bincount(column, minlength=columns)), items


def _runs(low: Ints, high: Ints) -> tuple[Ints, Ints, Ints]:
    """From each row's ranges of columns, the runs of rows in each column: (column, first, stop).

    A run starts where a row has a column that the row before hasn't, and stops where the next row
    has it no more. So the differences of neighbouring rows are enough, and time and memory follow
    the runs that come out, not the pairs of rows and columns.
    """
    nothing = np.zeros((len(low), 1), np.int64)
    before = np.concatenate((nothing, low), 1), np.concatenate((nothing, high), 1)
    after = np.concatenate((low, nothing), 1), np.concatenate((high, nothing), 1)
    column, first = _expanded(*_difference(*after, *before))
    same, stop = _expanded(*_difference(*before, *after))
    assert np.array_equal(column, same)
    return column, first, stop


def _difference(low: Ints, high: Ints, other_low: Ints, other_high: Ints) -> tuple[Ints, Ints]:
    """What lies in the first ranges and in none of the others, row by row; those rise."""
    used = other_high > other_low
    # The holes between the other ranges; an empty range leaves an empty hole.
    edge = np.zeros((1, low.shape[1]), np.int64)
    stops = np.maximum.accumulate(np.where(used, other_high, 0), 0)
    hole_low = np.concatenate((edge, stops))
    hole_high = np.concatenate((np.where(used, other_low, stops), edge + _FAR))
    a = np.maximum(low[:, None], hole_low[None]).reshape(-1, low.shape[1])
    b = np.minimum(high[:, None], hole_high[None]).reshape(-1, low.shape[1])
    return a, b


def _expanded(low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """Every (column, row) of each row's ranges of columns, by column, then row."""
    counts = np.maximum(high - low, 0).ravel()
    total = int(counts.sum())
    within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    column = np.repeat(low.ravel(), counts) + within
    row = np.repeat(np.broadcast_to(np.arange(low.shape[1]), low.shape).ravel(), counts)
    order = np.lexsort((row, column))
    return column[order], row[order]


def _walk(hulls: _Hulls, tile_q: int, block: int, chunk: int) -> tuple[Ints, Ints, int]:
    # Hulls a block apart: what a block covers beyond the end of one lies in no other.
    a, b, x, y = _merged(hulls, block)
    count, tiles = a.shape
    every = np.arange(tiles)
    used = a < b
    full = np.where(used, np.maximum(y - x, 0) // block, 0)
    # Two runs of full blocks have a place in the table: the longest.
    if count > 2:
        rank = np.argsort(np.argsort(-full, axis=0, kind="stable"), axis=0)
        full = np.where(rank < 2, full, 0)
    # The rest of a hull: left of its full blocks, and right of them; all where there are none.
    left_low = np.where(used, a, 0)
    left_high = np.where(full > 0, y - full * block, left_low)
    right_low = np.where(full > 0, y, left_low)
    right_high = np.where(used, b, 0)
    seen_by_all = used & (y > x)

    chunk_start = np.full(tiles, -chunk)
    free = np.ones(tiles, bool)
    for k in reversed(range(count)):
        # The chunk ends where a hull ends: beyond that it covers nothing that anybody sees.
        for low, high, at_end in ((right_low, right_high, True), (left_low, left_high, False)):
            size = high[k] - low[k]
            rest = (size - 1) % block + 1
            takes = free & (size > 0) & (rest <= chunk)
            free &= ~takes
            if at_end:
                high[k] -= np.where(takes, rest, 0)
                chunk_start = np.where(takes, high[k], chunk_start)
            else:
                low[k] += np.where(takes, rest, 0)
                chunk_start = np.where(takes, low[k] - chunk, chunk_start)
    lefts, rights = -(-(left_high - left_low) // block), -(-(right_high - right_low) // block)
    left_first = left_high - lefts * block

    # The first block sets the softmax's reference. Sinks, which draw large scores, come first; then
    # the full block that is nearest; so that all rows see something there, where they can.
    first, first_masked = np.full(tiles, -block), np.ones(tiles, np.int64)
    open_ = np.ones(tiles, bool)
    full_first = y - block
    sinks = (used.sum(0) > 1) & seen_by_all[0]
    takes = sinks & (full[0] > 0)
    first = np.where(takes, y[0] - full[0] * block, first)
    first_masked[takes] = 0
    full[0] -= takes
    open_ &= ~takes
    takes = sinks & open_ & (rights[0] > 0)
    first = np.where(takes, right_low[0], first)
    right_low[0] += np.where(takes, block, 0)
    rights[0] -= takes
    open_ &= ~takes
    for k in reversed(range(count)):
        takes = open_ & (full[k] > 0)
        first = np.where(takes, full_first[k], first)
        first_masked[takes] = 0
        full_first[k] -= np.where(takes, block, 0)
        full[k] -= takes
        open_ &= ~takes
    for k in reversed(range(count)):
        takes = open_ & (rights[k] > 0)
        rights[k] -= takes
        first = np.where(takes, right_low[k] + rights[k] * block, first)
        open_ &= ~takes

    runs = np.argsort(-full, axis=0, kind="stable")[:2]
    run = [(full_first[k, every], full[k, every]) for k in runs]
    run += [(np.zeros(tiles, np.int64),) * 2] * (2 - len(run))
    owner, masked = _laid(
        np.concatenate((right_low, left_first)), np.concatenate((rights, lefts)), block
    )
    others = np.bincount(owner, minlength=tiles)
    table = np.stack(
        [
            every * tile_q,
            chunk_start,
            first,
            first_masked,
            *run[0],
            *run[1],
            np.cumsum(others) - others,
            others,
        ],
        -1,
    )
    table = np.pad(table, ((0, 0), (0, WALK_COLUMNS - table.shape[1])))
    # The longest first and of equals the last: a tail of short tiles leaves no processor idle.
    cost = full.sum(0) + others
    order = np.argsort(-cost[::-1], kind="stable")
    # With its first block, which the cost leaves out.
    longest = int((10 * (cost + 1) >= 9 * (cost.max(initial=0) + 1)).sum())
    return table[::-1][order], masked, longest


def _laid(starts: Ints, counts: Ints, block: int) -> tuple[Ints, Ints]:
    """(tile, start) of each block of runs `(runs, tiles)`, by tile."""
    flat = counts.ravel()
    within = np.arange(int(flat.sum())) - np.repeat(np.cumsum(flat) - flat, flat)
    start = np.repeat(starts.ravel(), flat) + within * block
    owner = np.repeat(np.broadcast_to(np.arange(counts.shape[1]), counts.shape).ravel(), flat)
    order = np.argsort(owner, kind="stable")
    return owner[order], start[order]


def _ptr(counts: Ints) -> Ints:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
