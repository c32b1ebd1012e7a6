"""The search on losses that are known: what it takes is what trying everything would take."""

import itertools
import math
from fractions import Fraction

import pytest

from attnspan.cache import Dense, Int4, Int8
from attnspan.evaluation.tune import search as searching
from attnspan.evaluation.tune import space as spaces
from attnspan.evaluation.tune.search import Demand, search
from attnspan.evaluation.tune.space import FAMILIES, Choice, Space
from attnspan.policies import KeepAll, PerHead, PerLayer, SinkWindow, Window

LENGTH = 1024
TOKEN = {Dense(): 256, Int8(): 132, Int4(): 72}
LOST = {Dense(): 0.0, Int8(): 0.0005, Int4(): 0.004}
# What a layer loses when it has nothing: layer 1 needs much, layer 2 nothing.
NEEDS = (0.02, 0.12, 0.0, 0.05)


class Planted:
    """An oracle whose losses add up over layers, but for `cross` times each pair of neighbours."""

    def __init__(self, needs=NEEDS, cross=0.0, spread=0.0):
        self.needs, self.cross, self.spread = needs, cross, spread
        self.asked = []

    def cells(self, policy):
        return policy.policies if isinstance(policy, PerLayer) else (policy,) * len(self.needs)

    def share(self, policy):
        """What a layer lacks, in parts of all."""
        held = LENGTH if policy.capacity is None else min(LENGTH, policy.capacity)
        wrong = 0.0 if isinstance(policy, SinkWindow | KeepAll) else 0.5
        return (1 - held / LENGTH) ** 2 + wrong

    def loss(self, choice):
        lost = [
            need * self.share(p)
            for need, p in zip(self.needs, self.cells(choice.policy), strict=True)
        ]
        pairs = sum(math.sqrt(a * b) for a, b in itertools.pairwise(lost))
        return LOST[choice.storage] + sum(lost) + self.cross * pairs

    def losses(self, choice, count):
        self.asked.append((choice, count))
        loss = self.loss(choice)
        return [loss + self.spread * (i % 2 - 0.5) for i in range(count)]

    def bytes(self, choice):
        def held(policy):
            return 5 * LENGTH // 4 if policy.capacity is None else policy.capacity

        return tuple(TOKEN[choice.storage] * held(p) for p in self.cells(choice.policy))


def space():
    layers = len(NEEDS)
    return Space((None,) * layers, (1,) * layers, LENGTH, ("sinks", "window"), tuple(TOKEN))


def all_choices(where):
    options = [where.whole, *(FAMILIES["sinks"](budget) for budget in where.budgets)]
    for storage in where.storages:
        for some in itertools.product(options, repeat=len(where.groups)):
            yield Choice(where.policy(some), storage)


@pytest.fixture
def few(monkeypatch):
    """Four budgets a layer, so that each combination can be tried."""
    monkeypatch.setattr(spaces, "BUDGETS", tuple(map(Fraction, ("3/4", "1/2", "1/4", "1/8"))))


def smallest(oracle, where, nats):
    fitting = [choice for choice in all_choices(where) if oracle.loss(choice) <= nats]
    return min(sum(oracle.bytes(choice)) for choice in fitting)


def taken(found, nats):
    return min(point.bytes for point in found.finalists if point.loss <= nats)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("nats", [0.006, 0.0198, 0.05, 0.1])
def test_the_smallest_that_meets_a_loss_is_that_of_all(nats):
    oracle, where = Planted(), space()
    found = search(oracle, where, 16, Demand(nats=nats))
    assert taken(found, nats) == smallest(oracle, where, nats)
    assert found.families[0] == "sinks"


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("memory", [100_000, 150_000, 240_000])
def test_the_best_within_a_memory_is_that_of_all(memory):
    oracle, where = Planted(), space()
    found = search(oracle, where, 16, Demand(bytes=memory))
    best = min(point.loss for point in found.finalists if point.bytes <= memory)
    fitting = [c for c in all_choices(where) if sum(oracle.bytes(c)) <= memory]
    assert best == pytest.approx(min(map(oracle.loss, fitting)), abs=1e-12)


@pytest.mark.usefixtures("few")
def test_without_the_knapsack_the_answer_is_another(monkeypatch):
    """Equal budgets alone don't find it: the test above can fail."""

    def equal(parts):
        return [
            searching.Option(sum(o.bytes for o in some), sum(o.loss for o in some), values)
            for some in zip(*parts, strict=False)  # parts may lack a budget
            if len(set(values := tuple(o.value for o in some))) == 1
        ]

    monkeypatch.setattr(searching, "frontier", lambda parts: searching.pareto(equal(parts)))
    monkeypatch.setattr(searching, "REFINED", 0)
    oracle, where = Planted(), space()
    found = search(oracle, where, 16, Demand(nats=0.0198))
    assert taken(found, 0.0198) > smallest(oracle, where, 0.0198)


@pytest.mark.usefixtures("few")
def test_losses_that_don_t_add_up_are_met_by_changing_budgets(monkeypatch):
    """Neighbours lose more together than alone, and still it is what trying all would find."""
    oracle, where, nats = Planted(cross=2.0), space(), 0.05
    least = smallest(oracle, where, nats)
    assert taken(search(oracle, where, 16, Demand(nats=nats)), nats) == least
    # It is the changes that do it, not luck.
    monkeypatch.setattr(searching, "REFINED", 0)
    assert taken(search(oracle, where, 16, Demand(nats=nats)), nats) > 1.3 * least


