"""The search: what loses little is found on few passages, and told apart on more and more.

1. Each storage by itself; then each family of policies under a few budgets, the same for all
   layers, in the smallest storage that may do. The best families go on.
2. Each layer alone under these budgets, all others whole; then the heads of the layers that lose
   most, each alone. So it is known what a budget costs where.
3. Budgets by layer that should lose least at many numbers of bytes, if these losses added up
   (`knapsack.frontier`). They are candidates, as are equal budgets, pyramids, and all for the heads
   that retrieve with little for others, in each storage.
4. Candidates are measured as a whole, on few passages; those near the Pareto front of bytes and
   loss go on to twice as many (successive halving, https://arxiv.org/abs/1502.07943).
5. Losses don't quite add up: what one layer loses depends on what others have. So from the best
   candidate on, each layer is given a little more and a little less, and what that changes goes
   into budgets by layer again, a few times over.
6. The last ones have been measured on all passages that a choice may see, and so are some that lie
   on the front far from the demand: points of a front must be of the same passages.

Nothing but measured losses leaves here. The order of all measurements depends on the measured
values alone, so that a search which is interrupted and goes on comes to the same end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from attnspan.cache import Storage
from attnspan.evaluation.tune.knapsack import Option, frontier, pareto
from attnspan.evaluation.tune.space import Choice, Space
from attnspan.policies import KeepAll, PerLayer, Policy
from attnspan.policies.pyramid import pyramid

FIRST = 4
"""Passages of the proxies and of the first round."""

FAMILIES_KEPT = 2
SPLIT = 3
"""Layers whose heads are told apart."""

FINALISTS = 8
"""Candidates that are measured on all passages, at most."""

_USUAL = 0.02
"""Nats that a storage may lose where a memory is asked for."""

APART = 1.3
"""Points of the front that are measured on all passages differ by so much in bytes, at least."""

PYRAMIDS = (0.25, 1.75)
"""The last layer's budget in parts of the mean."""

REFINED = 3
"""How often budgets are changed a little around the best candidate."""

_NEAR = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
"""Expected losses at which budgets are tried, in parts of the demand."""


class Oracle(Protocol):
    """What a search asks."""

    def losses(self, choice: Choice, count: int) -> Sequence[float]:
        """Nats a token more than the full cache, on each of the first `count` passages."""
        ...

    def bytes(self, choice: Choice) -> tuple[int, ...]:
        """What each layer allocates for it."""
        ...


@dataclass(frozen=True)
class Demand:
    """What is asked for: one of the two.

    Attributes:
        nats: a token, lost at most.
        bytes: allocated at most.
    """

    nats: float | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Point:
    """A choice that was measured.

    Attributes:
        bytes: allocated.
        losses: nats a token more than the full cache, passage by passage.
    """

    choice: Choice
    bytes: int
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        return math.fsum(self.losses) / len(self.losses)

    @property
    def deviation(self) -> float:
        """The standard deviation between passages."""
        mean, count = self.loss, len(self.losses)
        return math.sqrt(math.fsum((x - mean) ** 2 for x in self.losses) / max(1, count - 1))

    def high(self, count: int | None = None) -> float:
        """About the upper end of the loss's interval; as it would be on `count` passages alike."""
        return self.loss + 2 * self.deviation / math.sqrt(count or len(self.losses))


@dataclass(frozen=True)
class Found:
    """What a search comes to.

    Attributes:
        points: all candidates, each on as many passages as it was measured on.
        finalists: those that were measured on all passages.
        families: that went on to budgets by layer.
        alone: for each family and group of layers, the loss under each budget.
    """

    points: list[Point]
    finalists: list[Point]
    families: list[str]
    alone: dict[str, list[dict[int, float]]]


Tell = Callable[[str, int, int], None]
"""Takes a stage, the passages that are done, and of how many."""


def search(
    oracle: Oracle, space: Space, passages: int, demand: Demand, tell: Tell = lambda *_: None
) -> Found:
    """Runs it; `passages` are those that it may see."""
    return _Search(oracle, space, passages, demand, tell).run()


