"""Bytes between processes through gloo: one all-to-all for each exchange, watched by a deadline."""

from __future__ import annotations

import struct
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .agreement import PRINT, Trail, fingerprint, mismatch, record
from .rollcall import RollCall, Standing, Verdict
from .transport import Pending, RingMismatch, RingPeerLost, Transport, checked

# How long a wait stays in torch at a time: Python sees an interrupt only in between.
SLICE = 0.1
GRACE = 2.0
# Sent by nobody: a receive that nothing answers is how gloo's connections are closed from outside.
UNSENT = 0x6A77E5
HEAD = struct.Struct("<8sQ")


@final
class GlooTransport(Transport):
    """A ring over a process group that has gloo.

    The first loss ends it: the connections of the whole group are closed, so that no thread of gloo
    keeps waiting for what never comes (a process couldn't exit before gloo's own time-out, half an
    hour), and whoever comes late fails instead of computing on.

    Args:
        group: of which this process is a member; held weakly.
        deadline: seconds that a wait may last.
    """

    def __init__(self, group: ProcessGroup, deadline: float = 10.0) -> None:
        self._group = weakref.ref(group)
        self.rank, self.size, self.deadline = group.rank(), group.size(), deadline
        self.trail = Trail()
        self._rolls = RollCall(group)
        self._broken: tuple[Verdict, str] | None = None
        self._last = time.monotonic()

    @property
    def group(self) -> ProcessGroup:
        if (group := self._group()) is None:
            raise RuntimeError("ring: its process group was destroyed")
        return group

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], step: str
    ) -> Pending:
        checked(self, sends, receives)
        self._begin(step)
        group = self.group
        give, give_sizes, _ = _one_buffer(sends, self.size, filled=True)
        take, take_sizes, land = _one_buffer(receives, self.size, filled=False)
        self.sent += give.numel()
        work = dist.all_to_all_single(take, give, take_sizes, give_sizes, group, async_op=True)
        return _Flight(self, work, step, land, (give, take))

    def gather(self, x: Tensor, step: str) -> Tensor:
        self._begin(step)
        bytes_ = x.detach().contiguous().reshape(-1).view(torch.int8)
        head = HEAD.pack(self.trail.mark, bytes_.numel())
        mine = torch.cat([torch.frombuffer(bytearray(head), dtype=torch.int8), bytes_.cpu()])
        # To all at once, itself among them: an all-gather goes round, and meets that of `agree`.
        give = mine.expand(self.size, -1).contiguous()
        take = torch.empty_like(give)
        self.sent += bytes_.numel() * (self.size - 1)
        work = dist.all_to_all_single(take, give, group=self.group, async_op=True)
        self.await_(work, step)
        heads = [bytes(row) for row in take[:, : HEAD.size].numpy()]
        if any(other != head for other in heads):
            self.trail = Trail()
            raise RingMismatch(_strays(heads, step))
        rows = take[:, HEAD.size :].contiguous().view(x.dtype)
        return rows.view(self.size, *x.shape).to(x.device)

    def agree(self, facts: Mapping[str, str], by: str) -> None:
        step = f"{by}'s agreement"
        mine = record({**facts, "layer": str(self.layer)}, by, self.trail)
        self._begin(step)
        prints = self._all_gather(fingerprint(mine), PRINT, step)
        if any(other != prints[0] for other in prints):
            # All ranks see that, so all of them go on to tell each other everything.
            lengths = self._all_gather(struct.pack("<Q", len(mine)), 8, step)
            sizes = [struct.unpack("<Q", length)[0] for length in lengths]
            rows = self._all_gather(mine, max(sizes), step)
            self.trail = Trail()
            raise RingMismatch(mismatch([row[:n] for row, n in zip(rows, sizes, strict=True)]))

    def _all_gather(self, mine: bytes, length: int, step: str) -> list[bytes]:
        give = torch.frombuffer(bytearray(mine.ljust(length)), dtype=torch.uint8)
        take = torch.empty(self.size * length, dtype=torch.uint8)
        self.await_(dist.all_gather_into_tensor(take, give, self.group, async_op=True), step)
        return [bytes(row) for row in take.view(self.size, length).numpy()]

    def _begin(self, step: str) -> None:
        self.check(step)
        self.trail.add(step, self.layer)
        self._last = time.monotonic()

    def check(self, step: str) -> None:
        """Raises if the ring is broken, or if the others gave up while this process was away."""
        now = time.monotonic()
        away = now - self._last
        if self._broken is None and away > 0.9 * self.deadline:
            found = self._rolls.verdict(GRACE)
            if found is not None:
                self._end(found, step)
        if self._broken is not None:
            verdict, where = self._broken
            again = "" if where == step else f", when {where} was exchanged"
            raise RingPeerLost(verdict.ranks, self.layer, step, away, f"{verdict.why}{again}")

    def await_(self, work: dist.Work | None, step: str) -> None:
        """Returns when the work is done; raises when it fails, or when the deadline has passed."""
        self.check(step)
        assert work is not None, "only a process outside the group gets no work"
        began = time.monotonic()
        try:
            while not self._done(work, self.deadline - (time.monotonic() - began)):
                if time.monotonic() - began >= self.deadline:
                    raise self.lose(step, began, [])
        except RuntimeError as error:
            if isinstance(error, RingPeerLost):
                raise
            raise self.lose(step, began, self._closed()) from error
        except BaseException:
            # Interrupted: what is under way can't be taken up again, and the others must not wait.
            self._end(Verdict((self.rank,), "it was interrupted"), step)
            raise
        finally:
            self.waited += time.monotonic() - began

    def _done(self, work: dist.Work, left: float) -> bool:
        """Whether it is done after a part of the time that is left, at most `SLICE`."""
        try:
            # Without time, torch would wait for ever.
            work.wait(timedelta(seconds=min(max(left, 1e-3), SLICE)))
        except RuntimeError:
            if not work.is_completed():
                return False
            work.wait()
        return True

    def lose(self, step: str, began: float, closed: Sequence[int]) -> RingPeerLost:
        """Ends the ring; the error to raise, once the survivors agree on who is lost."""
        standing = Standing(self.trail.count, step, time.monotonic() - began)
        if closed:
            verdict = self._rolls.closed(closed, standing, GRACE)
        else:
            verdict = self._rolls.silent(standing, GRACE, self._cut)
        self._end(verdict, step)
        waited = time.monotonic() - began
        return RingPeerLost(verdict.ranks, self.layer, step, waited, verdict.why)

    def _end(self, verdict: Verdict, step: str) -> None:
        self._broken = verdict, step
        self._cut()

    def _closed(self) -> list[int]:
        """The ranks that this one has no connection to any more: a receive from them can't begin."""
        return [rank for rank in self._others() if not self._receive(rank)]

    def _cut(self) -> None:
        """Closes the connections to all others: gloo does so when a receive times out."""
        for rank in self._others():
            if work := self._receive(rank):
                try:
                    work.wait(timedelta(milliseconds=1))
                except RuntimeError:
                    continue

    def _receive(self, rank: int) -> dist.Work | None:
        if (group := self._group()) is None:
            return None
        try:
            return group.recv([torch.empty(1, dtype=torch.int8)], rank, UNSENT)
        except RuntimeError:
            return None

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]


@final
class _Flight(Pending):
    def __init__(
        self,
        transport: GlooTransport,
        work: dist.Work | None,
        step: str,
        land: Callable[[], None],
        buffers: tuple[Tensor, Tensor],
    ) -> None:
        self._transport, self._step, self._land, self._buffers = transport, step, land, buffers
        self._work = work

    def wait(self) -> None:
        if self._work is None:
            return
        self._transport.await_(self._work, self._step)
        self._land()
        self._work = None


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
    if not cuda and _adjacent(rows):
        return rows[0].as_strided((sum(sizes),), (1,)), sizes, _nothing
    buffer = torch.empty(sum(sizes), dtype=torch.int8, pin_memory=cuda)
    places = buffer.split([row.numel() for row in rows])
    if filled:
        for place, row in zip(places, rows, strict=True):
            place.copy_(row, non_blocking=True)
        if cuda:
            torch.cuda.current_stream(rows[0].device).synchronize()
        return buffer, sizes, _nothing

    def land() -> None:
        for place, row in zip(places, rows, strict=True):
            row.copy_(place, non_blocking=True)

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
