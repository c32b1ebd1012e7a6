"""Which policy to suggest, and which layers must see all: chosen on one half, held against another.

Of many policies that lose a little more than is allowed, one may look as if it didn't, by luck. So
all choosing is done on the first half of each text's scored tokens. What was chosen is then tested
on the second half. Several candidates are tested there in an order that the first half has fixed,
the dearest and safest first, and the first that fails ends it. That one of those taken loses more
than is allowed needs the first such one in this order to pass, so the chance of it is that of a
single test, however many there are (the fixed-sequence method, as in "Multiple endpoints in
clinical trials", 2022: https://www.fda.gov/media/162416/download).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attnspan.cache import Dense, Storage
from attnspan.evaluation import layers, verdicts
from attnspan.evaluation.case import Case
from attnspan.evaluation.curve import FAR, Curve, policy_bytes, row, sunk
from attnspan.evaluation.shrink import Paired, steps
from attnspan.evaluation.verdicts import TOLERANCE
from attnspan.policies import KeepAll, PerLayer, Policy, Window

DEMAND = 1 + TOLERANCE


@dataclass(frozen=True)
class Candidate:
    """A policy that was measured on the first half.

    Attributes:
        policy: the policy.
        bytes: that it holds in the long run.
        first: for each text its perplexity over the best, on the first half.
        storage: in which it holds them.
    """

    policy: Policy | PerLayer
    bytes: int
    first: tuple[Paired, ...]
    storage: Storage = Dense()  # noqa: RUF009  a frozen value

    @property
    def high(self) -> float:
        """The largest loss that it may have, as far as the first half tells."""
        return max(pair.high for pair in self.first)


def front(candidates: Sequence[Candidate], demand: float = DEMAND) -> list[Candidate]:
    """Those within the demand that no cheaper one is safer than, the dearest and safest first.

    Args:
        candidates: in any order.
        demand: the most that `high` may be.

    >>> def one(size, high):
    ...     return Candidate(Window(size), size, (Paired(1.0, 1.0, high),))
    >>> [each.bytes for each in front([one(4, 1.03), one(8, 1.01), one(16, 1.015), one(32, 1.0)])]
    [32, 8]
    """
    kept: list[Candidate] = []
    for each in sorted(candidates, key=lambda each: (each.bytes, each.high)):
        if each.high <= (demand if not kept else math.nextafter(kept[-1].high, 0)):
            kept.append(each)
    return kept[::-1]


def in_order(
    candidates: Sequence[Candidate],
    measure: Callable[[Candidate], Sequence[Paired]],
    demand: float = DEMAND,
) -> tuple[Candidate | None, list[dict[str, Any]]]:
    """The last candidate before which, and at which, none fails; and what each gave, as JSON.

    Args:
        candidates: in an order that what `measure` looks at had no part in.
        measure: a candidate's perplexity over the best on each text's second half. Isn't called
            after the first failure.
        demand: the largest that each may be, its interval's upper end included.
    """
    kept, failed, told = None, False, []
    for each in candidates:
        second = None if failed else measure(each)
        holds = None if second is None else all(pair.high <= demand for pair in second)
        if holds:
            kept = each
        failed = not holds
        told.append(
            {
                "policy": str(each.policy),
                "bytes_far": each.bytes,
                "first_half": [pair.as_dict() for pair in each.first],
                "second_half": None if second is None else [pair.as_dict() for pair in second],
                "holds": holds,
            }
        )
    return kept, told


def search(
    case: Case, curve: Curve, tell: Callable[[str, int, int], None], skipped: list[str]
) -> layers.Search | None:
    """Layers that need all, searched for on the first half; None where that says why not."""
    early = curve.early
    sizes = [row["tokens"] for row in verdicts.counted(early)]
    small = sizes[min(3, len(sizes) - 1)]
    large = sizes[0]
    sinks = verdicts.sinks_needed(early)
    key = "sinks" if sinks else "window"
    rows = {row["tokens"]: row[key] for row in early["rows"]}
    if small == large or rows[small] is None:
        skipped.append(f"layers: a window of {large:,} leaves no smaller one to try")
        return None
    if rows[small]["within"]:
        skipped.append(
            f"layers one by one: on the first half of the scored tokens all of them do with "
            f"{rows[small]['policy']}"
        )
        return None
    if not rows[large]["within"]:
        skipped.append(
            f"layers one by one: {rows[large]['policy']} in all of them is not within "
            f"{TOLERANCE:.0%} of the best on the first half of the scored tokens already"
        )
        return None
    policies = [sunk(size) if sinks else Window(size) for size in (large, small)]
    count = sum(window is None for window in case.windows) or len(case.windows)
    groups = min(count, layers.MOST_GROUPS)
    halvings = math.ceil(math.log2(groups + 1))
    # Sets that the search tries, and the few of them that the second half is asked about.
    total = (groups + halvings + 1) * steps(curve.first.passages)
    total += halvings * steps(curve.second.passages)
    done = 0

    def told(step: int) -> None:
        nonlocal done
        done += step
        tell("layers", min(done, total), total)

    curve.first.told = curve.second.told = told
    found = layers.search(curve.first, case.windows, policies[0], policies[1], DEMAND)
    found = layers.confirm(found, curve.second, DEMAND)
    tell("layers", total, total)
    if groups < count:
        skipped.append(f"single layers: {count} were tried in {groups} groups of neighbours")
    return found


def suggestion(
    case: Case, curve: Curve, found: layers.Search | None
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The policy with the fewest bytes that holds on the second half, and all that were tested."""
    dtype = case.model.dtype
    measured: list[Policy | PerLayer] = list(curve.policies)
    if found is not None:
        measured += [found.policy(some) for some, _ in found.tried]
    candidates = [
        Candidate(
            policy,
            policy_bytes(case.anatomy, policy, dtype, FAR),
            tuple(curve.first.against_best(policy)),
        )
        for policy in dict.fromkeys(measured)
    ]
    chosen, told = in_order(front(candidates), lambda each: curve.second.against_best(each.policy))
    if chosen is None:
        return None, told
    figures = row(case, curve.second, chosen.policy)
    for text, first in zip(figures["texts"], chosen.first, strict=True):
        text["first_half"] = first.as_dict()
    return {
        "policy": figures["policy"],
        "texts": figures["texts"],
        "bytes": figures["bytes"],
        "bytes_far": figures["bytes_far"],
        "keep_all_bytes": policy_bytes(case.anatomy, KeepAll(), dtype, case.full),
        "keep_all_bytes_far": policy_bytes(case.anatomy, KeepAll(), dtype, FAR),
        "tokens": case.full,
        "tokens_far": FAR,
    }, told
