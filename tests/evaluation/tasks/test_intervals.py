"""Intervals: hand arithmetic, prompts whose answers go together, and how often they hold."""

import math
import random

import pytest

from attnspan.evaluation.tasks.intervals import Z, clustered, mean, wilson


def test_wilson_by_hand():
    # 8 of 10: (0.8 + z^2/20 +- z sqrt(0.8 * 0.2 / 10 + z^2/400)) / (1 + z^2/10), z = 1.96:
    # (0.99207 +- 0.31194) / 1.38415
    found = wilson(0.8, 10)
    assert found.value == 0.8
    assert found.low == pytest.approx(0.4902, abs=1e-4)
    assert found.high == pytest.approx(0.9433, abs=1e-4)
    # At the ends: z^2 / (n + z^2) from them.
    assert wilson(0, 20).low == 0
    assert wilson(0, 20).high == pytest.approx(Z * Z / (20 + Z * Z))
    assert wilson(1, 20).high == 1
    assert wilson(1, 20).low == pytest.approx(20 / (20 + Z * Z))


def test_one_question_a_prompt_is_wilson():
    assert clustered([1, 0, 1, 1], [1, 1, 1, 1]) == wilson(0.75, 4)


def test_answers_that_go_together_count_once():
    assert clustered([8, 0] * 10, [8] * 20) == wilson(0.5, 20)
    assert clustered([4] * 20, [8] * 20) == wilson(0.5, 160)
    assert clustered([8] * 20, [8] * 20) == wilson(1, 20)
    assert clustered([3], [8]) == wilson(0.375, 1)
    # By hand: shares 1, .5, 0, .5 of 4 each; variance (4 + 0 + 4 + 0) * 4/3 / 256 = 1/24,
    # so 0.25 * 24 = 6 trials.
    assert clustered([4, 2, 0, 2], [4] * 4).low == pytest.approx(wilson(0.5, 6).low)


def coverage(interval, tries=400):
    """How often it holds 0.4, the mean of prompts whose own rates are 0.1 or 0.7."""
    draw, held = random.Random(0), 0
    for _ in range(tries):
        right = [
            sum(draw.random() < rate for _ in range(10))
            for rate in (draw.choice([0.1, 0.7]) for _ in range(30))
        ]
        found = interval(right, [10] * 30)
        held += found.low <= 0.4 <= found.high
    return held / tries


def test_the_interval_holds_as_often_as_it_says():
    assert coverage(clustered) > 0.92
    # Mutation: all answers as if they were independent.
    assert coverage(lambda right, asked: wilson(sum(right) / 300, 300)) < 0.8


def test_a_mean_by_hand():
    # 1, 2, 3: two errors are 2 sqrt(1 / 3).
    found = mean([1.0, 2.0, 3.0])
    assert (found.value, found.low) == (2.0, pytest.approx(2 - 2 / math.sqrt(3)))
    assert mean([1.0]).low == -math.inf
