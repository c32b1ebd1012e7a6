"""The tests' own processes: what fails in one is told, and none is left."""

from __future__ import annotations

import multiprocessing
import time

import pytest
from ring.processes import run


def test_the_rank_that_fails_is_told_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 ended with 1.*no even number: 1"):
        run("ring.workers:even", 2, 0.0, group=False)
    assert not multiprocessing.active_children()


def test_what_takes_too_long_is_killed() -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match="rank 0 of 1 took too long"):
        run("ring.workers:even", 1, 60.0, group=False, timeout=1.0)
    assert time.monotonic() - began < 20.0
    assert not multiprocessing.active_children()
