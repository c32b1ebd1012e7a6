"""One rank's part of a ring: what it computes while what it computes next is under way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from attnspan import partial
from attnspan.ring.exchange import Exchange, Piece, Round
from attnspan.ring.transport import Pending, Transport
from attnspan.ring.wire import Int8, Pair, Plain, Wire, as_bytes

Sources = Sequence[tuple[int, tuple[Piece, ...]]]


@dataclass(frozen=True)
class Task:
    """What the attention of one rank takes beside its tensors.

    Attributes:
        transport: carries bytes.
        ranks: for each rank of the plan, that of the transport.
        exchange: the plan.
        scale: factor of the scores.
        softcap: as in `attention`.
        impl: one of `partial.IMPLS`.
        wire: how keys and values travel: None, or "int8".
    """

    transport: Transport
    ranks: tuple[int, ...]
    exchange: Exchange
    scale: float
    softcap: float | None
    impl: str
    wire: str | None


@dataclass(frozen=True)
class _Arrived:
    """Keys and values of some heads that are here; `number` counts the rounds, the shard is 0."""

    number: int
    round: Round
    heads: slice
    pairs: list[Pair]


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """`out (batch, Hq, n, value_dim)` and `lse (batch, Hq, n)`, both in float32 or float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=wide)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    for here in _flow(k, v, task, "keys and values", behind=False):
        heads = slice(here.heads.start * group, here.heads.stop * group)
        for call in here.round.calls:
            rows = slice(call.start, call.stop)
            part, part_lse = partial.forward(
                q[:, heads, rows],
                *here.pairs[call.piece],
                call.pattern,
                call.q_offset,
                task.scale,
                task.softcap,
                task.impl,
            )
            partial.join(out[:, heads, rows], lse[:, heads, rows], part, part_lse.to(wide))
        del here  # whose buffers would else live on while the next ones come
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    task: Task,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the shard's q, k and v, in float32 or float64.

    Keys and values go round again; what they are owed goes straight back to their rank, one round
    behind, and is added up there.
    """
    wide = lse.dtype
    group = q.shape[1] // k.shape[1]
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    returns = _Returns(task, Plain(grad_k, grad_v))
    for here in _flow(k, v, task, "keys and values, for gradients", behind=True):
        heads = slice(here.heads.start * group, here.heads.stop * group)
        owed, buffers = returns.owed(here)
        for call in here.round.calls:
            rows = slice(call.start, call.stop)
            grads = partial.backward(
                grad_out[:, heads, rows],
                None if grad_lse is None else grad_lse[:, heads, rows],
                q[:, heads, rows],
                *here.pairs[call.piece],
                out[:, heads, rows],
                lse[:, heads, rows],
                call.pattern,
                call.q_offset,
                task.scale,
                task.softcap,
                task.impl,
            )
            into = grad_q[:, heads, rows], *owed[call.piece]
            for total, part in zip(into, grads, strict=True):
                total += part
        returns.send(here, buffers)
        del here, owed, buffers  # as in `forward`
    returns.finish()
    return grad_q, grad_k, grad_v


def slices(kv_heads: int, exchange: Exchange) -> tuple[slice, ...]:
    """Into how many runs of KV heads a round is cut, so that its buffers stay small: two, or one.

    Rounds of a small part of a shard, as those of a window, aren't cut: each costs a delay.
    """
    shard = sum(piece.tokens for piece in exchange.local.receives)
    if kv_heads % 2 or exchange.largest * 4 <= shard:
        return (slice(0, kv_heads),)
    half = kv_heads // 2
    return slice(0, half), slice(half, kv_heads)


def _flow(k: Tensor, v: Tensor, task: Task, step: str, behind: bool) -> Iterator[_Arrived]:
    """The rank's own keys and values, then each round's as it comes, while the next one travels.

    With `behind` half of its own comes last, so that something is left to do while the gradients of
    the last round are on their way.
    """
    exchange, runs = task.exchange, slices(k.shape[1], task.exchange)
    wire: Wire = Plain(k, v)
    if exchange.rounds and task.wire == "int8":
        wire = Int8(k, v, exchange.local.receives)
    posts = [(number, heads) for number in range(len(exchange.rounds)) for heads in runs]
    under_way = _post(wire, task, *posts[0], step) if posts else None
    local = _halves(k.shape[1], exchange.local)
    first = local[: len(local) // 2] if behind and posts else local
    for heads, part in first:
        yield _own(k, v, heads, part)
    for index, (number, heads) in enumerate(posts):
        assert under_way is not None
        pending, buffers = under_way
        under_way = _post(wire, task, *posts[index + 1], step) if index + 1 < len(posts) else None
        pending.wait()
        each = exchange.rounds[number]
        pairs = []
        for source, pieces in _by_source(each):
            pairs += wire.unpack(buffers[task.ranks[source]], pieces, heads)
        yield _Arrived(number + 1, each, heads, pairs)
        del pending, buffers, pairs
    for heads, part in local[len(first) :]:
        yield _own(k, v, heads, part)


def _halves(kv_heads: int, local: Round) -> list[tuple[slice, Round]]:
    """A shard's own work in two parts, by heads or else by chunks, where it can be parted."""
    if kv_heads % 2 == 0:
        half = kv_heads // 2
        return [(slice(0, half), local), (slice(half, kv_heads), local)]
    every, middle = slice(0, kv_heads), len(local.calls) // 2
    parts = local.calls[:middle], local.calls[middle:]
    return [(every, replace(local, calls=calls)) for calls in parts if calls]


