"""What the processes of the transport tests run."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ring.processes import mark

from attnspan.ring.gloo import GlooTransport
from attnspan.ring.groups import init, transport_of
from attnspan.ring.transport import RingMismatch, RingPeerLost, Transport

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)


def message(source: int, target: int, count: int) -> torch.Tensor:
    """Bytes that no other pair of ranks sends, `(count,)` of int8."""
    return ((torch.arange(count) * 7 + source * 31 + target * 57) % 251 - 125).to(torch.int8)


def count(source: int, target: int, t: int) -> int:
    """How many bytes one rank sends another in exchange `t`; sometimes none."""
    return ((source + 1) * 13 + target * 7 + t * 5) % 4 * 1001


def swap(transport: Transport, t: int, one_buffer: bool = False) -> None:
    """One exchange of all with all, held against what the others must have sent."""
    others = [r for r in range(transport.size) if r != transport.rank]
    me = transport.rank
    sends = {r: message(me, r, n) for r in others if (n := count(me, r, t))}
    sizes = {r: n for r in others if (n := count(r, me, t))}
    if one_buffer:
        buffer = torch.full((sum(sizes.values()),), 77, dtype=torch.int8)
        receives = dict(zip(sizes, buffer.split(list(sizes.values())), strict=True))
    else:
        receives = {r: torch.full((n,), 77, dtype=torch.int8) for r, n in sizes.items()}
    pending = transport.exchange(sends, receives, f"swap {t}")
    pending.wait()
    pending.wait()
    for r, got in receives.items():
        assert torch.equal(got, message(r, me, sizes[r])), f"exchange {t}, from {r}"


def exchanges(rank: int, size: int) -> dict[str, Any]:
    transport = transport_of()
    assert transport_of() is transport
    assert transport_of(transport) is transport
    assert (transport.rank, transport.size) == (rank, size)
    for t in range(8):
        swap(transport, t, one_buffer=t % 2 == 1)
    sent = sum(count(rank, r, t) for r in range(size) if r != rank for t in range(8))
    assert transport.sent == sent
    # Two under way at once, waited for in the other order.
    other, before = (rank + 1) % size, (rank - 1) % size
    first, second = torch.empty(9, dtype=torch.int8), torch.empty(4, dtype=torch.int8)
    one = transport.exchange({other: message(rank, other, 9)}, {before: first}, "one")
    two = transport.exchange({other: message(rank, other, 4) + 1}, {before: second}, "two")
    two.wait()
    one.wait()
    assert torch.equal(first, message(before, rank, 9))
    assert torch.equal(second, message(before, rank, 4) + 1)
    # Nobody sends anything.
    transport.exchange({}, {}, "nothing").wait()
    return {"waited": transport.waited}


def gathers(rank: int, size: int) -> None:
    transport = transport_of()
    for dtype in DTYPES:
        for shape in ((3, 5), (1,), (), (2, 1, 3)):
            rows = [(torch.arange(torch.Size(shape).numel()) + r).view(shape) for r in range(size)]
            x = rows[rank].to(dtype)
            out = transport.gather(x.requires_grad_(dtype.is_floating_point), "rows")
            assert out.dtype == dtype
            assert torch.equal(out, torch.stack([row.to(dtype) for row in rows]))
    strided = torch.arange(12.0).view(3, 4).t() + rank
    out = transport.gather(strided, "strided")
    assert all(torch.equal(out[r], strided - rank + r) for r in range(size))
    assert transport.sent == (size - 1) * (48 + sum(dtype.itemsize for dtype in DTYPES) * 23)


def gpu(rank: int, size: int) -> None:
    transport = transport_of(device="cuda")
    assert isinstance(transport, GlooTransport)
    others = [r for r in range(size) if r != rank]
    for n in (5, 3 << 20):
        sends = {r: message(rank, r, n).cuda() for r in others}
        receives = {r: torch.zeros(n, dtype=torch.int8, device="cuda") for r in others}
        transport.exchange(sends, receives, "keys").wait()
        assert all(torch.equal(receives[r].cpu(), message(r, rank, n)) for r in others)
    out = transport.gather(torch.full((3,), rank, device="cuda"), "rows")
    assert out.is_cuda
    assert out[:, 0].tolist() == list(range(size))


def disagreements(rank: int, size: int) -> list[str]:
    """What each rank is told, and that the ring goes on after it."""
    transport = transport_of()
    last = size - 1
    told: list[str] = []

    def ask(facts: dict[str, str], by: str = "ring_attention") -> None:
        try:
            transport.agree(facts, by)
            told.append("")
        except RingMismatch as error:
            told.append(str(error))
        swap(transport, 1)

    ask({"k": "(1, 2, 512, 64) bfloat16", "pattern": "Causal()"})
    ask({"k": f"(1, 2, {500 if rank == last else 512}, 64) bfloat16"})
    ask({"k": "same"}, "ring_decode" if rank == 0 else "ring_attention")
    ask({"pattern": "Documents(" + "128, " * 500 + f"{rank == last})"})
    ask({"pattern": "Causal()"} if rank else {})
    transport.exchange({}, {}, f"keys of {'other' if rank == last else 'these'} rows").wait()
    ask({})
    return told


def counts(rank: int, size: int) -> str:
    """One rank gathers another number of rows, and another in another order."""
    transport = transport_of()
    told = []
    for shape, step in (((2, 2) if rank else (4,), "same bytes"), ((3,), f"rows {rank == 0}")):
        try:
            transport.gather(torch.zeros(shape), step)
            told.append("")
        except RingMismatch as error:
            told.append(str(error))
    swap(transport, 1)
    return " | ".join(told)


def subgroups(rank: int, size: int) -> list[int]:
    """Rings of parts of the world, in another order of ranks, several at once."""
    from torch.distributed.device_mesh import init_device_mesh

    parts = [[0, 2], [1, 3]]
    groups = [dist.new_group(part) for part in parts]
    mine = rank % 2
    ring = transport_of(groups[mine])
    assert (ring.rank, ring.size) == (rank // 2, 2)
    world = transport_of()
    for t in range(3):
        swap(ring, t)
        swap(world, t)
    out = ring.gather(torch.tensor([rank]), "rank").flatten().tolist()
    assert out == parts[mine]
    with pytest.raises(ValueError, match="isn't one of its members"):
        transport_of(groups[1 - mine])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ring"))
    with pytest.raises(ValueError, match=r"mesh of 2 dimensions \('data', 'ring'\)"):
        transport_of(mesh)
    row = transport_of(mesh["ring"])
    assert transport_of(mesh["ring"].get_group()) is row
    alone = transport_of(dist.new_group([rank], use_local_synchronization=True))
    assert alone.size == 1
    alone.exchange({}, {}, "nothing").wait()
    assert alone.gather(torch.tensor([3.0]), "x").tolist() == [[3.0]]
    return row.gather(torch.tensor([rank]), "rank").flatten().tolist()


def broken(
    rank: int, size: int, which: int, when: str, deadline: float, sleep: float = 0.0
) -> dict[str, Any]:
    """A ring that loses rank `which`, and how this rank was told; till then all bytes are right."""
    transport = transport_of()
    assert transport_of(None, deadline) is transport
    transport.layer = 7
    for t in range(3):
        swap(transport, t)
    mark("running")
    began = time.monotonic()
    try:
        for t in range(3, 10**6):
            if rank == which and t == 20 and when not in ("kill", "pause"):
                _fail(when, sleep, transport)
            swap(transport, t)
    except RingPeerLost as error:
        lost = error
    else:
        raise AssertionError("nothing was lost")
    told = time.monotonic() - began
    again = time.monotonic()
    for call in (lambda: swap(transport, 0), lambda: transport.agree({}, "again")):
        with pytest.raises(RingPeerLost) as error:
            call()
        assert error.value.ranks == lost.ranks
    return {
        "ranks": lost.ranks,
        "layer": lost.layer,
        "step": lost.step,
        "seconds": lost.seconds,
        "text": str(lost),
        "told": told,
        "again": time.monotonic() - again,
    }


def _fail(when: str, sleep: float, transport: Transport) -> None:
    if when == "inside":
        # Its own part is posted; whatever of it arrived is right.
        others = [r for r in range(transport.size) if r != transport.rank]
        transport.exchange(
            {r: message(transport.rank, r, count(transport.rank, r, 20)) for r in others},
            {r: torch.zeros(count(r, transport.rank, 20), dtype=torch.int8) for r in others},
            "swap 20",
        )
    match when:
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "slow":
            time.sleep(sleep)
        case _:
            os.kill(os.getpid(), signal.SIGKILL)


def out_of_step(rank: int, size: int) -> dict[str, Any]:
    """One rank calls once less than the others, who wait for it in vain."""
    transport = transport_of(None, 1.0)
    swap(transport, 0)
    try:
        if rank != 1:
            swap(transport, 1)
        transport.agree({}, "ring_attention")
    except RingPeerLost as error:
        return {"ranks": error.ranks, "text": str(error), "seconds": error.seconds}
    raise AssertionError("ranks out of step went on")


def interrupted(rank: int, size: int) -> dict[str, Any]:
    """Rank 1 presses Ctrl-C in a wait, rank 0 is told."""
    transport = transport_of(None, 5.0)
    swap(transport, 0)
    if rank == 1:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            transport.agree({}, "ring_attention")
        except KeyboardInterrupt:
            try:
                swap(transport, 1)
            except RingPeerLost as error:
                return {"ranks": error.ranks, "text": str(error)}
        raise AssertionError("not interrupted")
    time.sleep(1.0)
    try:
        swap(transport, 1)
    except RingPeerLost as error:
        return {"ranks": error.ranks, "text": str(error), "seconds": error.seconds}
    raise AssertionError("an interrupted ring went on")


def left(rank: int, size: int) -> dict[str, Any]:
    """Rank 1 fails amid its exchanges, and says so; the others wait with a long deadline."""
    transport = transport_of(None, 30.0)
    swap(transport, 0)
    if rank == 1:
        others = [r for r in range(size) if r != rank]
        sends = {r: message(rank, r, count(rank, r, 1)) for r in others}
        receives = {r: torch.empty(count(r, rank, 1), dtype=torch.int8) for r in others}
        transport.exchange(sends, receives, "never waited for")
        transport.leave("it ran out of memory")
    try:
        for t in range(1, 9):
            swap(transport, t)
    except RingPeerLost as error:
        return {"ranks": error.ranks, "text": str(error), "seconds": error.seconds}
    raise AssertionError("a rank that left wasn't missed")


def part_loses(rank: int, size: int) -> dict[str, Any]:
    """A ring of ranks 1 to 3 of the world, of which its last leaves."""
    part = dist.new_group([1, 2, 3])
    if rank == 0:
        # It hosts the store.
        time.sleep(2.0)
        return {}
    transport = transport_of(part)
    assert transport.rank == rank - 1
    if rank == 3:
        transport.leave("it ran out of memory")
        return {}
    with pytest.raises(RingPeerLost) as error:
        transport.agree({}, "ring_attention")
    return {"ranks": error.value.ranks, "text": str(error.value)}


def too_short(rank: int, size: int) -> dict[str, Any]:
    """Rank 0 sends 40 bytes where 400 are awaited."""
    transport = transport_of(None, 2.0)
    try:
        if rank == 0:
            transport.exchange({1: message(0, 1, 40)}, {}, "keys").wait()
            swap(transport, 0)
        else:
            transport.exchange({}, {0: torch.empty(400, dtype=torch.int8)}, "keys").wait()
    except RingPeerLost as error:
        return {"ranks": error.ranks, "text": str(error)}
    raise AssertionError("a short message passed")


def absent(rank: int, size: int) -> dict[str, Any]:
    if rank == 2:
        time.sleep(3.5)
        return {}
    group = dist.group.WORLD
    assert group is not None
    try:
        GlooTransport(group, 1.0, patience=1.0)
    except RingPeerLost as error:
        return {"ranks": error.ranks, "text": str(error), "seconds": error.seconds}
    raise AssertionError("a ring without rank 2")


def restarted(rank: int, size: int, port: int, attempt: int, last: bool) -> int:
    """One attempt of a job under torchrun: but in the last one a rank dies."""
    agent = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    agent |= {"TORCHELASTIC_RESTART_COUNT": attempt, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in agent.items()})
    init(timeout=20.0)
    transport = transport_of()
    for t in range(5):
        if rank == attempt % size and t == 3 and not last:
            os.kill(os.getpid(), signal.SIGKILL)
        swap(transport, t)
    dist.destroy_process_group()
    return attempt


def other_world(rank: int, size: int, port: int) -> str:
    """The last rank believes in one process more than the others."""
    agent = {"RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    agent |= {"WORLD_SIZE": size + (rank == size - 1), "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in agent.items()})
    if rank == size - 1:
        time.sleep(0.5)
    with pytest.raises((RingMismatch, RuntimeError)) as error:
        init(timeout=2.0)
    return f"{error.type.__name__}: {error.value}"


def other_backend(rank: int, size: int) -> str:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    with pytest.raises(ValueError, match="group: ") as error:
        transport_of()
    return str(error.value)


class Event:
    """Of a device that is as far as the host, or stands still."""

    reached = True

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return Event.reached


class Hung:
    """A work that never ends."""

    def is_completed(self) -> bool:
        return False

    def wait(self) -> None:
        pass


def nccl(rank: int, size: int) -> dict[str, Any]:
    """The NCCL transport, on processors: gloo's point-to-point in the place of NCCL's."""
    from attnspan.ring import nccl

    nccl._device = lambda: torch.device("cpu")
    torch.cuda.Event = Event
    group = dist.group.WORLD
    assert group is not None
    transport = nccl.NcclTransport(group, 1.0)
    for t in range(4):
        swap(transport, t)
    out = transport.gather(torch.full((2, 3), float(rank)), "rows")
    assert out[:, 1, 2].tolist() == list(range(size))
    transport.agree({"k": "same"}, "ring_attention")
    with pytest.raises(RingMismatch, match="calls with k"):
        transport.agree({"k": str(rank == 0)}, "ring_attention")
    swap(transport, 1)
    meta = torch.empty(4, dtype=torch.int8, device="meta")
    with pytest.raises(ValueError, match="over NCCL those on CUDA devices are allowed"):
        transport.exchange({(rank + 1) % size: meta}, {}, "keys")
    assert transport.waited > 0
    assert transport.sent > 0

    # Nothing is lost while the device is still at what came before.
    dist.batch_isend_irecv = lambda batch: [Hung()]
    Event.reached = False
    other, before = (rank + 1) % size, (rank - 1) % size
    give, take = torch.zeros(9, dtype=torch.int8), torch.zeros(9, dtype=torch.int8)
    transport.layer = 3
    transport.exchange({other: give}, {before: take}, "keys").wait()
    transport.layer = 4
    time.sleep(1.5)
    transport.exchange({}, {}, "nothing")
    Event.reached = True
    transport.exchange({}, {}, "nothing")
    time.sleep(1.5)
    with pytest.raises(RingPeerLost) as error:
        transport.exchange({}, {}, "nothing")
    with pytest.raises(RingPeerLost):
        transport.agree({}, "again")
    return {"text": str(error.value), "layer": error.value.layer, "step": error.value.step}


def costs(rank: int, size: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each kind of call, and the share of a processor that they took."""
    from statistics import median

    transport = transport_of()
    facts = {"q": "(1, 8, 512, 64) bfloat16", "pattern": "SlidingWindow(4096) | Sinks(4)"}
    other, before = (rank + 1) % size, (rank - 1) % size
    give, take = torch.zeros(2 << 20, dtype=torch.int8), torch.empty(2 << 20, dtype=torch.int8)
    small = torch.zeros(32, 65)
    calls = {
        "agree": lambda: transport.agree(facts, "ring_attention"),
        "exchange 2 MB": lambda: transport.exchange({other: give}, {before: take}, "x").wait(),
        "exchange 0 B": lambda: transport.exchange({}, {}, "x").wait(),
        "gather 8 KB": lambda: transport.gather(small, "x"),
    }
    result = {}
    for name, call in calls.items():
        times = []
        cpu = time.process_time()
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        result[name] = 1e3 * median(times)
        result[f"{name} CPU"] = 1e3 * (time.process_time() - cpu) / repeats
    return result


def even(rank: int, size: int, sleep: float) -> None:
    time.sleep(sleep)
    if rank % 2:
        raise ValueError(f"no even number: {rank}")


def leaving(store: str, rank: int) -> None:
    """Rank 1 hangs; rank 0 ends its program without taking anything down."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    lost, dropped = transport_of(group, 1.0), GlooTransport(group)
    lost.agree({}, "ring_attention")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    take = torch.empty(8, dtype=torch.int8)
    dropped.exchange({}, {1: take}, "never waited for")
    with pytest.raises(RingPeerLost, match="rank 1 lost"):
        lost.exchange({}, {1: take}, "keys").wait()
    print("about to exit", time.time(), flush=True)


if __name__ == "__main__":
    leaving(sys.argv[1], int(sys.argv[2]))
