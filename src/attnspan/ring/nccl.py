"""Bytes between GPUs through NCCL: point-to-point in one batch, waited for by the stream."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from attnspan.ring.gloo import GlooTransport
from attnspan.ring.transport import Pending, RingPeerLost, Transport, checked


@dataclass
class _Sent:
    """An exchange whose end the host didn't see yet."""

    begins: torch.cuda.Event
    works: list[dist.Work]
    step: str
    layer: int | None
    since: float | None = None


@final
class NcclTransport(Transport):
    """A ring over a process group that has NCCL.

    Waits are the stream's, not the host's: `waited` stays 0 but for `agree`, which goes over gloo.
    A peer that is lost is found by `agree`, and by a look at earlier exchanges whenever another one
    begins: the device reached it, and more than the deadline later it hasn't ended. Then the
    communicator is aborted, without which nothing on the device would end, the process included.
    A host that makes no further call, and waits for the device alone, has NCCL's own time-out.

    Args:
        group: of which this process is a member; held weakly.
        deadline: seconds that an exchange may take once the device has come to it.
    """

    def __init__(self, group: ProcessGroup, deadline: float = 10.0) -> None:
        self._group = weakref.ref(group)
        self.rank, self.size = group.rank(), group.size()
        self._device = _device()
        self._side = GlooTransport(group, deadline)
        self._flights: deque[_Sent] = deque()
        # NCCL connects all ranks in the first call; a batch of some pairs alone would hang there.
        dist.all_reduce(torch.zeros(1, device=self._device), group=group)

    @property
    def deadline(self) -> float:
        return self._side.deadline

    @deadline.setter
    def deadline(self, seconds: float) -> None:
        self._side.deadline = seconds

    @property
    def group(self) -> ProcessGroup:
        if (group := self._group()) is None:
            raise RuntimeError("ring: its process group was destroyed")
        return group

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], step: str
    ) -> Pending:
        checked(self, sends, receives)
        for name, parts in (("sends", sends), ("receives", receives)):
            for peer, x in parts.items():
                if x.device.type != self._device.type:
                    raise ValueError(
                        f"{name}: a tensor on {x.device} for rank {peer}; over NCCL those on CUDA "
                        "devices are allowed (over gloo both)"
                    )
        self._begin(step)
        group = self.group
        batch = [
            dist.P2POp(post, x, group=group, group_peer=peer)
            for post, parts in ((dist.irecv, receives), (dist.isend, sends))
            for peer, x in sorted(parts.items())
            if x.numel()
        ]
        self.sent += sum(x.numel() for x in sends.values())
        if not batch:
            return _Flight([])
        begins = self._mark()
        works = dist.batch_isend_irecv(batch)
        self._flights.append(_Sent(begins, works, step, self.layer))
        return _Flight(works)

    def gather(self, x: Tensor, step: str) -> Tensor:
        self._begin(step)
        raw = x.detach().contiguous().reshape(-1).view(torch.uint8).to(self._device)
        take = raw.new_empty(self.size * raw.numel())
        self.sent += raw.numel() * (self.size - 1)
        begins = self._mark()
        work = dist.all_gather_into_tensor(take, raw, self.group, async_op=True)
        assert work is not None
        self._flights.append(_Sent(begins, [work], step, self.layer))
        work.wait()
        return take.view(x.dtype).view(self.size, *x.shape).to(x.device)

    def agree(self, facts: Mapping[str, str], by: str) -> None:
        self.watch()
        self._side.layer = self.layer
        before = self._side.waited
        try:
            self._side.agree(facts, by)
        except RingPeerLost:
            self._abort()
            raise
        finally:
            self.waited += self._side.waited - before

    def leave(self, why: str) -> None:
        self._side.leave(why)
        self._abort()

    def _begin(self, step: str) -> None:
        self.watch()
        self._side.layer = self.layer
        self._side.begin(step)

    def watch(self) -> None:
        """Looks whether earlier exchanges ended in time; waits for nothing.

        Raises:
            RingPeerLost: one didn't.
        """
        now = time.monotonic()
        while self._flights:
            flight = self._flights[0]
            if all(work.is_completed() for work in flight.works):
                self._flights.popleft()
                continue
            # Work that the stream still has before it may take as long as it likes.
            if flight.since is None and flight.begins.query():
                flight.since = now
            if flight.since is not None and now - flight.since > self.deadline:
                self._side.layer = flight.layer
                error = self._side.lose(flight.step, flight.since, [])
                self._abort()
                raise error
            return

    def _mark(self) -> torch.cuda.Event:
        """Tells later how far the current stream came."""
        event = torch.cuda.Event()
        event.record()
        return event

    def _abort(self) -> None:
        self._flights.clear()
        if (group := self._group()) is not None:
            group._get_backend(self._device).abort()


@final
class _Flight(Pending):
    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        """The current stream waits, the host doesn't."""
        for work in self._works:
            work.wait()
        self._works = []


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
