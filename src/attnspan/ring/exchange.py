"""What the ranks of a ring send each other, derived from the pattern and from who holds what.

Every rank knows which keys every rank needs, so sizes are never asked for. In step t of N - 1, rank
r sends to rank r + t what that rank needs of it, and receives from rank r - t. Steps in which
nobody needs anything don't take place; small ones share a round, so that a window with sinks takes
one round however many ranks there are. Nothing that no query sees is sent, or computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnspan.patterns import Full, Pattern, pairs
from attnspan.patterns.atoms import Distance, Stride, atoms
from attnspan.patterns.placed import placed
from attnspan.patterns.tiles import seen
from attnspan.ring.layout import Chunk

Holding = tuple[Chunk, ...]
_ROWS = 4096  # looked at together


@dataclass(frozen=True)
class Piece:
    """The rows `start <= t < stop` of the shard of rank `source`; they lie in one chunk."""

    source: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Call:
    """One attention: some rows of a rank's queries over one piece of keys.

    Attributes:
        piece: which of the round's pieces.
        start: first row of the shard whose query takes part.
        stop: the row after the last.
        pattern: what they see, with `q_offset` as in `attnspan.attention`.
        q_offset: see pattern.
        pairs: how many pairs that are.
    """

    piece: int
    start: int
    stop: int
    pattern: Pattern
    q_offset: int
    pairs: int


@dataclass(frozen=True)
class Round:
    """What one rank sends, receives and computes at once.

    Attributes:
        receives: pieces of others, by source.
        sends: for each peer, the pieces of the rank's own shard.
        calls: what is computed of `receives`.
    """

    receives: tuple[Piece, ...]
    sends: tuple[tuple[int, tuple[Piece, ...]], ...]
    calls: tuple[Call, ...]

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.receives)


@dataclass(frozen=True)
class Exchange:
    """All that one rank does.

    Attributes:
        local: what it computes of its own shard; `receives` are its own chunks.
        rounds: the exchanges, the same number on all ranks.
        largest: the most tokens that any rank receives, or sends, in a round.
    """

    local: Round
    rounds: tuple[Round, ...]
    largest: int

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that the rank computes."""
        return sum(call.pairs for each in (self.local, *self.rounds) for call in each.calls)

    @property
    def received(self) -> int:
        """Tokens whose keys and values come from other ranks."""
        return sum(each.tokens for each in self.rounds)

    @property
    def sent(self) -> int:
        """Tokens whose keys and values go to others, counted for each rank that they go to."""
        return sum(p.tokens for each in self.rounds for _, some in each.sends for p in some)


def check_layout(pattern: Pattern, holdings: Sequence[Holding], by: str) -> None:
    """Refuses shards of every N-th token under a pattern that is near-sighted.

    Raises:
        ValueError: one sentence says why.
    """
    near = [
        atom
        for atom in atoms(pattern.rule())
        if isinstance(atom, Stride) or (isinstance(atom, Distance) and atom.end is not None)
    ]
    if near and len(holdings) > 1 and any(chunk.step > 1 for each in holdings for chunk in each):
        raise ValueError(
            f"{by}: layout is Striped() with {pattern}, whose window or stride would need keys of "
            "every rank for every query; Contiguous() or ZigZag() is allowed"
        )


@lru_cache(maxsize=64)
def plan_exchange(
    pattern: Pattern,
    n: int,
    holdings: tuple[Holding, ...],
    rank: int,
    schedule: Literal["ring", "allgather"] = "ring",
) -> Exchange:
    """What `rank` sends, receives and computes.

    Args:
        pattern: of the whole sequence.
        n: its tokens.
        holdings: for each rank the chunks of its shard, as a `Layout` gives them.
        rank: whose part is planned.
        schedule: "ring" keeps what a rank receives in a round to about a shard; "allgather" has
            one round.
    """
    world = len(holdings)
    needs = _needs(pattern, n, holdings)
    limit = max(chunk_tokens(each) for each in holdings) if schedule == "ring" else n * world
    rounds = []
    for steps in _grouped(needs, limit):
        sources = [(rank - t) % world for t in steps]
        pieces = tuple(piece for s in sorted(sources) for piece in needs[rank][s])
        peers = sorted((rank + t) % world for t in steps)
        sends = tuple((peer, needs[peer][rank]) for peer in peers if needs[peer][rank])
        rounds.append(Round(pieces, sends, _calls(pattern, n, holdings, rank, pieces)))
    own = tuple(Piece(rank, start, stop) for start, stop, _ in _chunks(holdings[rank]))
    local = Round(own, (), _calls(pattern, n, holdings, rank, own))
    largest = max((_tokens(needs, steps) for steps in _grouped(needs, limit)), default=0)
    return Exchange(local, tuple(rounds), largest)


