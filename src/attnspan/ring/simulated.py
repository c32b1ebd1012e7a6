"""A ring of threads in one process: every exchange as it would be, without a network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnspan.ring.transport import Pending, RingMismatch, RingPeerLost, Transport

T = TypeVar("T")


class _Mail:
    """What the ranks have put down, by exchange and rank."""

    def __init__(self, size: int, deadline: float) -> None:
        self.size, self.deadline = size, deadline
        self.changed = threading.Condition()
        self.put: dict[int, dict[int, tuple[str, Any]]] = {}
        self.taken: dict[int, int] = {}
        self.lost: set[int] = set()

    def share(self, rank: int, turn: int, step: str, x: Any) -> None:
        with self.changed:
            self.put.setdefault(turn, {})[rank] = step, x
            self.changed.notify_all()

    def collect(self, rank: int, turn: int, step: str, layer: int | None) -> list[Any]:
        with self.changed:
            done = self.changed.wait_for(
                lambda: len(self.put[turn]) == self.size or self.lost, self.deadline
            )
            there = self.put[turn]
            if len(there) < self.size:
                missing = sorted(self.lost or set(range(self.size)) - there.keys())
                why = "it ended" if done else "it doesn't answer"
                raise RingPeerLost(tuple(missing), layer, step, self.deadline, why)
            steps = {s for s, _ in there.values()}
            assert steps == {step}, f"ranks are in different steps: {steps}"
            got = [there[r][1] for r in range(self.size)]
            self.taken[turn] = self.taken.get(turn, 0) + 1
            if self.taken[turn] == self.size:
                del self.put[turn], self.taken[turn]
            return got


class _Landing(Pending):
    def __init__(self, transport: _Simulated, turn: int, receives: Any, step: str) -> None:
        self.transport, self.turn, self.receives, self.step = transport, turn, receives, step

    def wait(self) -> None:
        rank = self.transport.rank
        got = self.transport.mail.collect(rank, self.turn, self.step, self.transport.layer)
        for peer, buffer in self.receives.items():
            buffer.copy_(got[peer][rank])


class _Simulated(Transport):
    def __init__(self, mail: _Mail, rank: int) -> None:
        self.mail, self.rank, self.size, self.turn = mail, rank, mail.size, 0

    def _next(self) -> int:
        self.turn += 1
        return self.turn

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], step: str
    ) -> Pending:
        turn = self._next()
        self.sent += sum(x.nbytes for x in sends.values())
        self.mail.share(self.rank, turn, step, {p: x.clone() for p, x in sends.items()})
        return _Landing(self, turn, receives, step)

    def gather(self, x: Tensor, step: str) -> Tensor:
        turn = self._next()
        self.sent += x.nbytes * (self.size - 1)
        self.mail.share(self.rank, turn, step, x.clone())
        return torch.stack(self.mail.collect(self.rank, turn, step, self.layer))

    def agree(self, facts: Mapping[str, str], by: str) -> None:
        turn = self._next()
        self.mail.share(self.rank, turn, "agreement", dict(facts))
        rows = self.mail.collect(self.rank, turn, "agreement", self.layer)
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row.get(name) for row in rows]
            if len(set(values)) > 1:
                said = ", ".join(f"rank {r} with {v}" for r, v in enumerate(values))
                raise RingMismatch(f"{by}: {name} differs, {said}; the same is allowed")


def simulate(size: int, work: Callable[[Transport], T]) -> list[T]:
    """Runs `work` on every rank of a ring, a thread each; what each returned, or the first error."""
    mail = _Mail(size, 10.0)
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(_Simulated(mail, rank))
        except BaseException as error:
            errors[rank] = error
            with mail.changed:
                mail.lost.add(rank)
                mail.changed.notify_all()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = [e for e in errors if e is not None and not isinstance(e, RingPeerLost)]
    for error in (*first, *(e for e in errors if e is not None)):
        raise error
    return results
