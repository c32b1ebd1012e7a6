"""Several processes for one test: each runs a named function, with a process group if asked for.

    run("ring.workers:total", 4, 10)      # total(rank, size, 10) in 4 processes; what each returned

They are forked from a server that has imported torch once, so that starting them costs little.
Whatever happens, none of them is left when `run`, or the `with` of `started`, ends.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = ["pytest", "torch", "torch.distributed.device_mesh", "attnspan.ring.groups"]
ALIKE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """How one process ended.

    Attributes:
        value: what its function returned, through JSON.
        error: the type's name of what it raised; "": nothing.
        text: the message of that.
        about: the attributes of that which JSON can hold.
        exit: its exit code; minus a signal's number where that ended it; None: it had to be killed.
        output: all that it wrote, a traceback too.
    """

    value: Any = None
    error: str = ""
    text: str = ""
    about: Mapping[str, Any] | None = None
    exit: int | None = None
    output: str = ""


class Started:
    """Processes under way."""

    def __init__(self, processes: Sequence[BaseProcess], folder: Path) -> None:
        self._processes, self._folder = processes, folder

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def reached(self, mark: str, rank: int, timeout: float = 20.0) -> None:
        """Returns once the rank called `mark(mark)`."""
        end = time.monotonic() + timeout
        while not (self._folder / f"{rank}.{mark}").exists():
            assert time.monotonic() < end, f"rank {rank} didn't reach {mark} in {timeout} s"
            time.sleep(0.005)

    def outcomes(self, timeout: float = 30.0, leave: Sequence[int] = ()) -> list[Outcome]:
        """Waits for all but the ranks in `leave` to exit, and kills what is left then."""
        end = time.monotonic() + timeout
        for rank, process in enumerate(self._processes):
            if rank not in leave:
                process.join(max(0.0, end - time.monotonic()))
        exits = [process.exitcode for process in self._processes]
        self.kill()
        return [self._outcome(rank, exit) for rank, exit in enumerate(exits)]

    def kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()

    def _outcome(self, rank: int, exit: int | None) -> Outcome:
        output = self._folder / f"{rank}.out"
        result = self._folder / f"{rank}.json"
        return Outcome(
            **(json.loads(result.read_text()) if result.exists() else {}),
            exit=exit,
            output=output.read_text(errors="replace") if output.exists() else "",
        )


def run(
    function: str,
    size: int,
    *args: Any,
    timeout: float = 30.0,
    group: bool = True,
    store: str = "tcp",
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """What `function(rank, size, *args)` returns in each of `size` processes.

    Args:
        function: "module:name", importable by the tests; it returns what JSON can hold.
        size: how many processes.
        args: as pickle can carry them.
        timeout: seconds for all of it.
        group: whether a gloo group of all of them is the default group.
        store: through which they find each other: "tcp" (rank 0 hosts it) or "file".
        env: variables for each, beside one OpenMP thread.

    Raises:
        AssertionError: one of them raised, died or took too long; with all that it wrote.
    """
    with started(function, size, *args, group=group, store=store, env=env) as processes:
        outcomes = processes.outcomes(timeout)
    for rank, outcome in enumerate(outcomes):
        if outcome.exit != 0 or outcome.error:
            how = "took too long" if outcome.exit is None else f"ended with {outcome.exit}"
            raise AssertionError(f"{function}: rank {rank} of {size} {how}\n{outcome.output}")
    return [outcome.value for outcome in outcomes]


@contextmanager
def started(
    function: str,
    size: int,
    *args: Any,
    group: bool = True,
    store: str = "tcp",
    env: Mapping[str, str] | None = None,
) -> Iterator[Started]:
    """The processes of `run`, for tests that do something to them."""
    server = multiprocessing.get_context("forkserver")
    # Without `__main__`: the tests' own has nothing to do with what runs there.
    server.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        where = f"file://{folder}/store" if store == "file" else f"tcp://127.0.0.1:{_port()}"
        before = {name: os.environ.get(name) for name in ALIKE}
        # The server takes these along once, when it starts.
        os.environ.update(ALIKE)
        try:
            processes = [
                server.Process(
                    target=_work,
                    args=(
                        function,
                        rank,
                        size,
                        args,
                        where if group else None,
                        folder,
                        sys.path,
                        env,
                    ),
                    name=f"{function} {rank}",
                )
                for rank in range(size)
            ]
            for process in processes:
                process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        running = Started(processes, Path(folder))
        try:
            yield running
        finally:
            running.kill()


def mark(name: str) -> None:
    """Tells the test, in one of its processes, that it came this far: `Started.reached`."""
    folder, rank = os.environ["ATTNSPAN_TEST_MARKS"].rsplit(":", 1)
    Path(folder, f"{rank}.{name}").touch()


def _work(
    function: str,
    rank: int,
    size: int,
    args: Sequence[Any],
    where: str | None,
    folder: str,
    path: list[str],
    env: Mapping[str, str] | None,
) -> None:
    with open(f"{folder}/{rank}.out", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.path[:] = path
    os.environ.update(env or {}, ATTNSPAN_TEST_MARKS=f"{folder}:{rank}")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    try:
        if where is not None:
            dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
        module, name = function.split(":")
        result["value"] = getattr(importlib.import_module(module), name)(rank, size, *args)
    except BaseException as error:
        traceback.print_exc()
        result = {"error": type(error).__name__, "text": str(error), "about": _plain(vars(error))}
    Path(f"{folder}/{rank}.part").write_text(json.dumps(result))
    os.replace(f"{folder}/{rank}.part", f"{folder}/{rank}.json")
    if where is not None:
        dist.destroy_process_group()
    if result.get("error"):
        sys.exit(1)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    kinds = str | int | float | tuple | None
    return {name: value for name, value in values.items() if isinstance(value, kinds)}


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
