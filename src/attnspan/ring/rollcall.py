"""Who is lost: the survivors of a ring find out together, through their group's store."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import ProcessGroup, get_process_group_ranks

T = TypeVar("T")
# Seconds between two looks into the store, and those that the others have for the last of them.
LOOK_EVERY = 0.02
LINGER = 0.5
CLOSED = "its connection closed: it died, or left the ring"


@dataclass(frozen=True)
class Verdict:
    """Which ranks are lost, and what tells so; the same on all survivors that reach the store."""

    ranks: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class Standing:
    """Where a rank stands when it gives up: the number of its call, what it is, seconds waited."""

    call: int
    step: str
    waited: float


class StoreGone(Exception):
    """The store answers no longer, or not in time."""


class RollCall:
    """What survivors of one transport tell each other once it is broken.

    Each writes that it is still there before it leaves. The first to know who is lost writes the
    verdict, which all others take over, also one that comes back late. Keys carry the count of
    transports that this process made on the group's store: nothing of an earlier one is read.
    """

    def __init__(self, group: ProcessGroup) -> None:
        store: Store = group.get_group_store()
        self.rank, self.size = group.rank(), group.size()
        epoch = store.add(f"attnspan.ring/epoch/{self.rank}", 1)
        self.store = PrefixStore(f"attnspan.ring/{epoch}", store)
        self._world = get_process_group_ranks(group)
        self._host = _host(store, self._world)

    def verdict(self, seconds: float) -> Verdict | None:
        """What the others found while this rank was away; None: they still wait."""
        try:
            return self._within(seconds, self._written)
        except StoreGone:
            return None

    def tell(self, verdict: Verdict) -> Verdict:
        """Tells the others what this rank alone knows; returns what all go by from now on."""
        return self._or_gone(lambda: self._write(verdict), 1.0, verdict.ranks)

    def closed(self, ranks: Sequence[int], standing: Standing, seconds: float) -> Verdict:
        """The verdict, after the connections to some ranks broke.

        Those of them that stood up for the roll call broke theirs on purpose, knowing who is lost.
        """

        def work() -> Verdict:
            self._stand_up(standing)
            end = time.monotonic() + seconds
            while True:
                if found := self._written():
                    return found
                dead = tuple(rank for rank in ranks if not self._stands(rank))
                if dead or time.monotonic() > end:
                    return self._write(Verdict(dead or tuple(ranks), CLOSED))
                time.sleep(LOOK_EVERY)

        return self._or_gone(work, seconds + 1.0, tuple(ranks))

    def silent(self, standing: Standing, seconds: float, cut: Callable[[], None]) -> Verdict:
        """The verdict, after the deadline passed with all connections open.

        Args:
            standing: where this rank waits.
            seconds: how long the others have to stand up too.
            cut: closes this rank's connections, so that whoever else waits hears of it.
        """

        def work() -> Verdict:
            self._stand_up(standing)
            cut()
            end = time.monotonic() + seconds
            absent = [rank for rank in range(self.size) if rank != self.rank]
            while absent and time.monotonic() < end:
                if found := self._written():
                    return found
                time.sleep(LOOK_EVERY)
                absent = [rank for rank in absent if not self._stands(rank)]
            if absent:
                why = f"it hangs or is late: no answer to the roll call within {seconds:.1f} s"
                return self._write(Verdict(tuple(absent), why))
            return self._write(self._all_there())

        return self._or_gone(work, seconds + 1.0, ())

    def _all_there(self) -> Verdict:
        """All are alive, and yet what one waits for didn't come."""
        texts = [self.store.get(f"here/{rank}").decode() for rank in range(self.size)]
        stand = [Standing(**json.loads(text)) for text in texts]
        if len({(s.call, s.step) for s in stand}) == 1:
            last = min(range(self.size), key=lambda rank: stand[rank].waited)
            return Verdict((last,), "it came later than the deadline allows")
        furthest = max(s.call for s in stand)
        behind = tuple(rank for rank, s in enumerate(stand) if s.call < furthest)
        (most, times), *_ = Counter((s.call, s.step) for s in stand).most_common(1)
        if not behind and 2 * times > self.size:
            behind = tuple(rank for rank, s in enumerate(stand) if (s.call, s.step) != most)
        where = ", ".join(f"rank {rank} in call {s.call}, {s.step}" for rank, s in enumerate(stand))
        return Verdict(behind, f"all are alive, but not in the same call: {where}")

    def _stand_up(self, standing: Standing) -> None:
        self.store.set(f"here/{self.rank}", json.dumps(asdict(standing)))

    def _stands(self, rank: int) -> bool:
        return self.store.check([f"here/{rank}"])

    def _written(self) -> Verdict | None:
        if not self.store.check(["verdict"]):
            return None
        return _read(self.store.get("verdict"))

    def _write(self, verdict: Verdict) -> Verdict:
        text = json.dumps([verdict.ranks, verdict.why + self._in_world(verdict.ranks)])
        return _read(self.store.compare_set("verdict", "", text))

    def _in_world(self, ranks: Sequence[int]) -> str:
        """Who they are, where the ring isn't the whole world."""
        world = [self._world[rank] for rank in ranks]
        if world == list(ranks):
            return ""
        return f" (rank{'s' * (len(world) > 1)} {', '.join(map(str, world))} of the world)"

    def _or_gone(
        self, work: Callable[[], Verdict], seconds: float, closed: tuple[int, ...]
    ) -> Verdict:
        try:
            verdict = self._within(seconds, work)
            if self.rank in self._host[0]:
                # The store ends with this process: the others have to read it first.
                time.sleep(LINGER)
            return verdict
        except StoreGone:
            host, name = self._host
            gone = f"the group's store doesn't answer any more, and it lies with {name}"
            if host or not closed:
                return Verdict(host, gone)
            return Verdict(closed, f"{CLOSED}{self._in_world(closed)}; {gone}")

    def _within(self, seconds: float, work: Callable[[], T]) -> T:
        """The store's calls know no time-out where its host hangs: a thread waits in our place."""
        done: list[T] = []
        ended = threading.Event()

        def run() -> None:
            try:
                done.append(work())
            except RuntimeError:
                return
            finally:
                ended.set()

        threading.Thread(target=run, name="attnspan.ring", daemon=True).start()
        ended.wait(seconds)
        if not done:
            raise StoreGone
        return done[0]


def _read(text: bytes) -> Verdict:
    ranks, why = json.loads(text)
    return Verdict(tuple(ranks), why)


def _host(store: Store, world: Sequence[int]) -> tuple[tuple[int, ...], str]:
    """Whose end takes the store along: its rank in the group, if it has one, and its name."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return (), type(store).__name__
    where = f"{store.host}:{store.port}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return (), f"the agent of torchrun at {where}"
    return tuple(world.index(r) for r in world if r == 0), f"rank 0 of the world, at {where}"
