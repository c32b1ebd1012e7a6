"""gloo between real processes: the right bytes, or an error that names who is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ring.processes import Outcome, run, started

DEADLINE = 1.0
GRACE = 1.0
# Of the machine that runs the tests, which others may use too.
SLACK = 1.5


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gets_what_the_others_sent(size: int) -> None:
    run("ring.workers:exchanges", size)


@pytest.mark.parametrize("size", [2, 3])
def test_gather_of_any_dtype_and_shape(size: int) -> None:
    run("ring.workers:gathers", size)


def test_rings_of_parts_of_the_world() -> None:
    assert run("ring.workers:subgroups", 4) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_all_ranks_are_told_alike_in_what_they_differ() -> None:
    first, *others = run("ring.workers:disagreements", 3)
    assert all(other == first for other in others)
    same, shape, by, documents, missing, after = first
    end = "; the same on all ranks is allowed"
    assert same == ""
    assert shape == (
        "ring_attention: rank 2 calls with k (1, 2, 500, 64) bfloat16, "
        f"ranks 0, 1 with (1, 2, 512, 64) bfloat16{end}"
    )
    assert by == f"ring: rank 0 calls ring_decode, ranks 1, 2 ring_attention{end}"
    assert "True), ranks 0, 1 with ..." in documents
    assert len(documents) < 500
    assert missing == (
        f"ring_attention: rank 0 calls with pattern none, ranks 1, 2 with Causal(){end}"
    )
    assert after.startswith("ring_attention: rank 2 calls after 2 exchanges (trail ")


def test_rows_of_other_calls_are_refused() -> None:
    for told in run("ring.workers:counts", 2):
        same, other = told.split(" | ")
        assert same == ""
        assert "rank 1 calls after other exchanges than rank 0" in other


def survivors(
    size: int, which: int, when: str, deadline: float = DEADLINE, sleep: float = 0.0, **how: Any
) -> list[Outcome]:
    """How the others end, after rank `which` fails; they exit, and soon after they were told."""
    with started("ring.workers:broken", size, which, when, deadline, sleep, **how) as processes:
        if when in ("kill", "pause"):
            processes.reached("running", which)
            time.sleep(0.05)
            processes.signal(which, signal.SIGKILL if when == "kill" else signal.SIGSTOP)
        outcomes = processes.outcomes(15.0, leave=[which])
    others = [outcome for rank, outcome in enumerate(outcomes) if rank != which]
    for outcome in others:
        assert outcome.exit == 0, outcome.output
        assert outcome.value["again"] < 0.1, outcome.value
        assert outcome.value["layer"] == 7
        assert "layer 7" in outcome.value["text"]
    return others


@pytest.mark.parametrize("store", ["file", "tcp"])
@pytest.mark.parametrize("when", ["kill", "between", "inside"])
def test_a_killed_rank_is_named_at_once(when: str, store: str) -> None:
    for outcome in survivors(3, 2 if store == "file" else 1, when, deadline=10.0, store=store):
        assert outcome.value["ranks"] == [2 if store == "file" else 1], outcome.value
        assert "its connection closed" in outcome.value["text"]
        assert outcome.value["seconds"] < SLACK, outcome.value


@pytest.mark.parametrize("when", ["between", "stop"])
def test_the_host_of_the_store_is_lost(when: str) -> None:
    for outcome in survivors(3, 0, when):
        assert outcome.value["ranks"] == [0], outcome.value
        assert "store doesn't answer any more" in outcome.value["text"], outcome.value
        assert "rank 0 of the world" in outcome.value["text"], outcome.value
        limit = GRACE + 1.0 + SLACK + (DEADLINE if when == "stop" else 0.0)
        assert outcome.value["seconds"] < limit, outcome.value


@pytest.mark.parametrize("when", ["pause", "stop"])
def test_a_rank_that_hangs_is_named_after_the_deadline(when: str) -> None:
    for outcome in survivors(3, 1, when):
        assert outcome.value["ranks"] == [1], outcome.value
        assert "no answer to the roll call" in outcome.value["text"]
        assert outcome.value["seconds"] < DEADLINE + GRACE + SLACK, outcome.value
        assert outcome.value["seconds"] > 0.9 * DEADLINE


@pytest.mark.parametrize(
    ("sleep", "store"), [(DEADLINE + 0.4, "tcp"), (DEADLINE + GRACE + 0.8, "file")]
)
def test_a_rank_that_is_late_finds_the_ring_broken(sleep: float, store: str) -> None:
    """Within the others' roll call, before the host of the store exits, and long after it."""
    late = started("ring.workers:broken", 3, 1, "slow", DEADLINE, sleep, store=store)
    with late as processes:
        outcomes = processes.outcomes(20.0)
    for outcome in outcomes:
        assert outcome.exit == 0, outcome.output
        assert outcome.value["ranks"] == [1], outcome.value
        assert outcome.value["seconds"] < max(sleep, DEADLINE + GRACE) + SLACK


def test_a_rank_that_leaves_is_named() -> None:
    with started("ring.workers:left", 3) as processes:
        outcomes = processes.outcomes(15.0)
    for rank, outcome in enumerate(outcomes):
        assert outcome.exit == 0, outcome.output
        assert outcome.value["ranks"] == [1], (rank, outcome.value)
        assert "it ran out of memory" in outcome.value["text"]
        assert outcome.value["seconds"] < SLACK


def test_a_part_of_the_world_names_its_own_ranks_and_those_of_the_world() -> None:
    for value in run("ring.workers:part_loses", 4)[1:3]:
        assert value["ranks"] == [2], value
        assert "rank 2 lost" in value["text"]
        assert "(rank 3 of the world)" in value["text"]


def test_ranks_out_of_step_are_told_where_each_stands() -> None:
    for value in run("ring.workers:out_of_step", 3):
        assert value["ranks"] == [1], value
        assert "all are alive, but not in the same call" in value["text"], value
        assert "rank 1 in call 2, the agreement of ring_attention" in value["text"], value


def test_a_message_that_is_too_short_is_noticed() -> None:
    values = run("ring.workers:too_short", 2)
    for value in values:
        assert value["ranks"] == [0], values
        assert "sent less" in value["text"]


def test_an_interrupt_ends_the_ring_for_all() -> None:
    outcomes = run("ring.workers:interrupted", 2)
    assert outcomes[1]["ranks"] == [1]
    assert outcomes[0]["ranks"] == [1]
    assert all("it was interrupted" in outcome["text"] for outcome in outcomes)
    assert outcomes[0]["seconds"] < SLACK


def test_a_rank_that_never_makes_its_transport() -> None:
    for value in run("ring.workers:absent", 3)[:2]:
        assert value["ranks"] == [2], value
        assert value["seconds"] < 1.0 + GRACE + SLACK


def test_an_interpreter_exits_though_its_peer_hangs(tmp_path: Path) -> None:
    """After the loss, and with an exchange under way that nobody waits for."""
    command = [sys.executable, "-W", "error", "-m", "ring.workers", str(tmp_path / "store")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([*command, str(r)], env=env, stdout=subprocess.PIPE) for r in (0, 1)]
    try:
        said, _ = both[0].communicate(timeout=40.0)
        assert said.decode().startswith("about to exit")
        assert time.time() - float(said.split()[-1]) < 3.0
        assert both[0].returncode == 0
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.mark.gpu
def test_tensors_on_a_gpu_go_through_pinned_memory() -> None:
    run("ring.workers:gpu", 2)
