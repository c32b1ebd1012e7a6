"""What the processes of a ring are called with: checked on each, and compared among all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnspan import partial
from attnspan.dispatch import check_options, check_tensors
from attnspan.patterns import Pattern
from attnspan.planner.ring import SCHEDULES as PLANNED
from attnspan.planner.ring import mixed
from attnspan.ring.exchange import Exchange, check_layout, plan_exchange
from attnspan.ring.layout import Layout
from attnspan.ring.transport import Transport
from attnspan.ring.ulysses import joined
from attnspan.ring.ulysses import lacks as lacks_heads

SCHEDULES = ("auto", *PLANNED)
WIRES = (None, "int8")


@dataclass(frozen=True)
class Options:
    """What a call of `ring_attention` takes beside tensors; its docstring says what each is."""

    pattern: Pattern
    layout: Layout
    schedule: str
    scale: float | None
    softcap: float | None
    return_lse: bool
    impl: str
    wire: str | None


def agree(
    q: Any,
    k: Any,
    v: Any,
    sink_logits: Any,
    transport: Transport,
    options: Options,
    by: str = "ring_attention",
) -> None:
    """Raises, on every rank alike, what `ring_attention` documents, before anything is sent."""
    refused: ValueError | TypeError | None = None
    try:
        _check(q, k, v, sink_logits, options, transport)
    except (ValueError, TypeError) as error:
        refused = error
    if transport.size > 1:
        transport.agree(_facts(q, k, v, sink_logits, options, refused), by)
    if refused is not None:
        raise refused


def _check(
    q: Any, k: Any, v: Any, sink_logits: Any, options: Options, transport: Transport
) -> None:
    by = "ring_attention"
    check_tensors(q, k, v, sink_logits, by)
    check_options(
        options.pattern, options.scale, options.softcap, None, "auto", options.return_lse, by
    )
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{by}: q {tuple(q.shape)} and k {tuple(k.shape)} have other lengths; shards of one "
            "sequence, as many tokens in each, are allowed"
        )
    if not q.shape[2]:
        raise ValueError(f"{by}: q {tuple(q.shape)} has no tokens; at least one is allowed")
    if options.impl not in partial.IMPLS:
        raise ValueError(
            f"{by}: impl is {options.impl!r}; one of {', '.join(partial.IMPLS)} is allowed"
        )
    if options.wire not in WIRES:
        raise ValueError(f"{by}: wire is {options.wire!r}; None or 'int8' is allowed")
    if not isinstance(options.layout, Layout):
        raise TypeError(
            f"{by}: layout is {options.layout!r}; Contiguous(), ZigZag() or Striped() is allowed"
        )
    try:
        backward = gradients_wanted(q, k, v)
        largest = q, k, v, options.pattern, 0, options.softcap, options.impl, backward
        partial.choose(*largest)
    except ValueError as error:
        raise ValueError(f"{by}: impl is {options.impl!r}; {error}; 'reference' can") from None
    across_ranks(options.schedule, transport.size, q.shape[1], k.shape[1])
    holdings = options.layout.chunks(q.shape[2] * transport.size, transport.size)
    check_layout(options.pattern, holdings, by)
    if options.wire is not None and options.schedule == "ulysses":
        raise ValueError(
            f"{by}: wire is {options.wire!r} with schedule 'ulysses', whose heads travel as they "
            "are; 'ring', 'allgather' and 'RxU' are allowed"
        )
    if options.wire is not None and any(chunk.step > 1 for each in holdings for chunk in each):
        raise ValueError(
            f"{by}: wire is {options.wire!r} with layout Striped(), whose scales would tell of "
            "later tokens; Contiguous() and ZigZag() are allowed"
        )
    task_of(options, q.shape, k.shape, transport)  # planned here, before anybody waits


def across_ranks(schedule: Any, size: int, heads: int, kv_heads: int) -> int:
    """Over how many ranks the sequence still lies once heads are dealt out.

    Raises:
        ValueError: no schedule, or one that these heads or ranks don't allow.
    """
    if schedule in ("auto", "ring", "allgather"):
        return size
    mix = mixed(schedule) if isinstance(schedule, str) else None
    if schedule != "ulysses" and mix is None:
        raise ValueError(
            f"ring_attention: schedule is {schedule!r}; one of {', '.join(SCHEDULES)}, or RxU such "
            "as '2x4', is allowed"
        )
    across, members = mix or (1, size)
    if across * members != size:
        raise ValueError(
            f"ring_attention: schedule is {schedule!r} on {size} ranks; two numbers whose product "
            f"is {size} are allowed"
        )
    if lack := lacks_heads(members, heads, kv_heads):
        raise ValueError(f"ring_attention: schedule is {schedule!r} with {lack}")
    return across


@dataclass(frozen=True)
class Planned:
    """What a rank's part of a call is, whatever its tensors hold.

    Attributes:
        ranks: for each rank of the exchange, that of the transport.
        exchange: what it sends, receives and computes.
        members: the ranks that it trades heads with; None: none.
        places: where their tokens stand in the joined shard.
    """

    ranks: tuple[int, ...]
    exchange: Exchange
    members: tuple[int, ...] | None = None
    places: tuple[Tensor, ...] = ()


def task_of(options: Options, q: torch.Size, k: torch.Size, transport: Transport) -> Planned:
    """The plan of a call, with shards of these shapes; made once for equal questions."""
    size = transport.size
    across = across_ranks(options.schedule, size, q[1], k[1])
    kind = "allgather" if options.schedule == "allgather" else "ring"
    return _planned(
        options.pattern, q[2] * size, options.layout, size, transport.rank, across, kind
    )


@lru_cache(maxsize=64)
def _planned(
    pattern: Pattern, n: int, layout: Layout, size: int, rank: int, across: int, kind: Any
) -> Planned:
    holdings = layout.chunks(n, size)
    if across == size:
        return Planned(tuple(range(size)), plan_exchange(pattern, n, holdings, rank, kind))
    width = size // across
    shards = [joined(holdings[r * width : (r + 1) * width]) for r in range(across)]
    mine = rank // width
    ranks = tuple(r * width + rank % width for r in range(across))
    exchange = plan_exchange(pattern, n, tuple(h for h, _ in shards), mine, kind)
    members = tuple(range(mine * width, (mine + 1) * width))
    return Planned(ranks, exchange, members, shards[mine][1])


def _facts(
    q: Any,
    k: Any,
    v: Any,
    sink_logits: Any,
    options: Options,
    refused: Exception | None,
) -> dict[str, str]:
    facts = {
        name: f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device.type}"
        if isinstance(x, Tensor)
        else type(x).__name__
        for name, x in (("q", q), ("k", k), ("v", v), ("sink_logits", sink_logits))
    }
    names = ("pattern", "layout", "schedule", "scale", "softcap", "impl", "wire")
    facts |= {name: repr(getattr(options, name)) for name in names}
    if isinstance(sink_logits, Tensor):
        facts["sink_logits of values"] = str(sink_logits.detach().double().tolist())
    facts["gradients"] = "wanted" if gradients_wanted(q, k, v, sink_logits) else "not wanted"
    facts["arguments"] = f"that it refuses ({refused})" if refused else "that are allowed"
    return facts


def gradients_wanted(*tensors: Any) -> bool:
    """Whether gradients will be asked for."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in tensors
    )
