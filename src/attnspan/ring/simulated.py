"""A ring whose ranks are threads of one process: for tests, and to try one where there is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnspan.ring.transport import Pending, RingMismatch, RingPeerLost, Transport, differing

T = TypeVar("T")


class _Board:
    """Where the ranks leave what others take; numbered by how often each pair has met."""

    def __init__(self, size: int, deadline: float) -> None:
        self.size, self.deadline = size, deadline
        self.changed = threading.Condition()
        self.left: dict[tuple[str, int, int, int], object] = {}
        self.failed: set[int] = set()

    def put(self, kind: str, turn: int, source: int, target: int, what: object) -> None:
        with self.changed:
            self.left[kind, turn, source, target] = what
            self.changed.notify_all()

    def take(self, kind: str, turn: int, source: int, target: int, about: SimulatedTransport,
             step: str) -> object:  # fmt: skip
        key, started = (kind, turn, source, target), time.monotonic()
        with self.changed:
            came = self.changed.wait_for(
                lambda: key in self.left or self.failed, timeout=self.deadline
            )
            about.waited += time.monotonic() - started
            if key in self.left:
                return self.left.pop(key)
        lost = sorted(self.failed) or [source]
        why = "it failed" if came else "it sent nothing"
        raise RingPeerLost(lost, about.layer, step, time.monotonic() - started, why)


class SimulatedTransport(Transport):
    """One rank of a simulated ring."""

    def __init__(self, board: _Board, rank: int) -> None:
        self.board, self.rank, self.size = board, rank, board.size
        self.turn = 0

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], step: str
    ) -> Pending:
        self.turn += 1
        for peer, what in sends.items():
            # A copy: the sender may reuse its memory once it has waited, the receiver reads later.
            self.board.put("bytes", self.turn, self.rank, peer, what.clone())
            self.sent += what.numel()
        return _Waiting(self, dict(receives), step)

    def gather(self, x: Tensor, step: str) -> Tensor:
        self.sent += x.nbytes * (self.size - 1)
        return torch.stack(self._all(x.clone(), step))

    def agree(self, facts: Mapping[str, str], by: str) -> None:
        told = self._all(dict(facts), f"what {by} agrees on")
        if sentence := differing(told, by):
            raise RingMismatch(sentence)

    def _all(self, mine: Any, step: str) -> list[Any]:
        self.turn += 1
        turn = self.turn
        for peer in range(self.size):
            self.board.put("all", turn, self.rank, peer, mine)
        return [self.board.take("all", turn, s, self.rank, self, step) for s in range(self.size)]


class _Waiting(Pending):
    def __init__(self, transport: SimulatedTransport, buffers: dict[int, Tensor], step: str):
        self.transport, self.buffers, self.step = transport, buffers, step
        self.turn = transport.turn

    def wait(self) -> None:
        me = self.transport
        for source, buffer in self.buffers.items():
            what = me.board.take("bytes", self.turn, source, me.rank, me, self.step)
            assert isinstance(what, Tensor)
            if what.numel() != buffer.numel():
                raise AssertionError(
                    f"rank {source} sent {what.numel()} bytes, {buffer.numel()} are planned"
                )
            buffer.copy_(what)


def simulate(size: int, work: Callable[[Transport], T], deadline: float = 60.0) -> list[T]:
    """What `work` gives on each rank of a ring of threads; the first rank's error is raised.

    Args:
        size: ranks.
        work: what each does; it gets its transport, which goes where a group does.
        deadline: seconds a rank waits for another.

    >>> simulate(2, lambda t: int(t.gather(torch.tensor(t.rank), "ranks").sum()))
    [1, 1]
    """
    board = _Board(size, deadline)
    results: list[T | None] = [None] * size
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            # On a GPU autograd has one thread, in which the ranks' gradients would wait for ever.
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = work(SimulatedTransport(board, rank))
        except BaseException as error:
            errors[rank] = error
            with board.changed:
                board.failed.add(rank)
                board.changed.notify_all()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        # Those that lost a peer say less than the peer's own error.
        first = sorted(errors, key=lambda r: (isinstance(errors[r], RingPeerLost), r))[0]
        raise errors[first]
    return results  # type: ignore[return-value]
