"""What `attnspan ring check` runs in each process: is a ring exact here, and what does it cost?

python -m torch.distributed.run --standalone --nproc-per-node 4 -m attnspan.ring.check --out F
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from attnspan.dispatch import attention
from attnspan.patterns import (
    Causal,
    Documents,
    Full,
    Longformer,
    Pattern,
    Sinks,
    SlidingWindow,
    Strided,
)
from attnspan.planner.links import to_dict
from attnspan.planner.ring import Heads, cost
from attnspan.ring.attention import ring_attention
from attnspan.ring.choice import work_of
from attnspan.ring.exchange import plan_exchange
from attnspan.ring.groups import init, transport_of
from attnspan.ring.layout import Contiguous, Layout, Striped, ZigZag
from attnspan.ring.measure import measured
from attnspan.ring.transport import Transport

_DEADLINE = 120.0
_SMALL = 16  # tokens of a chunk where exactness is looked at
_ROUNDS = 3


@dataclass(frozen=True)
class Shape:
    """Of the attention whose cost is measured."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int


def exactness(t: Transport) -> list[dict[str, Any]]:
    """Results and gradients beside the definition's, over patterns, layouts and schedules."""
    n = 2 * _SMALL * t.size
    half = Documents((n // 3, n - n // 3))
    rows = []
    for pattern, layout, schedule in (
        (Causal(), Contiguous(), "ring"),
        (Causal(), ZigZag(), "ring"),
        (Causal(), Striped(), "ring"),
        (Causal(), ZigZag(), "allgather"),
        (Causal(), ZigZag(), "ulysses"),
        (Full(), Contiguous(), "ring"),
        (SlidingWindow(5), Contiguous(), "ring"),
        (SlidingWindow(n // 2), ZigZag(), "ring"),
        (SlidingWindow(9) | Sinks(4), Contiguous(), "ring"),
        (Longformer(9, (0, n // 2)), ZigZag(), "ring"),
        (half, ZigZag(), "ring"),
        (Strided(4, 16), Contiguous(), "ring"),
    ):
        q, k, v, grad = _normal(t, n, (2 * t.size, t.size), 32)
        exact = _solved((q, k, v), grad, partial(_defined, pattern=pattern))
        single = _solved((q, k, v), grad, partial(attention, pattern=pattern))

        options: dict[str, Any] = {"group": t, "layout": layout, "schedule": schedule}
        *given, own_grad = (layout.shard(x, 2, t.rank, t.size) for x in (q, k, v, grad))
        mine = _solved(given, own_grad, partial(ring_attention, pattern=pattern, **options))
        shards = [layout.shard(x, 2, t.rank, t.size) for x in exact]
        errors = [float((a.double() - b).abs().max()) for a, b in zip(mine, shards, strict=True)]
        alone = max(float((a.double() - b).abs().max()) for a, b in zip(single, exact, strict=True))
        worst = float(t.gather(torch.tensor(max(errors)), "errors").max())
        rows.append(
            {
                "pattern": str(pattern),
                "layout": type(layout).__name__,
                "schedule": schedule,
                "error": worst,
                "one_process": alone,
            }
        )
    return rows


def leaks(t: Transport) -> list[dict[str, Any]]:
    """Changes one token after the other, and counts outputs that move against the pattern."""
    n = _SMALL * t.size
    rows = []
    for pattern, layout in (
        (Causal(), ZigZag()),
        (SlidingWindow(7) | Sinks(2), Contiguous()),
        (Documents((n // 3, n - n // 3)), Striped()),
    ):
        q, k, v, _ = _normal(t, n, (2, 1), 16)
        places = torch.from_numpy(layout.positions(n, t.rank, t.size))

        def outputs(k: Tensor, v: Tensor, p: Pattern = pattern, at: Layout = layout, q: Tensor = q):
            q, k, v = (at.shard(x, 2, t.rank, t.size) for x in (q, k, v))
            return ring_attention(q, k, v, p, group=t, layout=at, schedule="ring")

        before, wrong = outputs(k, v), 0
        tried = range(0, n, max(1, n // 8))
        for token in tried:
            changed = k.clone(), v.clone()
            for x in changed:
                x[:, :, token] += 1
            moved = (outputs(*changed) != before).any(-1).any(1)[0]
            wrong += int((moved != torch.as_tensor(pattern.sees(places, token))).sum())
        wrong = int(t.gather(torch.tensor(wrong), "leaks").sum())
        rows.append(
            {
                "pattern": str(pattern),
                "layout": type(layout).__name__,
                "tokens_changed": len(tried),
                "outputs_wrong": wrong,
            }
        )
    return rows


def costs(t: Transport, shape: Shape) -> list[dict[str, Any]]:
    """A forward and a backward on the ring beside the same on one process, in turns."""
    n = shape.tokens
    window = max(2, n // t.size // 4)
    rows = []
    for pattern, layout in (
        (Causal(), ZigZag()),
        (SlidingWindow(window), Contiguous()),
        (SlidingWindow(window) | Sinks(4), ZigZag()),
    ):
        rows.append(_cost(t, shape, pattern, layout))
    return rows


def _cost(t: Transport, shape: Shape, pattern: Pattern, layout: Layout) -> dict[str, Any]:
    n, dim = shape.tokens, shape.head_dim

    def leaves(tokens: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        counts = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
        return [torch.randn(1, h, tokens, dim, generator=generator) for h in counts]

    def run(given: list[Tensor], attend: Callable[..., Tensor]) -> None:
        *qkv, grad = given
        qkv = [x.requires_grad_() for x in qkv]
        attend(*qkv).backward(grad)

    def ringed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, pattern, group=t, layout=layout, schedule="ring")

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, pattern)

    part = n // t.size
    peak = _peak(lambda: run(leaves(part, t.rank), ringed))
    alone_peak = _peak(lambda: run(leaves(n, 0), whole)) if t.rank == 0 else 0
    shards, everything = leaves(part, t.rank), leaves(n, 0) if t.rank == 0 else []
    figures, alone = [], []
    for _ in range(_ROUNDS):
        dist.barrier()
        t.sent, t.waited = 0, 0.0
        figures.append((*_timed(lambda: run(shards, ringed)), t.waited, float(t.sent)))
        dist.barrier()
        if t.rank == 0:
            alone.append(_timed(lambda: run(everything, whole)))
    seconds, cpu, waited, sent = (statistics.median(x) for x in zip(*figures, strict=True))
    holdings = layout.chunks(n, t.size)
    pairs = plan_exchange(pattern, n, holdings, t.rank).pairs
    mine = torch.tensor(
        [seconds, cpu, waited, sent, float(pairs), float(peak)], dtype=torch.float64
    )
    table = t.gather(mine, "what it costs").T.tolist()
    heads = Heads(shape.heads, shape.kv_heads, dim, 4)
    machine = measured(t, shards[0])
    work = work_of(pattern, n, holdings)
    predicted = sum(
        cost("ring", lambda size: work, t.size, heads, machine, back).seconds
        for back in (False, True)
    )
    row = {
        "pattern": str(pattern),
        "layout": type(layout).__name__,
        "seconds": max(table[0]),
        "seconds_predicted": predicted,
        "cpu_seconds": sum(table[1]),
        "waited_share": max(w / s for w, s in zip(table[2], table[0], strict=True)),
        "sent_bytes": [int(x) for x in table[3]],
        "sent_bytes_counted": counted_bytes(pattern, layout, t.size, shape),
        "imbalance": max(table[4]) / statistics.mean(table[4]) - 1,
        "peak_tensor_bytes": int(max(table[5])),
    }
    if t.rank == 0:
        row |= {
            "one_process_seconds": statistics.median(x for x, _ in alone),
            "one_process_cpu_seconds": statistics.median(x for _, x in alone),
            "one_process_peak_tensor_bytes": alone_peak,
        }
    return row


def counted_bytes(pattern: Pattern, layout: Layout, size: int, shape: Shape) -> list[int]:
    """What each rank has to send forward and backward, in float32, counted pair by pair of ranks.

    Independent of the plan: a key counts for each other rank of which some query sees it.
    """
    n = shape.tokens
    places = [layout.positions(n, rank, size) for rank in range(size)]
    needs = np.zeros((size, size), np.int64)
    for rank, queries in enumerate(places):
        for source, keys in enumerate(places):
            if rank == source:
                continue
            seen = np.zeros(len(keys), bool)
            for start in range(0, len(queries), 256):
                seen |= pattern.sees(queries[start : start + 256, None], keys).any(0)
            needs[rank, source] = seen.sum()
    token = 2 * shape.kv_heads * shape.head_dim * 4
    # Keys and values forward, once more backward, and their gradients the other way.
    return ((2 * needs.sum(0) + needs.sum(1)) * token).tolist()


def _normal(t: Transport, n: int, heads: tuple[int, int], dim: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    counts = heads[0], heads[1], heads[1], heads[0]
    q, k, v, grad = (torch.randn(1, h, n, dim, generator=generator) for h in counts)
    return q, k, v, grad


def _defined(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    return attention(q.double(), k.double(), v.double(), pattern, impl="reference")


def _solved(given: Any, grad: Tensor, attend: Callable[..., Tensor]) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in given]
    out = attend(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def _timed(what: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and those of the processor."""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    before, began = cpu(), time.perf_counter()
    what()
    return time.perf_counter() - began, cpu() - before


def _peak(what: Callable[[], object]) -> int:
    """The most bytes that torch's tensors on the host hold at once, above the start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        what()
    held = most = 0
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    for name, usual in (("tokens", 8192), ("heads", 8), ("kv-heads", 2), ("head-dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    given = parser.parse_args()
    shape = Shape(given.tokens, given.heads, given.kv_heads, given.head_dim)
    torch.set_num_threads(1)
    init("gloo")
    t = transport_of(None, _DEADLINE)
    found = {
        "processes": t.size,
        "shape": vars(shape),
        "exactness": exactness(t),
        "leaks": leaks(t),
        "costs": costs(t, shape),
        "machine": to_dict(measured(t, torch.empty(1, 1, 1, shape.head_dim))),
    }
    if t.rank == 0:
        given.out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
