"""The example that trains over rings with FSDP2 loses as one process, also after one is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_ring.py"
LENGTH, STEPS = 64, 50


@pytest.fixture(scope="module")
def alone() -> list[float]:
    spec = importlib.util.spec_from_file_location("train_ring", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return example.losses_alone(Namespace(length=LENGTH, rows=2, steps=STEPS))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def launched(processes: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """torchrun with the example; none of its processes is left afterwards."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=2"]
    command += [f"--nproc-per-node={processes}", str(EXAMPLE), "--ring=2"]
    command += [f"--length={LENGTH}", f"--steps={STEPS}", *arguments]
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        yield run
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGTERM)
            run.wait(20)


def finished(run: subprocess.Popen[str], seconds: float = 120) -> str:
    output, _ = run.communicate(timeout=seconds)
    assert run.returncode == 0, output
    return output


def assert_same(losses: Path, alone: list[float]) -> None:
    got = json.loads(losses.read_text())["losses"]
    assert len(got) == STEPS
    assert alone[-1] < alone[0] - 1
    torch.testing.assert_close(got, alone, rtol=0, atol=1e-4)


def test_four_processes_in_two_rings_lose_as_one(tmp_path, alone) -> None:
    with launched(4, f"--losses={tmp_path / 'losses.json'}") as run:
        finished(run)
    assert_same(tmp_path / "losses.json", alone)


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are found in /proc")
def test_two_processes_of_which_one_is_killed_go_on_as_one(tmp_path, alone) -> None:
    folder = tmp_path / "checkpoints"
    arguments = (f"--losses={tmp_path / 'losses.json'}", f"--checkpoints={folder}", "--every=5")
    with launched(2, *arguments) as run:
        until(lambda: (folder / "step-000015.safetensors").exists())
        os.kill(workers_of(run.pid)[-1], signal.SIGKILL)
        output = finished(run)
    steps = [int(step) for step in re.findall(r"goes on after step (\d+)", output)]
    assert len(steps) == 1, output
    assert 15 <= steps[0] < STEPS
    assert_same(tmp_path / "losses.json", alone)
    assert [path.name for path in sorted(folder.iterdir())] == [
        "step-000045.safetensors",
        "step-000050.safetensors",
    ]


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if EXAMPLE.name in Path(f"/proc/{c}/cmdline").read_text()]


def until(true: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.005)
