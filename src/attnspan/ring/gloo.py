"""Bytes between processes through gloo: one all-to-all for each exchange, watched by a deadline."""

from __future__ import annotations

import secrets
import struct
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from attnspan.ring.agreement import PRINT, Trail, fingerprint, mismatch, record
from attnspan.ring.links import Links, done
from attnspan.ring.rollcall import RollCall, Standing, Verdict
from attnspan.ring.transport import Pending, RingMismatch, RingPeerLost, Transport, checked

# Seconds that all have for standing up in a roll call, at most.
GRACE = 2.0
# Seconds that they have for making their connections: the first to come has nothing to load.
PATIENCE = 60.0
HEAD = struct.Struct("<8sQ")
TAIL = 8


@final
class GlooTransport(Transport):
    """A ring over gloo, whatever backend its process group has.

    It has connections of its own, made in the constructor, which is collective. The first loss
    ends it: all of them are closed, so that no process is kept from exiting, and whoever comes late
    fails instead of computing on. The process group itself stays as it was.

    Args:
        group: of which this process is a member; needed for its store and its ranks alone.
        deadline: seconds that a wait may last.
        patience: seconds that the others have to come here.

    Raises:
        RingPeerLost: not all came.
    """

    def __init__(
        self, group: ProcessGroup, deadline: float = 10.0, patience: float = PATIENCE
    ) -> None:
        self.rank, self.size, self.deadline = group.rank(), group.size(), deadline
        self.trail = Trail()
        self._rolls = RollCall(group)
        self._broken: tuple[Verdict, str] | None = None
        began = time.monotonic()
        step = "the making of its connections"
        try:
            self._links = Links(self._rolls.store, self.rank, self.size, patience)
        except RuntimeError as error:
            standing = Standing(0, step, time.monotonic() - began)
            verdict = self._rolls.silent(standing, self._grace, _nothing)
            waited = time.monotonic() - began
            raise RingPeerLost(verdict.ranks, None, step, waited, verdict.why) from error
        self._last = time.monotonic()
        weakref.finalize(self, self._links.end)

    @property
    def _grace(self) -> float:
        return min(GRACE, self.deadline)

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], step: str
    ) -> Pending:
        checked(self, sends, receives)
        self.begin(step)
        give, gives, _ = _one_buffer(sends, self.size, filled=True)
        take, takes, land = _one_buffer(receives, self.size, filled=False)
        self.sent += give.numel()
        tails = _Tails(take, takes)
        work = self._links.swap("exchange", take, give, takes, gives)
        return _Flight(self, work, step, tails, land)

    def gather(self, x: Tensor, step: str) -> Tensor:
        self.begin(step)
        raw = x.detach().contiguous().reshape(-1).view(torch.int8)
        head = HEAD.pack(self.trail.mark, raw.numel())
        mine = torch.cat([torch.frombuffer(bytearray(head), dtype=torch.int8), raw.cpu()])
        self.sent += raw.numel() * (self.size - 1)
        take = self._to_all("exchange", mine, step)
        heads = [row.tobytes() for row in take[:, : HEAD.size].numpy()]
        if any(other != head for other in heads):
            self.trail = Trail()
            raise RingMismatch(_strays(heads, step))
        rows = take[:, HEAD.size :].contiguous().view(x.dtype)
        return rows.view(self.size, *x.shape).to(x.device)

    def agree(self, facts: Mapping[str, str], by: str) -> None:
        step = f"the agreement of {by}"
        mine = record({**facts, "layer": str(self.layer)}, by, self.trail)
        self.begin(step)
        prints = self._tell_all(fingerprint(mine), PRINT, step)
        if any(other != prints[0] for other in prints):
            # All ranks see that, so all of them go on to tell each other everything.
            lengths = self._tell_all(struct.pack("<Q", len(mine)), 8, step)
            sizes = [struct.unpack("<Q", length)[0] for length in lengths]
            rows = self._tell_all(mine, max(sizes), step)
            self.trail = Trail()
            raise RingMismatch(mismatch([row[:n] for row, n in zip(rows, sizes, strict=True)]))

    def leave(self, why: str) -> None:
        if self._broken is None:
            mine = Verdict((self.rank,), why)
            self._rolls.tell(mine)
            self._end(mine, "its own calls")

    def check(self, step: str) -> None:
        """Raises if the ring is broken, or if the others gave up while this process was away."""
        away = time.monotonic() - self._last
        if self._broken is None and away > 0.9 * self.deadline:
            found = self._rolls.verdict(self._grace)
            if found is not None:
                self._end(found, step)
        if self._broken is not None:
            verdict, where = self._broken
            again = "" if where == step else f" (in {where})"
            raise RingPeerLost(verdict.ranks, self.layer, step, away, f"{verdict.why}{again}")

    def await_(self, work: dist.Work, step: str) -> None:
        """Returns when the work is done; raises when it fails, or when the deadline has passed."""
        self.check(step)
        began = time.monotonic()
        try:
            while not done(work, self.deadline - (time.monotonic() - began)):
                if time.monotonic() - began >= self.deadline:
                    raise self.lose(step, began)
        except RingPeerLost:
            raise
        except RuntimeError as error:
            raise self.lose(step, began, self._links.closed()) from error
        except BaseException:
            # Interrupted: what is under way can't be taken up again, and the others must not wait.
            self.leave("it was interrupted")
            raise
        finally:
            self.waited += time.monotonic() - began

    def lose(self, step: str, began: float, closed: Sequence[int] = ()) -> RingPeerLost:
        """Ends the ring; the error to raise, once the survivors agree on who is lost.

        Args:
            step: in which this rank waits.
            began: since when, by the monotonic clock.
            closed: ranks whose connection broke; none: the deadline passed.
        """
        standing = Standing(self.trail.count, step, time.monotonic() - began)
        if closed:
            verdict = self._rolls.closed(closed, standing, self._grace)
        else:
            verdict = self._rolls.silent(standing, self._grace, self._links.cut)
        self._end(verdict, step)
        waited = time.monotonic() - began
        return RingPeerLost(verdict.ranks, self.layer, step, waited, verdict.why)

    def short(self, ranks: Sequence[int], step: str) -> RingPeerLost:
        """Ends the ring, after messages that were shorter than they had to be."""
        why = "it sent less than is awaited, so it makes another call"
        verdict = self._rolls.tell(Verdict(tuple(ranks), why))
        self._end(verdict, step)
        return RingPeerLost(verdict.ranks, self.layer, step, 0.0, verdict.why)

    def begin(self, step: str) -> None:
        """Counts a call that all make; raises as `check` does."""
        self.check(step)
        self.trail.add(step, self.layer)
        self._last = time.monotonic()

    def _end(self, verdict: Verdict, step: str) -> None:
        self._broken = verdict, step
        self._links.cut()

    def _to_all(self, name: str, mine: Tensor, step: str) -> Tensor:
        """`(size, bytes)`. All to all at once: gloo's own all-gather takes `size - 1` turns."""
        give = mine.expand(self.size, -1).contiguous()
        take = torch.empty_like(give)
        self.await_(self._links.swap(name, take, give, (), ()), step)
        return take

    def _tell_all(self, mine: bytes, length: int, step: str) -> list[bytes]:
        give = torch.frombuffer(bytearray(mine.ljust(length)), dtype=torch.uint8)
        return [row.tobytes() for row in self._to_all("agreement", give, step).numpy()]


