"""NCCL between real GPUs, by hand: torchrun --nproc-per-node=2 tests/ring/nccl_check.py

Rank 0 prints one line for each check that holds. With `exchange` or `agree` as its argument the
last rank hangs there in the end: the others raise after the deadline, and exit. `torchrun` then
waits for the rank that hangs: run it under `timeout`.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from attnspan.ring.groups import init, transport_of
from attnspan.ring.nccl import NcclTransport
from attnspan.ring.transport import RingMismatch, RingPeerLost

DEADLINE = 5.0


def say(what: str) -> None:
    if dist.get_rank() == 0:
        print(f"OK {what}", flush=True)


def message(source: int, target: int, count: int) -> torch.Tensor:
    values = torch.arange(count, device="cuda") * 7 + source * 31 + target * 57
    return (values % 251 - 125).to(torch.int8)


def exchanges(transport: NcclTransport) -> None:
    me = transport.rank
    others = [r for r in range(transport.size) if r != me]
    for count in (1, 1001, 4 << 20):
        sends = {r: message(me, r, count + me) for r in others}
        receives = {r: torch.zeros(count + r, dtype=torch.int8, device="cuda") for r in others}
        transport.exchange(sends, receives, "keys").wait()
        assert all(torch.equal(receives[r], message(r, me, count + r)) for r in others)
    say("exchange of 1 B, 1 kB and 4 MB, all with all")

    # To the next rank alone, while the last one sends nothing.
    target, source = (me + 1) % transport.size, (me - 1) % transport.size
    last = transport.size - 1
    take = torch.zeros(64, dtype=torch.int8, device="cuda")
    sends = {target: message(me, target, 64)} if me != last else {}
    transport.exchange(sends, {source: take} if source != last else {}, "keys").wait()
    if source != last:
        assert torch.equal(take, message(source, me, 64))
    transport.exchange({}, {}, "nothing").wait()
    say("exchange of some, and of none")

    # What is sent is written by the stream just before, and read by it just after.
    n = 16 << 20
    for t in range(20):
        give = torch.full((n,), t, dtype=torch.int8, device="cuda") + me
        take = torch.empty(n, dtype=torch.int8, device="cuda")
        pending = transport.exchange({target: give}, {source: take}, f"round {t}")
        busy = torch.ones(2048, 2048, device="cuda") @ torch.ones(2048, 2048, device="cuda")
        pending.wait()
        assert (take == t + source).all(), t
        assert busy[0, 0] == 2048
    say("20 exchanges of 16 MB in the order of the stream")

    began = time.perf_counter()
    pendings = []
    for _ in range(20):
        pending = transport.exchange({target: give}, {source: take}, "timed")
        pending.wait()
        pendings.append(pending)
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    whole = time.perf_counter() - began
    rate = 20 * n / whole / 1e9
    say(
        f"an exchange takes {1e3 * whole / 20:.2f} ms, {rate:.0f} GB/s; "
        f"the host stands {1e3 * host / 20:.2f} ms of it"
    )


def gathers(transport: NcclTransport) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        x = (torch.arange(6, device="cuda").view(2, 3) + transport.rank).to(dtype)
        out = transport.gather(x, "rows")
        rows = [x - transport.rank + r for r in range(transport.size)]
        assert torch.equal(out, torch.stack(rows))
        assert out.device == x.device
    say("gather")


def agreements(transport: NcclTransport) -> None:
    transport.agree({"k": "same"}, "ring_attention")
    began = time.perf_counter()
    for _ in range(50):
        transport.agree({"k": "same"}, "ring_attention")
    say(f"agree, {1e3 * (time.perf_counter() - began) / 50:.2f} ms")
    last = transport.rank == transport.size - 1
    with pytest.raises(RingMismatch, match="calls with k") as error:
        transport.agree({"k": "(1, 9)" if last else "(1, 8)"}, "ring_attention")
    say(f"agree refuses: {error.value}")


def meshes(transport: NcclTransport) -> None:
    mesh = init_device_mesh("cuda", (1, transport.size), mesh_dim_names=("data", "ring"))
    ring = transport_of(mesh["ring"])
    assert (ring.rank, ring.size) == (transport.rank, transport.size)
    assert transport_of(mesh["ring"]) is ring
    ring.agree({"k": "same"}, "ring_attention")
    rows = ring.gather(torch.full((2,), ring.rank, device="cuda"), "rows")
    assert rows[:, 0].tolist() == list(range(ring.size))
    say("the ring of a mesh")


def lost(transport: NcclTransport, where: str) -> None:
    if transport.rank == transport.size - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    other = (transport.rank + 1) % transport.size
    source = (transport.rank - 1) % transport.size
    began = time.monotonic()
    try:
        if where == "agree":
            transport.agree({"k": "same"}, "ring_attention")
        take = torch.zeros(1 << 20, dtype=torch.int8, device="cuda")
        transport.exchange({other: take.clone()}, {source: take}, "keys").wait()
        while True:
            time.sleep(0.1)
            transport.exchange({}, {}, "nothing")
    except RingPeerLost as error:
        print(f"OK lost in {where} after {time.monotonic() - began:.1f} s: {error}", flush=True)
    began = time.monotonic()
    torch.cuda.synchronize()
    print(f"OK the device is free again after {time.monotonic() - began:.1f} s", flush=True)


def main() -> None:
    backend = os.environ.get("ATTNSPAN_CHECK_BACKEND", "nccl")
    init(backend)
    transport = transport_of(deadline=DEADLINE)
    assert isinstance(transport, NcclTransport)
    say(f"transport of {transport.size} ranks over {backend}")
    exchanges(transport)
    gathers(transport)
    agreements(transport)
    meshes(transport)
    if len(sys.argv) > 1:
        lost(transport, sys.argv[1])
        # The communicator is aborted: nothing of it is left to take down.
        os._exit(0)
    dist.barrier()
    dist.destroy_process_group()
    print(f"OK rank {transport.rank} exits", flush=True)


if __name__ == "__main__":
    main()
