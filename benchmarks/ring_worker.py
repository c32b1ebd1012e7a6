"""What `ring.py` runs in each process, under torch.distributed.run.

    ring_worker.py exact FOLDER                    # errors and bytes of every peer and pattern
    ring_worker.py fault FOLDER --peer NAME ...    # rank 1 goes; when do the others see it?

Rank 0 writes FOLDER/rows.json, or each survivor FOLDER/RANK.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import struct
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ring_peers import PEERS, Lacking, Peer, patterns
from torch import Tensor

from attnspan.kernels.reference import reference
from attnspan.patterns import Causal, Pattern
from attnspan.ring.check import Shape, counted_bytes
from attnspan.ring.groups import transport_of

SHAPE = Shape(tokens=1024, heads=4, kv_heads=2, head_dim=32)
VICTIM, WARM = 1, 3
# linux/tcp.h: where `tcpi_bytes_acked` lies in `tcp_info`.
ACKED = 120


def acknowledged() -> int:
    """Bytes that this process's TCP connections have sent and peers have acknowledged.

    Asked of the kernel, so that every peer is measured alike, whatever it calls.
    """
    before = -1
    while (now := _acknowledged()) != before:
        before = now
        time.sleep(0.05)
    return now


def _acknowledged() -> int:
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(fd))) as each:
                info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, ACKED + 8)
        except OSError:  # closed meanwhile, or no TCP
            continue
        total += struct.unpack_from("Q", info, ACKED)[0] if len(info) == ACKED + 8 else 0
    return total


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = SHAPE.heads, SHAPE.kv_heads, SHAPE.kv_heads, SHAPE.heads
    shapes = [(1, h, SHAPE.tokens, SHAPE.head_dim) for h in counts]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def defined(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    return reference(q, k, v, pattern, cast=False)[0]


def solved(given: list[Tensor], attend: Callable[..., Tensor]) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in given[:3]]
    out = attend(*leaves)
    out.backward(given[3].to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def row(peer: Peer, pattern: Pattern, whole: list[Tensor], exact: list[Tensor]) -> dict[str, Any]:
    """On this rank: errors against float64, bytes sent, or what it says instead."""
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        layout, attend = peer.prepared(pattern, SHAPE.tokens)
    except Lacking as lack:
        return {"lacks": str(lack)}
    found: dict[str, Any] = {"layout": type(layout).__name__}
    # In float32, forward, once more backward, and the gradients: a third each.
    once = sum(counted_bytes(pattern, layout, size, SHAPE)) / size / 3
    forward = once * whole[0].itemsize / 4
    found["counted"] = {"forward": forward, "both": 2 * forward + once}
    given = [layout.shard(x, 2, rank, size) for x in whole]
    right = [layout.shard(x, 2, rank, size) for x in exact]
    try:
        attend(*given[:3])  # connections are made
        before = acknowledged()
        out = attend(*given[:3])
        found["sent"] = {"forward": acknowledged() - before}
        found["error"] = {"forward": _apart(out, right[0])}
    except (NotImplementedError, RuntimeError) as error:
        return {**found, "refused": f"{type(error).__name__}: {error}"}
    try:
        before = acknowledged()
        handed = transport_of().sent
        results = solved(given, attend)
    except (NotImplementedError, RuntimeError) as error:
        return {**found, "backward_refused": f"{type(error).__name__}: {error}"}
    found["sent"]["both"] = acknowledged() - before
    if peer.name == "attnspan":
        # Without the headers and agreements that the sockets count.
        found["sent"]["keys, values and gradients"] = transport_of().sent - handed
    apart = [_apart(a, b) for a, b in zip(results[1:], right[1:], strict=True)]
    found["error"]["gradients"] = max(apart)
    return found


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).abs().max())


def joined(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest error, the mean bytes; what is text is rank 0's."""
    first = ranks[0]
    if "error" in first:
        largest = {k: max(rank["error"][k] for rank in ranks) for k in first["error"]}
        mean = {k: sum(rank["sent"][k] for rank in ranks) / len(ranks) for k in first["sent"]}
        return {**first, "error": largest, "sent": mean}
    return first


def exact(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    asked = patterns(SHAPE.tokens)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        whole = inputs(dtype)
        for name, pattern in asked.items():
            right = solved([x.double() for x in whole], partial(defined, pattern=pattern))
            for peer in PEERS:
                if dtype not in peer.dtypes:
                    continue
                ranks: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(ranks, row(peer, pattern, whole, right))
                about = {"processes": len(ranks), "peer": peer.name, "over": peer.over}
                about |= {"pattern": name, "dtype": str(dtype).removeprefix("torch.")}
                rows.append({**about, **joined(ranks)})
    if dist.get_rank() == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def fault(folder: Path, peer: Peer, how: str, timeout: float | None, leaves: bool) -> None:
    """Calls forwards; rank 1 goes before one, and the others note what they see, and when."""
    rank_pid = folder / f"{os.environ['RANK']}.pid"
    rank_pid.write_text(str(os.getpid()))
    given = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    dist.init_process_group("gloo", **given)
    rank, size = dist.get_rank(), dist.get_world_size()
    layout, attend = peer.prepared(Causal(), SHAPE.tokens)
    shards = [layout.shard(x, 2, rank, size) for x in inputs(torch.bfloat16)[:3]]
    for _ in range(WARM):
        attend(*shards)
    dist.barrier()
    if rank == VICTIM:
        time.sleep(0.5)  # the others wait for it, amid their call
        (folder / "gone").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    try:
        attend(*shards)
        seen = {"error": None, "text": "it returned a result"}
    except Exception as error:
        seen = {"error": type(error).__name__, "text": str(error)}
    seen["at"] = time.monotonic()
    part = folder / f"{rank}.part"
    part.write_text(json.dumps(seen))
    part.rename(folder / f"{rank}.json")
    if leaves:
        os._exit(1)
    time.sleep(3600)  # ring.py ends it


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("exact", "fault"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", default="attnspan")
    parser.add_argument("--how", choices=("kill", "stop"), default="kill")
    parser.add_argument("--timeout", type=float)
    parser.add_argument("--leaves", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # FlexAttention warns where it isn't compiled; what it computes is the same.
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    if args.what == "exact":
        exact(args.folder)
    else:
        peer = next(peer for peer in PEERS if peer.name == args.peer)
        fault(args.folder, peer, args.how, args.timeout, args.leaves)