@final
class _Flight(Pending):
    def __init__(
        self,
        transport: GlooTransport,
        work: dist.Work,
        step: str,
        tails: _Tails,
        land: Callable[[], None],
    ) -> None:
        self._transport, self._step, self._tails, self._land = transport, step, tails, land
        self._work: dist.Work | None = work

    def wait(self) -> None:
        if self._work is None:
            return
        self._transport.await_(self._work, self._step)
        if short := self._tails.untouched():
            raise self._transport.short(short, self._step)
        self._land()
        self._work = None


class _Tails:
    """Notices messages that are too short, which gloo takes without a word.

    The end of each place that receives holds a random mark until something overwrites it.
    """

    def __init__(self, take: Tensor, sizes: Sequence[int]) -> None:
        self._bytes = take.numpy()
        self._mark = secrets.token_bytes(TAIL)
        places = zip(range(len(sizes)), accumulate(sizes), sizes, strict=True)
        self._ends = [(rank, end) for rank, end, n in places if n >= TAIL]
        for _, end in self._ends:
            self._bytes[end - TAIL : end] = memoryview(self._mark).cast("b")

    def untouched(self) -> list[int]:
        ends = self._ends
        return [r for r, end in ends if self._bytes[end - TAIL : end].tobytes() == self._mark]


def _one_buffer(
    parts: Mapping[int, Tensor], size: int, filled: bool
) -> tuple[Tensor, list[int], Callable[[], None]]:
    """One host buffer for all parts, in the order of their ranks, and each rank's bytes in it.

    The last of the three brings what the buffer received to where it belongs. Parts on the host
    that already lie one behind the other are the buffer themselves.
    """
    sizes = [parts[rank].numel() if rank in parts else 0 for rank in range(size)]
    rows = [parts[rank] for rank in range(size) if sizes[rank]]
    if not rows:
        return torch.empty(0, dtype=torch.int8), sizes, _nothing
    cuda = rows[0].is_cuda
    if rows[0].device.type == "cpu" and _adjacent(rows):
        return rows[0].as_strided((sum(sizes),), (1,)), sizes, _nothing
    buffer = torch.empty(sum(sizes), dtype=torch.int8, pin_memory=cuda)
    places = buffer.split([row.numel() for row in rows])
    if filled:
        for place, row in zip(places, rows, strict=True):
            place.copy_(row, non_blocking=cuda)
        if cuda:
            torch.cuda.current_stream(rows[0].device).synchronize()
        return buffer, sizes, _nothing

    def land() -> None:
        for place, row in zip(places, rows, strict=True):
            row.copy_(place, non_blocking=cuda)

    return buffer, sizes, land


def _adjacent(rows: Sequence[Tensor]) -> bool:
    """Whether each begins where the one before ends, in the same memory."""
    memory = rows[0].untyped_storage().data_ptr()
    return all(
        row.untyped_storage().data_ptr() == memory
        and before.data_ptr() + before.numel() == row.data_ptr()
        for before, row in pairwise(rows)
    )


def _nothing() -> None:
    return None


def _strays(heads: Sequence[bytes], step: str) -> str:
    marks = [HEAD.unpack(head) for head in heads]
    other = next(rank for rank, mark in enumerate(marks) if mark != marks[0])
    if marks[other][0] != marks[0][0]:
        what = "after other exchanges than rank 0"
    else:
        what = f"with {marks[other][1]} bytes, rank 0 with {marks[0][1]}"
    return f"{step}: rank {other} calls {what}; the same on all ranks is allowed"