class PlantedHeads(Planted):
    """The first KV head of the second layer needs all, every other one nothing."""

    def share(self, policy):
        if isinstance(policy, PerHead):
            return super().share(policy.policies[0])
        return super().share(policy)

    def bytes(self, choice):
        def held(policy):
            if isinstance(policy, PerHead):
                return sum(each.capacity for each in policy.policies) // 2
            return 5 * LENGTH // 4 if policy.capacity is None else policy.capacity

        return tuple(TOKEN[choice.storage] * held(p) for p in self.cells(choice.policy))


@pytest.mark.usefixtures("few")
def test_heads_have_budgets_of_their_own():
    oracle = PlantedHeads(needs=(0.0, 0.5))
    by_layer = Space((None,) * 2, (1,) * 2, LENGTH, ("sinks",), tuple(TOKEN))
    by_head = Space((None,) * 2, (2,) * 2, LENGTH, ("sinks",), tuple(TOKEN))
    nats = 0.01
    together = taken(search(oracle, by_layer, 16, Demand(nats=nats)), nats)
    assert together == TOKEN[Int4()] * (LENGTH + LENGTH // 8)
    found = search(oracle, by_head, 16, Demand(nats=nats))
    apart = min((p for p in found.finalists if p.loss <= nats), key=lambda p: p.bytes)
    layer = apart.choice.policy.policies[1]
    assert layer == PerHead((SinkWindow(4, LENGTH - 4), SinkWindow(4, LENGTH // 8 - 4)))
    assert apart.bytes < together


def test_only_what_was_measured_is_told_and_on_as_many_passages():
    oracle = Planted(spread=0.002)
    found = search(oracle, space(), 16, Demand(nats=0.0198))
    asked = set(oracle.asked)
    for point in found.points:
        assert (point.choice, len(point.losses)) in asked
        assert point.loss == pytest.approx(oracle.loss(point.choice))
    assert {len(point.losses) for point in found.finalists} == {16}
    few = [len(point.losses) for point in found.points]
    assert few.count(16) == len(found.finalists) < len(few)


def test_the_same_values_lead_the_same_way():
    first, second = Planted(), Planted()
    search(first, space(), 16, Demand(nats=0.0198))
    search(second, space(), 16, Demand(nats=0.0198))
    assert first.asked == second.asked


def test_passages_of_the_first_rounds_are_few():
    oracle = Planted()
    search(oracle, space(), 64, Demand(nats=0.0198))
    often = [choice for choice, count in oracle.asked if count == 64]
    assert len(set(often)) < len({choice for choice, _ in oracle.asked}) / 5


def test_families_hold_what_their_budget_says():
    for name, make in FAMILIES.items():
        for budget in (16, 32, 64, 100, 512, 1000):
            assert make(budget).capacity == budget, name


def test_layers_with_windows_of_their_own():
    hybrid = Space((128, None, 128, None), (2,) * 4, LENGTH)
    assert hybrid.groups == ((1,), (3,))
    assert hybrid.policy([Window(8), Window(9)]) == PerLayer(
        (KeepAll(), Window(8), KeepAll(), Window(9))
    )
    sliding = Space((128,) * 4, (2,) * 4, LENGTH)
    assert (sliding.top, sliding.whole, sliding.groups) == (
        128,
        KeepAll(),
        ((0,), (1,), (2,), (3,)),
    )
    assert max(sliding.budgets) < 128
    full = Space((None,) * 2, (2,) * 2, LENGTH)
    assert full.whole == SinkWindow(4, LENGTH - 4)


def test_heads_that_retrieve():
    small = SinkWindow(4, 60)
    known = ((False, False), (True, False), (True, True))
    where = Space((None,) * 3, (2,) * 3, LENGTH, retrieving=known)
    mixed = PerHead((where.whole, small))
    assert where.retrieval(small) == PerLayer((small, mixed, where.whole))
    for alike in ((), ((False, False),) * 3, ((True, True),) * 3):
        assert Space((None,) * 3, (2,) * 3, LENGTH, retrieving=alike).retrieval(small) is None
    assert where.beside(mixed) == [
        PerHead((SinkWindow(4, 764), small)),
        PerHead((where.whole, SinkWindow(4, 28))),
        PerHead((where.whole, SinkWindow(4, 124))),
    ]


def test_what_lies_beside_a_policy():
    where = Space((None,), (2,), LENGTH)
    assert where.beside(SinkWindow(4, 508)) == [SinkWindow(4, 380), SinkWindow(4, 636)]
    assert where.beside(where.whole) == [SinkWindow(4, 764)]
    assert where.beside(SinkWindow(4, 764)) == [SinkWindow(4, 636), where.whole]
    assert where.beside(SinkWindow(4, 500)) == [SinkWindow(4, 380), SinkWindow(4, 508)]
    assert [type(each).__name__ for each in where.beside(FAMILIES["snap"](512))] == ["SnapKV"] * 2