class _Search:
    def __init__(
        self, oracle: Oracle, space: Space, passages: int, demand: Demand, tell: Tell
    ) -> None:
        self.oracle, self.space, self.passages = oracle, space, passages
        self.demand, self.tell = demand, tell
        self.first = min(FIRST, passages)
        self.found: dict[Choice, Point] = {}

    def run(self) -> Found:
        base = self._storages()
        self.storage = self._proxy_storage(base)
        families = self._families()
        alone = {family: self._alone(family) for family in families}
        options = [self._options(group, alone) for group in range(len(self.space.groups))]
        equal = [*self._even(families), *self._made(families[0])]
        candidates: dict[Choice, float] = {}  # and what each is expected to lose
        for storage in self.space.storages:
            rising = frontier([self._priced(i, some, storage) for i, some in enumerate(options)])
            for each in self._spread(rising, base[storage]):
                choice = Choice(self.space.policy(each.value), storage)
                candidates.setdefault(choice, base[storage] + each.loss)
            for policy, loss in equal:
                candidates.setdefault(Choice(policy, storage), base[storage] + loss)
        running = self._rounds(self._worth_a_run(candidates))
        self._all_along(running)
        points = [p for p in self.found.values() if len(p.losses) == self.passages]
        return Found(list(self.found.values()), points, families, alone)

    # Proxies ------------------------------------------------------------------------------------

    def _loss(self, policy: Policy | PerLayer) -> float:
        """Beyond what the storage of the proxies loses by itself."""
        own, whole = (
            self.oracle.losses(Choice(each, self.storage), self.first)
            for each in (policy, self.space.whole)
        )
        return math.fsum(a - b for a, b in zip(own, whole, strict=True)) / self.first

    def _storages(self) -> dict[Storage, float]:
        """What each storage loses by itself."""
        found = {}
        for storage in self.space.storages:
            losses = self.oracle.losses(Choice(self.space.whole, storage), self.first)
            found[storage] = math.fsum(losses) / self.first
        return found

    def _proxy_storage(self, base: dict[Storage, float]) -> Storage:
        """The smallest storage that leaves a policy half of what may be lost, or that loses least.

        Policies go with storages unequally: some keep sinks as they are, beside codes.
        """
        allowed = 0.5 * (self.demand.nats or _USUAL)
        sizes = {each: sum(self.oracle.bytes(Choice(self.space.whole, each))) for each in base}
        fitting = [each for each in base if base[each] <= allowed]
        return (
            min(fitting, key=lambda each: sizes[each])
            if fitting
            else min(base, key=base.__getitem__)
        )

    def _families(self) -> list[str]:
        """The families that lose least where all layers are alike, the best one first."""
        names, budgets = self.space.families, self.space.few_budgets
        asked = [(f, b, self.space.member(f, b)) for f in names for b in budgets]
        asked = [(f, b, policy) for f, b, policy in asked if policy is not None]
        self.even: dict[tuple[str, int], float] = {}
        for done, (family, budget, policy) in enumerate(asked):
            self.tell("equal budgets", done * self.first, len(asked) * self.first)
            self.even[family, budget] = self._loss(policy)
        self.tell("equal budgets", len(asked) * self.first, len(asked) * self.first)
        firsts = dict.fromkeys(names, 0)
        sums = dict.fromkeys(names, 0.0)
        for budget in budgets:
            row = {f: self.even.get((f, budget), math.inf) for f in names}
            firsts[min(names, key=lambda f: row[f])] += 1
            for family, loss in row.items():
                sums[family] += loss
        order = sorted(names, key=lambda f: (-firsts[f], sums[f]))
        return order[:FAMILIES_KEPT]

    def _alone(self, family: str) -> list[dict[int, float]]:
        """What each group of layers loses under each budget, all others whole."""
        groups, budgets = self.space.groups, self.space.few_budgets
        found: list[dict[int, float]] = []
        total = len(groups) * len(budgets) * self.first
        for group in range(len(groups)):
            row: dict[int, float] = {}
            for i, budget in enumerate(budgets):
                done = (group * len(budgets) + i) * self.first
                self.tell(f"layers alone, {family}", done, total)
                policy = self.space.member(family, budget)
                if policy is not None:
                    row[budget] = self._loss(self.space.alone(group, policy))
            found.append(_rising(row))
        self.tell(f"layers alone, {family}", total, total)
        return found

    def _options(
        self, group: int, alone: dict[str, list[dict[int, float]]]
    ) -> list[tuple[Policy, float]]:
        """What may be done with a group of layers, and what it loses."""
        found = [(self.space.whole, 0.0)]
        for family, rows in alone.items():
            for budget, loss in rows[group].items():
                policy = self.space.member(family, budget)
                assert policy is not None
                found.append((policy, loss))
        return found + self._by_head(group, alone)

    def _by_head(
        self, group: int, alone: dict[str, list[dict[int, float]]]
    ) -> list[tuple[Policy, float]]:
        """The same with budgets by head, for the groups that lose most."""
        heads = self.space.heads(group)
        family, rows = next(iter(alone.items()))
        if len(heads) < 2 or group not in _dearest(rows, SPLIT):
            return []
        whole, budgets = self.space.whole, list(rows[group])[::2]
        parts: list[list[Option[Policy]]] = []
        total = len(heads) * len(budgets) * self.first
        stage = f"heads alone, layer {self.space.groups[group][0]}"
        for head in range(len(heads)):
            row: dict[int, float] = {}
            for i, budget in enumerate(budgets):
                self.tell(stage, (head * len(budgets) + i) * self.first, total)
                small = self.space.member(family, budget)
                assert small is not None
                chosen = [small if h == head else whole for h in range(len(heads))]
                policy = self.space.by_head(group, chosen)
                row[budget] = self._loss(self.space.alone(group, policy))
            options = [Option(self.space.top, 0.0, whole)]
            for budget, loss in _rising(row).items():
                small = self.space.member(family, budget)
                assert small is not None
                options.append(Option(budget, loss, small))
            # Groups of heads may differ in how many they have.
            parts.append([Option(o.bytes * len(heads[head]), o.loss, o.value) for o in options])
        self.tell(stage, total, total)
        return [
            (self.space.by_head(group, each.value), each.loss)
            for each in frontier(parts)
            if len(set(each.value)) > 1
        ]

    # Candidates -----------------------------------------------------------------------------------

    def _priced(
        self, group: int, options: Sequence[tuple[Policy, float]], storage: Storage
    ) -> list[Option[Policy]]:
        layers = self.space.groups[group]
        found = []
        for policy, loss in options:
            sizes = self.oracle.bytes(Choice(policy, storage))
            found.append(Option(sum(sizes[layer] for layer in layers), loss, policy))
        return found

    def _spread(
        self,
        rising: Sequence[Option[tuple[Policy, ...]]],
        base: float,
        all_along: bool = True,
    ) -> list[Option[tuple[Policy, ...]]]:
        """Of a frontier, what lies near the demand, and some all along it."""
        fixed = self._fixed()
        chosen: dict[int, Option[tuple[Policy, ...]]] = {}

        def last(holds: Callable[[Option[tuple[Policy, ...]]], bool]) -> None:
            fitting = [each for each in rising if holds(each)]
            if fitting:
                chosen[fitting[-1].bytes] = fitting[-1]

        size = rising[-1].bytes + fixed
        while all_along and size > rising[0].bytes + fixed:
            last(lambda each, size=size: each.bytes + fixed <= size)
            size = int(size / math.sqrt(2))
        if all_along:
            chosen[rising[0].bytes] = rising[0]
        if self.demand.bytes is not None:
            for part in (1.0, 0.95, 0.9, 0.8):
                bound = int(part * self.demand.bytes)
                last(lambda each, bound=bound: each.bytes + fixed <= bound)
        elif self.demand.nats is not None:
            for part in _NEAR:
                bound = part * self.demand.nats - base
                fitting = [each for each in rising if each.loss <= bound]
                if fitting:
                    chosen[fitting[0].bytes] = fitting[0]
        return [chosen[size] for size in sorted(chosen)]

    def _fixed(self) -> int:
        """Bytes of the layers that keep their own window, whatever is chosen for the others."""
        free = {layer for group in self.space.groups for layer in group}
        sizes = self.oracle.bytes(Choice(self.space.whole, self.space.storages[0]))
        return sum(size for layer, size in enumerate(sizes) if layer not in free)

    def _even(self, families: Iterable[str]) -> list[tuple[Policy, float]]:
        """Equal budgets of the families that went on, and what they lose."""
        kept = set(families)
        found = [
            (policy, loss)
            for (family, budget), loss in self.even.items()
            if family in kept and (policy := self.space.member(family, budget)) is not None
        ]
        return [(KeepAll(), 0.0), (self.space.whole, 0.0), *found]

    def _made(self, family: str) -> list[tuple[Policy | PerLayer, float]]:
        """Budgets as others make them, and what they lose.

        Heads that retrieve have all and the others little, as in DuoAttention
        (https://arxiv.org/abs/2410.10819); budgets fall, or rise, with depth, as in PyramidKV
        (https://arxiv.org/abs/2406.02069).
        """
        groups = self.space.groups

        def make(tokens: int) -> Policy:
            policy = self.space.member(family, min(tokens, self.space.top))
            if policy is None:
                raise ValueError
            return policy

        made: list[Policy | PerLayer] = []
        for budget in self.space.budgets:
            small = self.space.member(family, budget)
            heads = None if small is None else self.space.retrieval(small)
            if heads is not None:
                made.append(heads)
        for budget in self.space.few_budgets if len(groups) > 1 else ():
            for last in PYRAMIDS:
                try:
                    layers = pyramid(make, budget, len(groups), last=last).policies
                except ValueError:  # a budget at one end is too few
                    continue
                made.append(self.space.policy(layers))
        found = []
        for done, policy in enumerate(made):
            self.tell("heads and pyramids", done * self.first, len(made) * self.first)
            found.append((policy, self._loss(policy)))
        self.tell("heads and pyramids", len(made) * self.first, len(made) * self.first)
        return found

    # Rounds ---------------------------------------------------------------------------------------

    def _rounds(self, running: list[Choice]) -> list[Choice]:
        """Measures candidates on more and more passages; those that were measured on all."""
        count = self.first
        self._measure(running, count, f"{len(running)} candidates")
        refined = False
        while count < self.passages or len(running) > FINALISTS or not refined:
            if not refined and (count > self.first or count == self.passages):
                running = self._refined(running, count)
                refined = True
            most = 2 * FINALISTS if refined else len(running)
            running = self._nearest([self.found[choice] for choice in running], most)
            count = min(2 * count, self.passages)
            self._measure(running, count, f"{len(running)} candidates, {count} passages")
        return running

    def _all_along(self, running: list[Choice]) -> None:
        """Measures points all along the front on all passages, beside the last candidates."""
        few = [
            Point(point.choice, point.bytes, point.losses[: self.first])
            for point in self.found.values()
        ]
        apart = [self.found[choice].bytes for choice in running]
        more = []
        for point in front(few):
            if all(max(size, point.bytes) > APART * min(size, point.bytes) for size in apart):
                apart.append(point.bytes)
                more.append(point.choice)
        self._measure(more, self.passages, "along the front")

    def _measure(self, choices: Sequence[Choice], count: int, stage: str) -> None:
        total = len(choices) * count
        for done, choice in enumerate(choices):
            self.tell(stage, done * count, total)
            losses = tuple(self.oracle.losses(choice, count))
            self.found[choice] = Point(choice, sum(self.oracle.bytes(choice)), losses)
        self.tell(stage, total, total)

    def _refined(self, running: list[Choice], count: int) -> list[Choice]:
        """Candidates, and what comes of changing the best one's budgets a little, a few times."""
        known = dict.fromkeys(running)
        for step in range(REFINED):
            best = self._best([self.found[choice] for choice in known])
            stage = f"around the best, {step + 1} of {REFINED}"
            changes = self._changes(best.choice)
            self._measure([each for row in changes for each, _ in row], count, stage)
            cells = self._cells(best.choice)
            parts = []
            for group, row in enumerate(changes):
                options = [(cells[group], 0.0)]
                for choice, policy in row:
                    known.setdefault(choice)
                    options.append((policy, self.found[choice].loss - best.loss))
                parts.append(self._priced(group, options, best.choice.storage))
            more = [
                Choice(self.space.policy(each.value), best.choice.storage)
                for each in self._spread(frontier(parts), best.loss, all_along=False)
            ]
            more = [choice for choice in more if choice not in known]
            if not more:
                break
            self._measure(more, count, stage)
            known.update(dict.fromkeys(more))
        return list(known)

    def _cells(self, choice: Choice) -> list[Policy]:
        """The policy of each group."""
        policy = choice.policy
        if isinstance(policy, PerLayer):
            return [policy.policies[group[0]] for group in self.space.groups]
        return [policy] * len(self.space.groups)

    def _changes(self, choice: Choice) -> list[list[tuple[Choice, Policy]]]:
        """For each group the same with a little more for it, and a little less."""
        cells = self._cells(choice)
        found = []
        for group, cell in enumerate(cells):
            row = []
            for policy in self.space.beside(cell):
                changed = [*cells[:group], policy, *cells[group + 1 :]]
                row.append((Choice(self.space.policy(changed), choice.storage), policy))
            found.append(row)
        return found

    def _best(self, points: Sequence[Point]) -> Point:
        """The smallest that should meet the demand, or the one that comes nearest to it."""
        if self.demand.bytes is not None:
            most = self.demand.bytes
            return min(points, key=lambda p: (max(p.bytes - most, 0), p.loss, p.bytes))
        most = self.demand.nats or 0.0
        return min(points, key=lambda p: (max(p.high() - most, 0), p.bytes, p.loss))

    def _worth_a_run(self, candidates: dict[Choice, float]) -> list[Choice]:
        """All but those that another should beat by far, in bytes and in loss."""
        sizes = {choice: sum(self.oracle.bytes(choice)) for choice in candidates}

        def beaten(choice: Choice) -> bool:
            return any(
                sizes[other] <= 0.8 * sizes[choice] and loss <= 0.7 * candidates[choice]
                for other, loss in candidates.items()
            )

        return [
            choice
            for choice in candidates
            if choice == Choice(KeepAll(), choice.storage) or not beaten(choice)
        ]

    def _nearest(self, points: Sequence[Point], most: int) -> list[Choice]:
        """Those nearest to the front and the demand: half of them, from `FINALISTS` to `most`.

        Few passages may flatter many of them alike. So half goes by what is sure on the passages
        so far, half by what could be sure on all; and one that is well within the demand stays.
        """
        keep = max(FINALISTS, min(math.ceil(len(points) / 2), most))
        chosen: dict[Choice, None] = {}
        if self.demand.nats is not None:
            safe = [p for p in points if p.high() <= self.demand.nats / 2]
            for point in sorted(safe, key=lambda p: (p.bytes, p.loss))[:1]:
                chosen[point.choice] = None
        orders = [
            sorted(points, key=lambda point: (self._rank(point, points, count), point.bytes))
            for count in (len(points[0].losses), self.passages)
        ]
        for pair in zip(*orders, strict=True):
            for point in pair:
                if len(chosen) < keep:
                    chosen.setdefault(point.choice)
        return list(chosen)

    def _rank(self, point: Point, points: Sequence[Point], count: int) -> float:
        """How far from the front and the demand, were the losses those of `count` passages."""
        best = min(each.loss for each in points if each.bytes <= point.bytes)
        if self.demand.bytes is not None:
            fitting = [p.loss for p in points if p.bytes <= self.demand.bytes]
            behind = (point.loss - best) / max(min(fitting, default=1.0), 1e-3)
            away = abs(math.log2(point.bytes / self.demand.bytes))
            return behind + (away if point.bytes <= self.demand.bytes else 4 * away)
        scale = self.demand.nats
        assert scale is not None
        away = math.log2(max(point.high(count), scale / 16) / scale)
        return (point.loss - best) / scale + (2 * away if away > 0 else -away)


def _rising(row: dict[int, float]) -> dict[int, float]:
    """Losses by budget, from the largest on: none is less than that of a larger budget, or zero.

    >>> _rising({8: 0.25, 4: 0.125, 2: 0.5})
    {8: 0.25, 4: 0.25, 2: 0.5}
    """
    most, found = 0.0, {}
    for budget, loss in row.items():
        most = max(most, loss)
        found[budget] = most
    return found


def _dearest(rows: Sequence[dict[int, float]], count: int) -> list[int]:
    """The groups that lose most, all budgets together."""
    totals = [math.fsum(row.values()) for row in rows]
    return sorted(range(len(rows)), key=lambda group: -totals[group])[:count]


def front(points: Iterable[Point]) -> list[Point]:
    """Those that no point of as few bytes loses less than, by rising bytes."""
    return [each.value for each in pareto(Option(p.bytes, p.loss, p) for p in points)]