def chunk_tokens(holding: Holding) -> int:
    """How many tokens a shard has."""
    return sum(chunk.length for chunk in holding)


def _chunks(holding: Holding) -> list[tuple[int, int, Chunk]]:
    """A shard's chunks, with their first row and the row after their last."""
    found, row = [], 0
    for chunk in holding:
        found.append((row, row + chunk.length, chunk))
        row += chunk.length
    return found


@lru_cache(maxsize=16)
def _needs(
    pattern: Pattern, n: int, holdings: tuple[Holding, ...]
) -> tuple[tuple[tuple[Piece, ...], ...], ...]:
    """`[rank][source]`: what the queries of `rank` see of the shard of another."""
    found = []
    for rank, holding in enumerate(holdings):
        places = np.concatenate([chunk.positions for chunk in holding])
        held = seen(pattern, places, n)
        found.append(
            tuple(
                () if source == rank else tuple(_pieces(source, other, held))
                for source, other in enumerate(holdings)
            )
        )
    return tuple(found)


def _pieces(source: int, holding: Holding, held: NDArray[np.bool_]) -> list[Piece]:
    found = []
    for row, _, chunk in _chunks(holding):
        part = np.zeros(chunk.length + 2, np.int8)
        part[1:-1] = held[chunk.start : chunk.start + chunk.length * chunk.step : chunk.step]
        turns = np.flatnonzero(np.diff(part)).reshape(-1, 2).tolist()
        found += [Piece(source, row + start, row + stop) for start, stop in turns]
    return found


def _tokens(needs: tuple[tuple[tuple[Piece, ...], ...], ...], steps: Sequence[int]) -> int:
    """The most tokens that any rank receives, or sends, in these steps."""
    world = len(needs)
    ways = [(rank, (rank - t) % world) for t in steps for rank in range(world)]
    came, went = [0] * world, [0] * world
    for rank, source in ways:
        tokens = sum(piece.tokens for piece in needs[rank][source])
        came[rank] += tokens
        went[source] += tokens
    return max(*came, *went)


def _grouped(
    needs: tuple[tuple[tuple[Piece, ...], ...], ...], limit: int
) -> tuple[tuple[int, ...], ...]:
    """The steps that take place, those that fit into `limit` tokens together."""
    groups: list[list[int]] = []
    for step in range(1, len(needs)):
        if not _tokens(needs, (step,)):
            continue
        if groups and _tokens(needs, (*groups[-1], step)) <= limit:
            groups[-1].append(step)
        else:
            groups.append([step])
    return tuple(map(tuple, groups))


def _calls(
    pattern: Pattern, n: int, holdings: tuple[Holding, ...], rank: int, pieces: Sequence[Piece]
) -> tuple[Call, ...]:
    found = []
    for index, piece in enumerate(pieces):
        row, _, chunk = next(x for x in _chunks(holdings[piece.source]) if x[1] > piece.start)
        k_start = chunk.start + (piece.start - row) * chunk.step
        for start, _, mine in _chunks(holdings[rank]):
            part, offset = placed(pattern, mine.start, k_start, mine.step)
            rows = _rows(part, mine.length, piece.tokens, offset)
            if rows is None:
                continue
            first, last = rows
            part, offset = placed(pattern, mine.start + first * mine.step, k_start, mine.step)
            count = pairs(part, last - first, piece.tokens, offset)
            if count == (last - first) * piece.tokens:
                part, offset = Full(), 0
            if count:
                found.append(Call(index, start + first, start + last, part, offset, count))
    return tuple(found)


def _rows(part: Pattern, n: int, m: int, offset: int) -> tuple[int, int] | None:
    """From which row to which queries see something of the keys; None where none does."""
    first, last = n, 0
    for start in range(0, n, _ROWS):
        places = np.arange(start, min(start + _ROWS, n), dtype=np.int64) + offset
        (starts, stops), _ = part.spans(places, places, m)
        there = np.flatnonzero(np.broadcast_to((stops > starts).any(0), places.shape))
        if len(there):
            first, last = min(first, start + int(there[0])), start + int(there[-1]) + 1
    return (first, last) if last else None
