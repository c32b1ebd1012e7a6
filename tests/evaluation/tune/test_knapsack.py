"""Budgets by part, against every way to choose them."""

import itertools
import random

import pytest

from attnspan.evaluation.tune.knapsack import Option, frontier, pareto


def parts(seed, count=4, each=5):
    draw = random.Random(seed)
    return [
        [Option(draw.randint(1, 30), draw.randint(0, 40) / 16, (i, j)) for j in range(each)]
        for i in range(count)
    ]


def brute_force(options):
    """The least loss for as few bytes, of all combinations."""
    found = [
        (sum(o.bytes for o in some), sum(o.loss for o in some))
        for some in itertools.product(*options)
    ]
    return sorted({pair for pair in found if not any(_beats(other, pair) for other in found)})


def _beats(a, b):
    return a != b and a[0] <= b[0] and a[1] <= b[1]


@pytest.mark.parametrize("seed", range(6))
def test_frontier_is_that_of_all_combinations(seed):
    options = parts(seed)
    found = frontier(options)
    assert [(o.bytes, o.loss) for o in found] == brute_force(options)
    for each in found:  # and what it names has these bytes and losses
        chosen = [options[i][j] for i, j in each.value]
        assert (sum(o.bytes for o in chosen), sum(o.loss for o in chosen)) == (
            each.bytes,
            each.loss,
        )


def test_a_greedy_choice_would_not_do():
    """The best of each part for its bytes, on its own, misses points: the oracle can fail."""

    def greedy(options):
        found = [Option(0, 0.0, ())]
        for some in options:
            best = min(some, key=lambda o: o.bytes * (1 + o.loss))
            last = found[-1]
            found.append(Option(last.bytes + best.bytes, last.loss + best.loss, ()))
        return pareto(found[-1:])

    wrong = sum(
        [(o.bytes, o.loss) for o in greedy(parts(seed))] != brute_force(parts(seed))
        for seed in range(6)
    )
    assert wrong == 6


def test_no_part_is_nothing():
    assert [(o.bytes, o.loss, o.value) for o in frontier([])] == [(0, 0.0, ())]
