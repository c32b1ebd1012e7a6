"""Which work items the Hopper backward does, in which order, and where it cuts them.

An item is a key tile of a KV head with all the query tiles that see it, in all of the KV head's
query heads. Its length is that of its list: a few keys that all queries see are one long item, and
where items are few or the last ones, some processors wait for others. Such items are cut into parts
by queries and by heads; what they sum up is added in the order of the parts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnspan.kernels.gpu_lists import Lists, Ranges

SLOT_BYTES = 4 * 2 * 128  # of sums of dK and dV, a channel
_SHORTEST = 24  # query tiles of a head: a part's start and end cost some three
_RUN = 32  # query tiles of a head that parts keep together, where there are as many


class Shape(NamedTuple):
    """What the items depend on beside the mask.

    Attributes:
        rows: queries of a tile.
        keys: keys of a tile.
        strips: sets of KV heads that are worked on one after the other, over the batch.
        side: KV heads of a strip.
        group: query heads of a KV head.
        processors: how many work at once.
        free: whether no tile of dQ waits for the place of another, so that strips may run at once.
    """

    rows: int
    keys: int
    strips: int
    side: int
    group: int
    processors: int
    free: bool


class Items(NamedTuple):
    """The items in their order.

    Attributes:
        table: int32 `(items, 8)`, on the device: the item `(strip * key tiles + key tile) * side +
            KV head of the strip`; its first query tile and its last + 1; its first query head and
            its last + 1, of the KV head's; the slot of its sums, -1 for a whole item; which part
            of how many it is.
        slots: how many items are cut.
    """

    table: Tensor
    slots: int


_made: WeakKeyDictionary[Lists, dict[Shape, Items]] = WeakKeyDictionary()


def items_of(lists: Lists, shape: Shape) -> Items:
    """The items of a problem, made once."""
    known = _made.setdefault(lists, {})
    if shape not in known:
        columns = lists.columns(shape.keys, shape.rows)
        table, slots = _table(columns, -(-lists.n // shape.rows), shape)
        known[shape] = Items(torch.from_numpy(table).to(lists.device), slots)
    return known[shape]


def _table(columns: Ranges, query_tiles: int, shape: Shape) -> tuple[NDArray[np.int32], int]:
    ptr, ranges = (x.cpu().numpy().astype(np.int64) for x in columns)
    key_tiles = len(ptr) - 1
    length = np.concatenate(([0], np.cumsum(ranges[:, 1] - ranges[:, 0])))[ptr]
    length = np.diff(length)
    order = np.arange(shape.strips * key_tiles * shape.side)
    if shape.free:
        # The items of a key tile one after the other: under a causal mask, from long to short.
        order = order.reshape(shape.strips, key_tiles, shape.side).transpose(1, 0, 2).ravel()
    tiles = order // shape.side % key_tiles
    steps = length[tiles] * shape.group
    cuts = _cuts(steps, shape)
    table = np.zeros((len(order), 8), np.int32)
    table[:, 0], table[:, 2], table[:, 4], table[:, 5] = order, query_tiles, shape.group, -1
    table[:, 7] = 1
    pieces, last, known = [], 0, {}
    chosen = np.flatnonzero(cuts > 1)
    slot = 0
    for i in chosen.tolist():
        key = int(tiles[i]), int(cuts[i])
        if key not in known:
            tile = key[0]
            seen = ranges[ptr[tile] : ptr[tile + 1], :2]
            known[key] = _parts(seen, shape.group, key[1])
        parts = known[key]
        if len(parts) == 1:
            continue
        rows = np.repeat(table[i : i + 1], len(parts), 0)
        rows[:, 1:5], rows[:, 5] = parts, slot
        rows[:, 6], rows[:, 7] = np.arange(len(parts)), len(parts)
        pieces += [table[last:i], rows]
        last, slot = i + 1, slot + 1
    return np.concatenate([*pieces, table[last:]]), slot


def _cuts(steps: NDArray[np.int64], shape: Shape) -> NDArray[np.int64]:
    """Into how many parts each item is to be cut."""
    used = steps[steps > 0]
    if not len(used):
        return np.ones_like(steps)
    common = float(np.median(used))
    # What each processor still has to do when an item is begun, and does in a strip.
    left = np.cumsum(steps[::-1])[::-1] / shape.processors
    strip = left[0] if shape.free else left[0] / shape.strips
    # Twice that is still no length to wait for, since the next item is likely to be begun while
    # others are in the midst of theirs; and it leaves few items to be cut.
    most = np.maximum(2 * left, max(common / 8, _SHORTEST))
    if shape.free:
        # From long to short, the short ones fill the gaps.
        most = np.where(steps < common, np.inf, most)
    # One that all queries see starts a strip: its dQ is waited for by the strip after the next.
    most = np.minimum(most, np.maximum(2 * common, np.minimum(strip, left / 2)))
    return np.ceil(steps / np.maximum(most, _SHORTEST)).astype(np.int64)


def _parts(seen: NDArray[np.int64], group: int, count: int) -> NDArray[np.int64]:
    """About `count` parts of an item: first and last query tile, first and last head of each.

    Args:
        seen: `(ranges, 2)`: first query tile and last + 1 of each range.
        group: query heads.
        count: parts that are asked for.
    """
    tiles = np.concatenate([np.arange(a, b) for a, b in seen])
    by_query = min(count, max(1, len(tiles) // _RUN))
    wanted = -(-count // by_query)
    by_head = next((x for x in range(1, group + 1) if group % x == 0 and x >= wanted), group)
    if by_head * by_query < count:
        by_query = max(by_query, min(count // by_head, len(tiles) // (_SHORTEST // 2)))
    edges = np.arange(by_query + 1) * len(tiles) // by_query
    heads = group // by_head
    return np.array(
        [
            (tiles[a], tiles[b - 1] + 1, h, h + heads)
            for h in range(0, group, heads)
            for a, b in pairwise(edges)
        ]
    )
