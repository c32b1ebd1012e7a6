"""What the schedules of a ring cost: seconds, bytes and memory of one attention layer.

A schedule is "ring" (keys and values exchanged straight between ranks, round by round, each hidden
behind the computing of the one before), "allgather" (the same with one round), "ulysses" (heads
for tokens and back, one exchange each) or a mix "RxU": groups of U ranks trade heads, and a ring of
R such groups trades keys and values. Operations are `4 * head_dim` for each pair and query head,
and two and a half times that backward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum  # rounds once, so that no version of Python gives other digits

from attnspan.planner.links import Machine
from attnspan.planner.work import Round, Work

SCHEDULES = ("ring", "allgather", "ulysses")
BACKWARD = 2.5
_ALIKE = 0.01


@dataclass(frozen=True)
class Heads:
    """What an attention layer has on each rank before heads are traded.

    Attributes:
        query: query heads.
        kv: key and value heads.
        dim: channels of a head.
        itemsize: bytes of an element.
    """

    query: int
    kv: int
    dim: int
    itemsize: int = 2

    @property
    def kv_bytes(self) -> int:
        """Of one token's keys and values."""
        return 2 * self.kv * self.dim * self.itemsize


@dataclass(frozen=True)
class Cost:
    """One schedule's cost of one attention layer.

    Attributes:
        schedule: "ring", "allgather", "ulysses" or "RxU".
        seconds: from start to end: `compute` and `exposed`.
        compute: seconds of computing, of the slowest rank in each round.
        communication: seconds in which exchanges are under way.
        exposed: those of them in which nothing is computed.
        sent: bytes that a rank sends, the mean of all.
        sent_most: most that one sends.
        extra: most bytes that a rank holds beside its shards of q, k, v, out and their gradients.
        imbalance: the largest share of the pairs over the mean one, less 1.
        exchanges: how many there are.
        copies: ranks that compute with the same KV head, beside the pattern's own sharing.
    """

    schedule: str
    seconds: float
    compute: float
    communication: float
    exposed: float
    sent: float
    sent_most: int
    extra: int
    imbalance: float
    exchanges: int
    copies: int = 1

    @property
    def overlap(self) -> float:
        """The share of the communication that is hidden; 1 where there is none."""
        return 1 - self.exposed / self.communication if self.communication else 1.0


def mixed(schedule: str) -> tuple[int, int] | None:
    """R and U of a mix "RxU"; None: it is none.

    >>> mixed("2x4"), mixed("ring")
    ((2, 4), None)
    """
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", schedule)
    return (int(found[1]), int(found[2])) if found else None


def split(schedule: str, size: int) -> tuple[int, int, bool]:
    """The ring's size, that of the groups that trade heads, and whether all comes in one round.

    Raises:
        ValueError: it is none, or a mix of another number of ranks.

    >>> split("ring", 8), split("ulysses", 8), split("2x4", 8)
    ((8, 1, False), (1, 8, False), (2, 4, False))
    """
    match schedule:
        case "ring" | "allgather":
            return size, 1, schedule == "allgather"
        case "ulysses":
            return 1, size, False
    mix = mixed(schedule)
    if mix is None:
        raise ValueError(
            f"schedule {schedule!r} is not known; allowed are {', '.join(SCHEDULES)}, and RxU such "
            "as 2x4"
        )
    rings, groups = mix
    if rings * groups != size:
        raise ValueError(f"schedule {schedule} is for {rings * groups} ranks, not {size}")
    return rings, groups, False


def lack(schedule: str, size: int, heads: Heads) -> str:
    """Why these heads can't be traded so; empty where they can."""
    _, groups, _ = split(schedule, size)
    if heads.query % groups:
        return f"{schedule} trades {heads.query} query heads among {groups} ranks"
    if heads.kv % groups and groups % heads.kv:
        return f"{schedule} trades {heads.kv} KV heads among {groups} ranks"
    return ""


