"""What a ring's link and its processes reach: the figures behind `schedule="auto"`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attnspan import partial
from attnspan.patterns import Full
from attnspan.planner.links import Device, Link, Machine
from attnspan.ring.transport import Transport

_ROUNDS = 5
_LONG = 0.1  # seconds: longer than a processor's turn where processes share it
_SMALL = 64  # bytes
_kept: WeakKeyDictionary[Transport, dict[tuple[torch.device, torch.dtype, int], Machine]]
_kept = WeakKeyDictionary()


def measured(transport: Transport, like: Tensor) -> Machine:
    """The link of a transport, and the rate of its processes' attention; measured once, then kept.

    Collective: every rank calls it, with queries of the same kind. All get the same figures, those
    of the slowest, so that all choose alike. It takes a fraction of a second.

    Args:
        transport: of the ring.
        like: a query tensor `(batch, heads, n, head_dim)`, for its device, dtype and head_dim.
    """
    key = like.device, like.dtype, like.shape[3]
    kept = _kept.setdefault(transport, {})
    if key not in kept:
        counted = transport.sent, transport.waited
        kept[key] = _measure(transport, like)
        transport.sent, transport.waited = counted
    return kept[key]


def _measure(transport: Transport, like: Tensor) -> Machine:
    gpu = like.device.type == "cuda"
    large = 2**25 if gpu else 2**21
    attend, gradients, pairs = _work(like, 4096 if gpu else 384)
    small = _seconds(lambda: _pass_on(transport, _SMALL, like.device), like)
    alone = _seconds(lambda: _pass_on(transport, large, like.device), like)
    transport.gather(torch.zeros(1), "before the rates")  # so that all compute at once
    forward, backward = _mean(attend, like), _mean(gradients, like)
    call, _, _ = _work(like, 1)
    overhead = _seconds(call, like)

    def both() -> None:
        pending = _post(transport, large, like.device)
        attend()
        pending()

    together = _seconds(both, like)
    hidden = (alone + forward - together) / max(min(alone, forward), 1e-9)
    mine = torch.tensor(
        [small, alone, forward, backward, overhead, -min(1.0, max(0.0, hidden))],
        dtype=torch.float64,
    )
    slowest = transport.gather(mine, "what the link and the processes reach").amax(0).tolist()
    small, alone, forward, backward, overhead, hidden = slowest
    operations = 4 * like.shape[3] * pairs
    source = f"measured over {_ROUNDS} rounds on {transport.size} ranks, the slowest of them"
    device = Device(
        name=str(like.device.type),
        forward=operations / max(forward - overhead, 1e-9),
        backward=2.5 * operations / max(backward - overhead, 1e-9),
        linear=operations / max(forward - overhead, 1e-9),
        memory=None,
        memory_bandwidth=large / max(alone - small, 1e-9),
        call=overhead,
        source=source,
    )
    link = Link(
        "the group's link",
        latency=small,
        bandwidth=large / max(alone - small, 1e-9),
        overlap=-hidden,
        source=source,
    )
    return Machine(device, link)


def _post(transport: Transport, size: int, device: torch.device) -> Callable[[], None]:
    after, before = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    give, take = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    return transport.exchange({after: give}, {before: take}, "a measurement").wait


def _pass_on(transport: Transport, size: int, device: torch.device) -> None:
    _post(transport, size, device)()


def _work(like: Tensor, n: int) -> tuple[Callable[[], object], Callable[[], object], int]:
    """An attention of `n` tokens like those of a ring, its gradients, and its pairs by heads."""
    heads = 2
    generator = torch.Generator().manual_seed(0)  # the user's own draws stay what they are
    shape = 3, 1, heads, n, like.shape[3]
    q, k, v = torch.randn(shape, generator=generator).to(like.device, like.dtype)
    scale = like.shape[3] ** -0.5
    out, lse = partial.forward(q, k, v, Full(), 0, scale)

    def attend() -> object:
        return partial.forward(q, k, v, Full(), 0, scale)

    def gradients() -> object:
        return partial.backward(out, None, q, k, v, out, lse, Full(), 0, scale)

    return attend, gradients, heads * n * n


def _mean(what: Callable[[], object], like: Tensor) -> float:
    """Seconds of what needs no other rank, the turns of other processes included."""
    rounds = max(_ROUNDS, math.ceil(_LONG / _seconds(what, like)))
    began = time.perf_counter()
    for _ in range(rounds):
        what()
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    return (time.perf_counter() - began) / rounds


def _seconds(what: Callable[[], object], like: Tensor) -> float:
    def done() -> None:
        if like.device.type == "cuda":
            torch.cuda.synchronize(like.device)

    what()
    times = []
    for _ in range(_ROUNDS):
        done()
        began = time.perf_counter()
        what()
        done()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
