"""Processes that stay for many tests: each makes a gloo group once and runs what it is told."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any


class Failed(AssertionError):
    """A process raised what its task didn't expect."""


class Crew:
    """`size` processes; `run` gives each the same task and returns what each returned."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        # Loaded once, in the process that the others are forked from.
        context.set_forkserver_preload(["attnspan.models.ringed", "torch.distributed.fsdp"])
        self.ends, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, size, str(folder / "store"), theirs), daemon=True
            )
            process.start()
            self.ends.append(ours)
            self.processes.append(process)

    def run(
        self,
        task: Callable[..., Any],
        *args: Any,
        seconds: float = 60,
        left: int | None = None,
    ) -> list[Any]:
        """What `task(rank, size, *args)` returned on each rank; `task` is a module's function.

        Where the task ends some of the processes, `left` is how many, from rank 0 on, answer.
        """
        for end in self.ends:
            end.send_bytes(pickle.dumps((task, args)))
        answers = []
        for rank, end in enumerate(self.ends[:left]):
            if not end.poll(seconds):
                raise Failed(f"rank {rank} gave no answer in {seconds} s")
            answers.append(pickle.loads(end.recv_bytes()))
        for rank, (done, value) in enumerate(answers):
            if not done:
                raise Failed(f"rank {rank}: {value}")
        return [value for _, value in answers]

    def end(self) -> None:
        for end in self.ends:
            end.close()
        for process in self.processes:
            process.join(5)
            process.kill()


@contextmanager
def crew(size: int, folder: Path) -> Iterator[Crew]:
    made = Crew(size, folder)
    try:
        yield made
    finally:
        made.end()


def _work(rank: int, size: int, store: str, end: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{store}", timedelta(seconds=30), rank=rank, world_size=size
    )
    while True:
        try:
            task, args = pickle.loads(end.recv_bytes())
        except EOFError:
            break
        try:
            answer = True, task(rank, size, *args)
        except Exception:
            answer = False, traceback.format_exc()
        end.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