def _own(k: Tensor, v: Tensor, heads: slice, part: Round) -> _Arrived:
    pieces = part.receives
    pairs = [(k[:, heads, p.start : p.stop], v[:, heads, p.start : p.stop]) for p in pieces]
    return _Arrived(0, part, heads, pairs)


def _post(
    wire: Wire, task: Task, number: int, heads: slice, step: str
) -> tuple[Pending, dict[int, Tensor]]:
    each = task.exchange.rounds[number]
    sends: dict[int, Tensor] = {}
    if each.sends:  # side by side in one buffer, so that a transport need not copy them
        packed = as_bytes([x for _, pieces in each.sends for x in wire.parts(pieces, heads)])
        sizes = [wire.size(pieces, heads) for _, pieces in each.sends]
        peers = (task.ranks[peer] for peer, _ in each.sends)
        sends = dict(zip(peers, packed.split(sizes), strict=True))
    sources = _by_source(each)
    buffers = _buffers(wire, [(task.ranks[s], pieces) for s, pieces in sources], heads)
    return task.transport.exchange(sends, buffers, f"round {number + 1} ({step})"), buffers


def _buffers(wire: Wire, coming: Sources, heads: slice) -> dict[int, Tensor]:
    """For each rank where what comes from it lands, side by side."""
    sizes = [wire.size(pieces, heads) for _, pieces in coming]
    whole = torch.empty(sum(sizes), dtype=torch.int8, device=wire.key.device)
    return dict(zip((rank for rank, _ in coming), whole.split(sizes), strict=True))


def _by_source(each: Round) -> Sources:
    grouped = groupby(each.receives, key=lambda piece: piece.source)
    return tuple((source, tuple(pieces)) for source, pieces in grouped)


class _Returns:
    """Gradients of keys and values on their way back, one round behind what is computed."""

    def __init__(self, task: Task, own: Plain) -> None:
        self.task, self.own = task, own
        self.under_way: tuple[Pending, dict[int, Tensor], Sources, slice] | None = None

    def owed(self, here: _Arrived) -> tuple[list[Pair], dict[int, Tensor]]:
        """Where the gradients of what is here add up; those of others in a buffer for each."""
        key, value, heads = self.own.key, self.own.value, here.heads
        if not here.number:
            own = (slice(piece.start, piece.stop) for piece in here.round.receives)
            return [(key[:, heads, rows], value[:, heads, rows]) for rows in own], {}
        sources = [(self.task.ranks[s], pieces) for s, pieces in _by_source(here.round)]
        buffers, owed = _buffers(self.own, sources, heads), []
        for rank, pieces in sources:
            owed += self.own.unpack(buffers[rank].zero_(), pieces, heads)
        return owed, buffers

    def send(self, here: _Arrived, buffers: dict[int, Tensor]) -> None:
        if not here.number:
            return
        self.finish()
        sends, heads = here.round.sends, here.heads
        coming = _buffers(self.own, [(self.task.ranks[p], pieces) for p, pieces in sends], heads)
        step = f"gradients of round {here.number}"
        pending = self.task.transport.exchange(buffers, coming, step)
        self.under_way = pending, coming, sends, heads

    def finish(self) -> None:
        """Takes in what is under way."""
        if self.under_way is None:
            return
        pending, coming, sends, heads = self.under_way
        self.under_way = None
        pending.wait()
        for peer, pieces in sends:
            found = self.own.unpack(coming[self.task.ranks[peer]], pieces, heads)
            for piece, grads in zip(pieces, found, strict=True):
                rows = slice(piece.start, piece.stop)
                for total, part in zip((self.own.key, self.own.value), grads, strict=True):
                    total[:, heads, rows] += part
