"""A ring on GPUs: a million tokens on simulated ranks of one, or real ranks of several over NCCL.

    python benchmarks/ring_gpu.py                                   # one GPU, 8 simulated ranks
    torchrun --nproc-per-node 2 benchmarks/ring_gpu.py              # as many GPUs, over NCCL

Writes benchmarks/results/ring_gpu.json, or ring_nccl.json. Errors are against float64 on sampled
rows; "computing alone" is the same ring with exchanges that move nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from record import write
from sampled import rows
from torch import Tensor

from attnspan import Contiguous, ZigZag, attention, ring_attention
from attnspan.patterns import Causal, Full, Pattern, Sinks, SlidingWindow
from attnspan.ring import Layout, Transport, init
from attnspan.ring.groups import transport_of
from attnspan.ring.simulated import simulate
from attnspan.ring.transport import Pending

HEADS, KV_HEADS, DIM = 32, 8, 128


class Silent(Transport):
    """Moves nothing: what is left is the computing."""

    def __init__(self, like: Transport) -> None:
        self.rank, self.size = like.rank, like.size

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], step: str
    ) -> Pending:
        for buffer in receives.values():
            buffer.zero_()
        return _Nothing()

    def gather(self, x: Tensor, step: str) -> Tensor:
        return x.expand(self.size, *x.shape)

    def agree(self, facts: Mapping[str, str], by: str) -> None:
        return None


class _Nothing(Pending):
    def wait(self) -> None:
        return None


def inputs(n: int, heads: tuple[int, int], dim: int = DIM) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    counts = heads[0], heads[1], heads[1], heads[0]
    return [
        torch.randn(1, h, n, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
        for h in counts
    ]


def solved(given: list[Tensor], attend: Callable[..., Tensor]) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in given[:3]]
    out = attend(*leaves)
    out.backward(given[3])
    return [out.detach(), *(x.grad for x in leaves)]  # type: ignore[misc]


def timed(what: Callable[[], object]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    what()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


def row_errors(out: Tensor, given: list[Tensor], pattern: Pattern) -> float:
    """The largest error of some rows of `out`, against float64."""
    at = torch.linspace(0, out.shape[2] - 1, 17, device="cuda").long()
    exact, _, _ = rows(*given[:3], pattern, at)  # type: ignore[misc]
    return float((out[0, :, at].double() - exact).abs().max())


def apart(a: Tensor, b: Tensor) -> float:
    """The norm of the difference over that of `b`, a head at a time."""
    off = sum(float((x.float() - y.float()).norm()) ** 2 for x, y in zip(a[0], b[0], strict=True))
    return (off / sum(float(y.float().norm()) ** 2 for y in b[0])) ** 0.5


def simulated(n: int, world: int, heads: tuple[int, int]) -> dict[str, Any]:
    given, pattern, layout = inputs(n, heads), Causal(), ZigZag()

    def single() -> list[Tensor]:
        return solved(given, lambda *x: attention(*x, pattern, impl="hopper"))

    small = [x[:, :, :1024] for x in given]
    solved(small, lambda *x: attention(*x, pattern, impl="hopper"))
    # Compiled by one thread: Triton's first compilation of a kernel isn't safe among several.
    simulate(1, lambda t: solved(small, lambda *x: ring_attention(*x, group=t)))
    simulate(1, lambda t: solved(small, lambda *x: ring_attention(*x, Full(), group=t)))
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    one: list[Tensor] = []
    one_seconds = timed(lambda: one.extend(single()))
    one_peak = torch.cuda.max_memory_allocated()  # the inputs belong to it
    shards = [[layout.shard(x, 2, rank, world) for x in given] for rank in range(world)]

    def work(t: Transport) -> list[Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ring_attention(q, k, v, pattern, group=t, layout=layout, schedule="ring")

        return solved(shards[t.rank], attend)

    held = torch.cuda.memory_allocated() - base  # what doesn't belong to the ranks: one's results
    others = held - sum(x.nbytes for each in shards for x in each) + base
    torch.cuda.reset_peak_memory_stats()
    ranks: list[list[Tensor]] = []
    seconds = timed(lambda: ranks.extend(simulate(world, work)))
    peak = torch.cuda.max_memory_allocated() - others
    results = [layout.unshard([each[i] for each in ranks], 2) for i in range(4)]
    names = ("out", "grad_q", "grad_k", "grad_v")
    return {
        "tokens": n,
        "ranks": world,
        "heads": heads,
        "pattern": str(pattern),
        "one_call_seconds": one_seconds,
        "ring_seconds": seconds,
        "one_call_row_error": row_errors(one[0], given, pattern),
        "ring_row_error": row_errors(results[0], given, pattern),
        "apart": {k: apart(a, b) for k, a, b in zip(names, results, one, strict=True)},
        "one_call_bytes": one_peak,
        "ring_bytes_per_rank": peak // world,
    }


def real(n: int, bursts: int) -> dict[str, Any]:
    init("nccl")
    t = transport_of(None, 60.0)
    found = []
    cases: tuple[tuple[Pattern, Layout], ...] = (
        (Causal(), ZigZag()),
        (SlidingWindow(4096), Contiguous()),
        (SlidingWindow(4096) | Sinks(4), Contiguous()),
    )
    for pattern, layout in cases:
        found.append(_real(t, n, pattern, layout, bursts))
        if t.rank == 0:
            print(found[-1], flush=True)
    return {"ranks": t.size, "tokens": n, "heads": (HEADS, KV_HEADS), "rows": found}


def _real(t: Transport, n: int, pattern: Pattern, layout: Layout, bursts: int) -> dict[str, Any]:
    given = inputs(n, (HEADS, KV_HEADS))
    mine = [layout.shard(x, 2, t.rank, t.size) for x in given]
    silent = Silent(t)

    def over(transport: Transport) -> Callable[..., Tensor]:
        return lambda q, k, v: ring_attention(
            q, k, v, pattern, group=transport, layout=layout, schedule="ring"
        )

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, pattern, impl="hopper")

    one = solved(given, whole)
    ring = solved(mine, over(t))
    shards = [layout.shard(x, 2, t.rank, t.size) for x in one]
    off = [apart(a, b) for a, b in zip(ring, shards, strict=True)]
    del one, ring, shards
    solved(mine, over(silent))
    ways: dict[str, tuple[list[Tensor], Callable[..., Tensor]]] = {
        "one_gpu": (given, whole),
        "ring": (mine, over(t)),
        "computing_alone": (mine, over(silent)),
    }
    times: dict[str, list[float]] = {f"{name}_{what}": [] for name in ways for what in ("f", "fb")}
    t.sent = 0
    for burst in range(bursts):
        for name, (x, attend) in list(ways.items())[:: 1 if burst % 2 else -1]:
            dist.barrier()
            with torch.no_grad():
                times[f"{name}_f"].append(timed(lambda a=attend, x=x: a(*x[:3])))
            dist.barrier()
            times[f"{name}_fb"].append(timed(lambda a=attend, x=x: solved(x, a)))
    table = torch.tensor([[statistics.median(x) for x in times.values()]], dtype=torch.float64)
    slowest = t.gather(table.cuda(), "times").amax((0, 1)).tolist()
    seconds = dict(zip(times, slowest, strict=True))
    return {
        "pattern": str(pattern),
        "layout": type(layout).__name__,
        "apart": dict(zip(("out", "grad_q", "grad_k", "grad_v"), off, strict=True)),
        "sent_bytes": t.sent // bursts,
        "seconds": seconds,
        "share_of_even": {
            what: seconds[f"one_gpu_{what}"] / t.size / seconds[f"ring_{what}"]
            for what in ("f", "fb")
        },
        "exposed": {
            what: 1 - seconds[f"computing_alone_{what}"] / seconds[f"ring_{what}"]
            for what in ("f", "fb")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=0, help="of the sequence")
    parser.add_argument("--ranks", type=int, default=8, help="that are simulated")
    parser.add_argument("--bursts", type=int, default=7)
    given = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        found, name = real(given.tokens or 2**17, given.bursts), "ring_nccl.json"
        if dist.get_rank() == 0:
            print(write(name, found))
        dist.destroy_process_group()
    else:
        found = simulated(given.tokens or 2**20, given.ranks, (8, 2))
        print(found)
        print(write("ring_gpu.json", found))


if __name__ == "__main__":
    main()
