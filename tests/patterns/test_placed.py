"""Patterns seen from a part of the sequence, and which keys a part's queries need."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.patterns import Causal, Documents, Longformer, SlidingWindow, Strided, pairs, parse
from attnspan.patterns.atoms import Stride, atoms
from attnspan.patterns.placed import Placed, placed
from attnspan.patterns.tiles import plan, seen
from attnspan.testing import patterns


def _strided(pattern) -> bool:
    return any(isinstance(atom, Stride) for atom in atoms(pattern.rule()))


@settings(max_examples=150, deadline=None)
@given(
    patterns(),
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 12),
)
def test_a_part_sees_what_the_whole_says(pattern, q_start, k_start, step, n, m) -> None:
    if step > 1 and q_start != k_start and _strided(pattern):
        with pytest.raises(ValueError, match="has a stride"):
            placed(pattern, q_start, k_start, step)
        return
    part, offset = placed(pattern, q_start, k_start, step)
    i, j = np.arange(n)[:, None], np.arange(m)
    expected = pattern.sees(q_start + step * i, k_start + step * j)
    assert (part.sees(i + offset, j) == expected).all()
    assert parse(str(part)) == part
    assert pairs(part, n, m, offset) == expected.sum()
    drawn = np.zeros((n, m), bool)
    for each in plan(part, n, m, offset, tile=3):
        for job in each.jobs:
            for c in range(job.count):
                rows = job.first_query + c + each.step * np.arange(job.tiles.n)
                keys = job.first_key + c + each.step * np.arange(job.tiles.m)
                a = np.arange(job.tiles.n)[:, None] + job.tiles.offset
                drawn[np.ix_(rows, keys)] |= job.tiles.rule.sees(a, np.arange(job.tiles.m))
    assert (drawn == expected).all()


@settings(max_examples=150, deadline=None)
@given(patterns(), st.sets(st.integers(0, 40), min_size=1), st.integers(1, 41))
def test_the_keys_that_some_query_sees(pattern, places, m) -> None:
    rows = np.array(sorted(places), np.int64)
    expected = np.broadcast_to(pattern.sees(rows[:, None], np.arange(m)), (len(rows), m)).any(0)
    assert (seen(pattern, rows, m) == expected).all()


def test_what_depends_on_distances_stays_itself() -> None:
    for pattern in (Causal(), SlidingWindow(7), Strided(3, 5)):
        assert placed(pattern, 40, 24) == (pattern, 16)
    assert placed(Longformer(7, 2), 40, 24) == (Placed(Longformer(7, 2), 24), 16)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Placed("Causal()", 0), TypeError, "pattern is 'Causal"),
        (lambda: Placed(Causal(), 1.5), ValueError, "start is 1.5"),
        (lambda: Placed(Causal(), 0, 0), ValueError, "step is 0"),
        (lambda: Placed(Documents((3,)), 0, 1, True), ValueError, "lead is True"),
        (lambda: parse("Placed(Causal(), 'a')"), ValueError, "start is 'a'"),
        (lambda: parse("Placed(Causal())"), ValueError, "Placed"),
        (lambda: parse("Placed(3, 4)"), ValueError, "in it"),
    ],
)
def test_bad_input_is_one_sentence(make, error, words) -> None:
    with pytest.raises(error, match=words):
        make()
