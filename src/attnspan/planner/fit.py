"""What fits a memory: the longest context, or the least change to a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnspan.planner.plan import Plan, plan
from attnspan.planner.quantities import MOST_TOKENS, shown
from attnspan.planner.report import folded
from attnspan.policies import SinkWindow

CHUNK = 2048
SINKS = 4
LEAST_WINDOW = 256  # a smaller one is no cache of a long context
_RANK = {"dense": 0, "bf16": 0, "int8": 1, "int4": 2}


@dataclass(frozen=True)
class Longest:
    """The longest context that fits.

    Attributes:
        plan: at that context; None: not even one token fits.
        beyond: at one token more, which doesn't fit; None: the planner counts no further.
        least: at one token.
    """

    plan: Plan | None
    beyond: Plan | None
    least: Plan

    @property
    def context(self) -> int:
        """Tokens; 0: none."""
        return self.plan.context if self.plan is not None else 0

    def __str__(self) -> str:
        memory = shown(self.least.memory or 0)
        if self.plan is None:
            return (
                f"Nothing fits {memory}: one token takes {shown(self.least.total)}, of which "
                f"{shown(self.least.weights)} are weights."
            )
        if self.beyond is None:
            return (
                f"Any context fits {memory}: at {self.context:,} tokens, the most that is counted, "
                f"{shown(self.plan.total)} are taken."
            )
        return (
            f"The longest context in {memory} is {self.context:,} tokens: {self.plan.total:,} of "
            f"{self.plan.memory:,} bytes; one token more takes {self.beyond.total:,}."
        )


def longest(model: Any, **how: Any) -> Longest:
    """The longest context that fits, to the token, by halving.

    What is held doesn't fall as a context grows, so what fits at a length fits at all shorter ones;
    but for attnspan's int4 in its first tokens, up to 64 past the sinks, which are held dense.

    Args:
        model, how: as in `attnspan.plan`.

    Raises:
        ValueError: the device's memory isn't known; or as in `attnspan.plan`.

    >>> found = longest("mistral-7b-v0.3", memory="24GiB")
    >>> found.context, found.plan.fits, found.beyond.fits
    (55047, True, False)
    """

    def at(context: int) -> Plan:
        return plan(model, context, **how)

    least = _with_memory(at(1))
    if not least.fits:
        return Longest(None, None, least)
    most = at(MOST_TOKENS)
    if most.fits:
        return Longest(most, None, least)
    low, high = least, most
    while high.context - low.context > 1:
        middle = at((low.context + high.context) // 2)
        low, high = (middle, high) if middle.fits else (low, middle)
    return Longest(low, high, least)


@dataclass(frozen=True)
class Candidate:
    """One change.

    Attributes:
        change: in words; "as asked" for none.
        loses: what it costs beside memory.
        plan: None where it can't be had.
        why: why it can't.
    """

    change: str
    loses: str
    plan: Plan | None
    why: str = ""

    @property
    def fits(self) -> bool:
        return self.plan is not None and bool(self.plan.fits)


def cheapest(model: Any, context: int, **how: Any) -> tuple[Candidate, ...]:
    """Changes in the order of what they lose; the first that fits is the one to take.

    1. as asked; 2. prefill in steps, which loses nothing; then, each with what came before it,
    3. the cache in int8; 4. weights in int8; 5. the cache in int4; 6. weights in int4. At last
    tokens are dropped for ever: 4 sinks and the largest window that fits, with nothing else
    changed, and with each of 3 to 6 that doesn't fit by itself. What is asked to be smaller already
    is left so, and a policy or pattern that was asked for isn't widened.

    The order follows what is published: int8 loses next to nothing
    (https://arxiv.org/abs/2208.07339), int4 little (https://arxiv.org/abs/2306.00978,
    https://arxiv.org/abs/2402.02750), and dropped tokens can't be looked up again
    (https://arxiv.org/abs/2309.17453, appendix A). What it costs on your text `attnspan compare`
    measures.

    Args:
        model, context, how: as in `attnspan.plan`.

    Raises:
        ValueError: the device's memory isn't known; or as in `attnspan.plan`.
    """
    asked = _with_memory(plan(model, context, **how))
    found = [Candidate("as asked", "nothing", asked)]
    steps: dict[str, Any] = {}
    if asked.devices == 1 and asked.chunk is None and context > CHUNK:
        steps = {"chunk": CHUNK}
        found.append(_try(f"prefill in steps of {CHUNK:,}", "nothing", model, context, how | steps))
    given = [{"storage": asked.storage, "weights": asked.weights_kind}]
    for what, kind, loses in (
        ("storage", "int8", "next to nothing"),
        ("weights", "int8", "next to nothing"),
        ("storage", "int4", "little"),
        ("weights", "int4", "little"),
    ):
        if _RANK[kind] <= _RANK[given[-1][what]]:
            continue
        changed = {**given[-1], what: kind}
        each = _try(_named(changed), loses, model, context, how | steps | changed)
        found.append(each)
        if each.plan is not None:  # else it can't be had, and what follows goes on without it
            given.append(changed)
    if how.get("policy") is None and how.get("pattern") is None:
        for changed in given:
            tight = _try("", "", model, context, how | steps | changed)
            if tight.fits:
                break
            each = _dropping(_named(changed), model, context, how | steps | changed)
            found.append(each)
            if each.plan is None:
                break
    return tuple(found)


def _named(changed: dict[str, str]) -> str:
    return f"{changed['storage']} cache, {changed['weights']} weights"


def _with_memory(given: Plan) -> Plan:
    if given.memory is None:
        raise ValueError(
            f"memory of {given.device.name} isn't known; --memory, such as 80GiB, is needed to fit"
        )
    return given


def _try(change: str, loses: str, model: Any, context: int, how: dict[str, Any]) -> Candidate:
    try:
        return Candidate(change, loses, plan(model, context, **how))
    except ValueError as error:
        return Candidate(change, loses, None, str(error))


def _dropping(change: str, model: Any, context: int, how: dict[str, Any]) -> Candidate:
    """Sinks and the largest window that fits, by halving."""

    def at(window: int) -> Candidate:
        policy = SinkWindow(SINKS, window)
        return _try(
            f"{change}, {policy}", "dropped tokens", model, context, how | {"policy": policy}
        )

    fits, wrong = min(LEAST_WINDOW, context), context
    low = at(fits)
    if not low.fits:
        return low
    while wrong - fits > 1:
        middle = (fits + wrong) // 2
        fits, wrong = (middle, wrong) if at(middle).fits else (fits, middle)
    return at(fits)


def table(found: tuple[Candidate, ...]) -> str:
    """The candidates, and which to take."""
    width = max(len(each.change) for each in found)
    taken = next((each for each in found if each.fits), None)
    lines = [f"{'':{width}} {'loses':15} {'in all':>11}"]
    for each in found:
        if each.plan is None:
            lines += folded(f"{each.change:{width}} can't be had: {each.why}", "    ")
            continue
        mark = "fits" if each.fits else "doesn't fit"
        lines.append(f"{each.change:{width}} {each.loses:15} {shown(each.plan.total):>11}  {mark}")
    asked = found[0].plan
    assert asked is not None, "what was asked for is planned, or refused before"
    memory = f"{asked.context:,} tokens in {shown(asked.memory or 0)}"
    if taken is None:
        verdict = f"Nothing of this fits {memory}."
    elif taken is found[0]:
        verdict = f"{memory}: it fits as asked."
    else:
        verdict = f"{memory}: the least change that fits is {taken.change}."
    return "\n".join([*lines, *folded(verdict)])