def cost(
    schedule: str,
    of: Callable[[int], Work],
    size: int,
    heads: Heads,
    machine: Machine,
    backward: bool = False,
) -> Cost:
    """What a schedule costs, forward or backward.

    Args:
        schedule: as above.
        of: the work of a ring of so many ranks, as `attnspan.planner.forms.works` gives it.
        size: ranks.
        heads: of the layer.
        machine: rates.
        backward: the backward instead, from the saved output and log-sum-exp: keys and values come
            again, and their gradients go back in fp32, a round behind.

    Raises:
        ValueError: the schedule is none, is for another number of ranks, or can't trade the heads.

    Beside its shards a rank holds, in a ring, two rounds' keys and values, and its output and
    log-sum-exp in fp32; backward also two rounds of gradients in fp32, and its own in fp32.
    Where heads are traded, q, k, v and the output are held once more (backward their gradients
    too), with as many tokens more as there are heads fewer.
    """
    rings, groups, gathered = split(schedule, size)
    if why := lack(schedule, size, heads):
        raise ValueError(f"{why}; whole heads for each are allowed")
    work, link, device = of(rings), machine.link, machine.device
    traded = Heads(heads.query // groups, max(1, heads.kv // groups), heads.dim, heads.itemsize)
    rate = device.backward / BACKWARD if backward else device.forward
    per_pair = 4 * heads.dim * traded.query / rate
    # fp32 gradients of one token's keys and values.
    gradient = 8 * traded.kv * heads.dim if backward else 0
    rounds = work.at_once if gathered else work.rounds

    compute = [each.pairs * per_pair + device.call if each.pairs else 0.0 for each in rounds]
    exchanged = [0] * (len(rounds) + 1)  # while round k is computed
    for k, each in enumerate(rounds[1:], 1):
        exchanged[k - 1] += each.moved * traded.kv_bytes
        if backward:
            exchanged[k + 1] += each.moved * gradient
    moving = [link.latency + x / link.bandwidth if x else 0.0 for x in exchanged]
    beside = [*compute, 0.0]
    exposed = fsum(x - link.overlap * min(x, busy) for x, busy in zip(moving, beside, strict=True))
    sent = work.sent * traded.kv_bytes + work.received * gradient
    extra = _ring_extra(work, rounds, traded, gradient) if rings > 1 else 0
    communication, exchanges = fsum(moving), sum(x > 0 for x in moving)

    trade = _trade_bytes(work.n // size, heads, traded, groups)
    if groups > 1:
        # Nothing can be computed before the heads have come, nor before all is computed returned.
        seconds = 2 * link.latency + trade / link.bandwidth
        communication, exposed, exchanges = (
            communication + seconds,
            exposed + seconds,
            exchanges + 2,
        )
        held = 2 * traded.query * heads.dim * heads.itemsize + traded.kv_bytes
        extra += (2 if backward else 1) * held * work.shard
    return Cost(
        schedule=schedule,
        seconds=fsum(compute) + exposed,
        compute=fsum(compute),
        communication=communication,
        exposed=exposed,
        sent=float(sent.mean()) + trade,
        sent_most=int(sent.max()) + trade,
        extra=extra,
        imbalance=work.imbalance,
        exchanges=exchanges,
        copies=max(1, groups // heads.kv),
    )


def decode_cost(tokens: int, size: int, heads: Heads, machine: Machine) -> Cost:
    """One decoded token over a cache of `tokens` that lies evenly over the ranks.

    Each rank reads its keys and values, and one all-gather brings together the partial outputs and
    log-sum-exps in fp32: `query * (dim + 1) * 4 * (size - 1)` bytes, however long the context.
    """
    share = -(-tokens // size)
    compute = share * heads.kv_bytes / machine.device.memory_bandwidth + machine.device.call
    part = heads.query * (heads.dim + 1) * 4
    sent = part * (size - 1)
    moving = machine.link.latency + sent / machine.link.bandwidth if size > 1 else 0.0
    return Cost(
        schedule="merge",
        seconds=compute + moving,
        compute=compute,
        communication=moving,
        exposed=moving,
        sent=sent,
        sent_most=sent,
        extra=part * size,
        imbalance=share * size / tokens - 1,
        exchanges=int(size > 1),
    )


@dataclass(frozen=True)
class Choice:
    """The cheapest schedule.

    Attributes:
        schedule: its name.
        why: in half a sentence.
        seconds: (schedule, seconds) of all that can run, cheapest first.
        refused: why others can't.
    """

    schedule: str
    why: str
    seconds: tuple[tuple[str, float], ...]
    refused: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.schedule}: {self.why}"


def schedules(size: int) -> tuple[str, ...]:
    """All there are for so many ranks; on one they are the same.

    >>> schedules(8)
    ('ring', 'allgather', 'ulysses', '4x2', '2x4')
    """
    if size == 1:
        return ("ring",)
    mixes = (f"{size // u}x{u}" for u in range(2, size // 2 + 1) if size % u == 0)
    return ("ring", "allgather", "ulysses", *mixes)


def choose(
    of: Callable[[int], Work],
    size: int,
    heads: Heads,
    machine: Machine,
    backward: bool = False,
    among: Sequence[str] | None = None,
) -> Choice:
    """The schedule that takes the fewest seconds.

    Of those within a hundredth of the fewest it is the one named first: "ring" holds least.

    Args:
        of, size, heads, machine: as in `cost`.
        backward: count a backward too.
        among: the schedules to choose from; None: all.

    Raises:
        ValueError: none of them can run.
    """
    costs: list[tuple[float, Cost]] = []
    refused = []
    for schedule in schedules(size) if among is None else among:
        if why := lack(schedule, size, heads):
            refused.append(why)
            continue
        forward = cost(schedule, of, size, heads, machine)
        seconds = forward.seconds
        if backward:
            seconds += cost(schedule, of, size, heads, machine, True).seconds
        costs.append((seconds, forward))
    if not costs:
        raise ValueError(f"no schedule can run: {'; '.join(refused)}")
    fewest = min(seconds for seconds, _ in costs)
    taken, best = next(each for each in costs if each[0] <= fewest * (1 + _ALIKE))
    costs.sort(key=lambda each: each[0])
    others = ", ".join(
        f"{c.schedule} {_short(s)}" for s, c in costs[:4] if c.schedule != best.schedule
    )
    hidden = (
        "nothing is sent"
        if not best.sent
        else f"{best.overlap:.0%} of its {_short(best.communication)} of exchanges hide"
    )
    return Choice(
        best.schedule,
        f"{_short(taken)} a layer over {machine.link.name}, {hidden}"
        + (f", against {others}" if others else ""),
        tuple((c.schedule, s) for s, c in costs),
        tuple(refused),
    )


def _ring_extra(work: Work, rounds: Sequence[Round], heads: Heads, gradient: int) -> int:
    keys = sorted((each.received for each in rounds), reverse=True)
    flight = sum(keys[:2])  # two rounds are held at once
    output = (heads.dim + 1) * heads.query * 4 * work.shard
    return flight * (heads.kv_bytes + gradient) + output + gradient * work.shard


def _trade_bytes(tokens: int, heads: Heads, traded: Heads, groups: int) -> int:
    """Queries, keys and values to each other rank of a group, outputs back."""
    width = 2 * traded.query + 2 * traded.kv
    return width * heads.dim * tokens * heads.itemsize * (groups - 1)


def _short(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
