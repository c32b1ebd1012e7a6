"""gloo's connections of one ring: how they open, carry, tell of a death, and are closed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store

# How long a wait stays in torch at a time: Python sees an interrupt only in between.
SLICE = 0.1
# Sent by nobody: a receive that nothing answers is how gloo's connections are closed from outside.
UNSENT = 0x6A77E5
# Far longer than a deadline: gloo counts from where an exchange begins, not the wait for it.
GLOO_TIMEOUT = timedelta(minutes=30)


class Links:
    """Connections of their own between the members of a group, apart from those of the group.

    gloo pairs calls by their count alone. Were an agreement to meet an exchange, the smaller
    message would pass in silence and the larger one abort the process that gets it; so agreements
    have connections of their own, and calls of the user on the group never meet those of the ring.

    Args:
        store: of the group; with names that no other ring takes.
        rank: of this process.
        size: how many processes.
        seconds: for all to come here.

    Raises:
        RuntimeError: not all came.
    """

    def __init__(self, store: Store, rank: int, size: int, seconds: float) -> None:
        self._others = [other for other in range(size) if other != rank]
        self._under_way: deque[dist.Work] = deque()
        end = time.monotonic() + seconds
        # The stubs of torch lack what a backend can do.
        self._groups: dict[str, Any] = {}
        for name in ("exchange", "agreement"):
            left = timedelta(seconds=max(end - time.monotonic(), 0.1))
            self._groups[name] = ProcessGroupGloo(PrefixStore(name, store), rank, size, left)
            self._groups[name]._set_default_timeout(GLOO_TIMEOUT)

    def swap(
        self, name: str, take: Tensor, give: Tensor, takes: Sequence[int], gives: Sequence[int]
    ) -> dist.Work:
        """An all-to-all: a part of `give` to each rank, and one of `take` from each."""
        work = self._groups[name].alltoall_base(take, give, list(takes), list(gives))
        while self._under_way and self._under_way[0].is_completed():
            self._under_way.popleft()
        self._under_way.append(work)
        return work

    def closed(self) -> list[int]:
        """The ranks to which a connection broke: a receive from them can't even begin."""
        return [rank for rank in self._others if not all(self._receive(rank))]

    def cut(self) -> None:
        """Closes all connections, so that nobody waits for this process, nor it for anybody.

        gloo does that when a receive times out. Otherwise its threads would wait for what is under
        way, and the process couldn't exit before they end.
        """
        for rank in self._others:
            for work in self._receive(rank):
                if work is not None:
                    try:
                        work.wait(timedelta(milliseconds=1))
                    except RuntimeError:
                        continue

    def end(self) -> None:
        """For a ring that nobody uses any more, or an exit: what is under way has no reader."""
        if not all(work.is_completed() for work in self._under_way):
            self.cut()

    def _receive(self, rank: int) -> list[dist.Work | None]:
        works: list[dist.Work | None] = []
        for group in self._groups.values():
            try:
                works.append(group.recv([torch.empty(1, dtype=torch.int8)], rank, UNSENT))
            except RuntimeError:
                works.append(None)
        return works


def done(work: dist.Work, left: float) -> bool:
    """Whether it is done after a part of the seconds that are left, at most `SLICE`.

    A wait inside torch wakes at once and takes no processor time, as polling would; a collective's
    may time out and be waited for again (a receive's may not).

    Raises:
        RuntimeError: it failed.
    """
    try:
        # Without time, torch would wait for ever.
        work.wait(timedelta(seconds=min(max(left, 1e-3), SLICE)))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()
    return True
