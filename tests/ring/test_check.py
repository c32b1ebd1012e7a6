"""`attnspan ring check`: it starts a ring here, and what it finds can be simulated with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from attnspan.patterns import Causal, SlidingWindow
from attnspan.ring import Contiguous, ZigZag
from attnspan.ring.check import Shape, counted_bytes
from attnspan.ring.exchange import plan_exchange


def attnspan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attnspan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_a_ring_of_two_is_exact_and_its_figures_serve_the_simulator(tmp_path) -> None:
    out = tmp_path / "check.json"
    done = attnspan("ring", "check", "--processes", "2", "--tokens", "512", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    for row in found["exactness"]:
        assert row["error"] <= 2 * row["one_process"], row
    assert all(row["outputs_wrong"] == 0 for row in found["leaks"])
    for row in found["costs"]:
        assert row["sent_bytes"] == row["sent_bytes_counted"], row
    assert "512 tokens" in done.stdout
    options = ("--devices", "1,2", "--context", "8K", "--model", "mistral-7b")
    simulated = attnspan("ring", "simulate", "--link", str(out), *options)
    assert simulated.returncode == 0, simulated.stderr
    assert "ring" in simulated.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--processes", "1"), "--processes': 1 is given; a whole number of at least 2 is allowed"),
        (("--tokens", "100"), "tokens is 100 on 4 processes; a multiple of 8 is allowed"),
        (("--heads", "3"), "heads is 3; a multiple of the 2 KV heads is allowed"),
        (("--json", "/no/such/folder/x"), "there is no folder"),
    ],
)
def test_bad_input_is_one_sentence(options, words) -> None:
    done = attnspan("ring", "check", *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("pattern", "layout"), [(Causal(), ZigZag()), (SlidingWindow(9), Contiguous())]
)
def test_bytes_counted_by_hand_are_those_planned(pattern, layout) -> None:
    shape = Shape(64, 4, 2, 8)
    holdings = layout.chunks(64, 4)
    plans = [plan_exchange(pattern, 64, holdings, rank) for rank in range(4)]
    token = 2 * 2 * 8 * 4
    planned = [(2 * plan.sent + plan.received) * token for plan in plans]
    assert counted_bytes(pattern, layout, 4, shape) == planned
