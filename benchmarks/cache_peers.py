"""attnspan's caches beside kvpress's presses and transformers' own: quality, bytes and speed.

Each library runs in an environment of its own, in cache_peers_worker.py, over the same model, token
ids and budgets. Writes benchmarks/results/cache_peers.json; --report then draws
cache_peers.png beside it, and writes the tables of docs/cache-peers.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from cache_peers_report import draw, tables
from record import RESULTS, device

from attnspan.evaluation.files import write_file
from attnspan.evaluation.loop import first_token
from attnspan.evaluation.tasks import Copy, Passkey, Writer
from attnspan.evaluation.texts import english_heldout, python_heldout
from attnspan.models import bundled
from attnspan.models.loading import load

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "cache-peers.md"
# What pip installs in each; kvpress pins transformers below 5.3.
PACKAGES = {
    "attnspan": (),
    "transformers": (
        "torch==2.13.0",
        "transformers==5.24.0",
        "optimum-quanto==0.2.7",
        "hqq==0.2.8.post1",
    ),
    "kvpress": ("torch==2.13.0", "kvpress==0.5.5", "optimum-quanto==0.2.7"),
}
TEXTS = {"Python": python_heldout, "English": english_heldout}
CONTEXT, LENGTH, STREAM, BUDGET = 512, 1024, 4096, 512
"""Tokens of a prompt, of a prompt and what follows, of a stream, and a stream's budget."""


def spread(ids: Sequence[int], bos: int, length: int, count: int) -> list[list[int]]:
    """Passages of `length` tokens after BOS, evenly over a text."""
    gap = (len(ids) - length) // max(1, count - 1)
    return [[bos, *ids[i * gap : i * gap + length]] for i in range(count)]


def prompts(writer: Writer, examples: int) -> dict[str, list[dict[str, Any]]]:
    """Passkey and copy, each cut where the prompt ends and the question begins."""
    tail = len(writer.ids("\nWhat is the pass key? The pass key is"))
    passkey, copy = [], []
    for example in Passkey().examples(writer, LENGTH, examples, 0):
        (probe,) = example.probes
        passkey.append(
            {
                "setting": dict(probe.setting),
                "context": example.ids[: probe.at - tail],
                "question": example.ids[probe.at - tail : probe.at],
                "choices": probe.candidates,
                "right": probe.right,
            }
        )
    task = Copy()
    for example in task.examples(writer, LENGTH, examples, 0):
        start = LENGTH - task.block
        copy.append(
            {
                "setting": dict(example.probes[0].setting),
                "context": example.ids[:start],
                "question": example.ids[start:],
                "probes": [probe.at - start for probe in example.probes],
                "candidates": [token for (token,) in example.probes[0].candidates],
            }
        )
    return {"passkey": passkey, "copy": copy}


def settings(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What is measured; `few` are the rows that make sense for a stream without end."""
    common = {"whole": True, "few": False, "grown": 0, "rows": 24, "most": LENGTH}
    for budget in (CONTEXT // 4, CONTEXT // 2):
        if "text" in names:
            yield {
                **common,
                "name": "text",
                "whole": budget == CONTEXT // 4,
                "budget": budget,
                "grown": budget + LENGTH - CONTEXT,
                "context": CONTEXT,
                "first": CONTEXT + 1,
                "passages": "passages",
            }
    for budget in (LENGTH // 4, LENGTH // 2):
        if "tasks" in names:
            yield {
                **common,
                "name": "tasks",
                "whole": budget == LENGTH // 4,
                "budget": budget,
                "context": LENGTH,
                "tasks": ["passkey", "copy"],
            }
    if "stream" in names:
        yield {
            **common,
            "name": "stream",
            "few": True,
            "most": STREAM,
            "budget": BUDGET,
            "context": BUDGET,
            "first": LENGTH + 1,
            "passages": "streams",
        }
    if "speed" in names:
        # Threads that wait for each other would time the machine's other work.
        timed = {**common, "speed": "timed", "steps": 100, "threads": 1}
        yield {
            **timed,
            "name": "speed",
            "budget": 256,
            "context": 1000,
            "repeats": 5,
            "most": 1100,
        }
        yield {
            **timed,
            "name": "speed, long",
            "few": True,
            "budget": BUDGET,
            "context": 8000,
            "repeats": 3,
            "most": 8100,
        }


def inputs(count: int, examples: int) -> dict[str, Any]:
    """Token ids, made once for all libraries."""
    model, tokenizer = load("bundled", "cpu")
    bos = first_token(model, tokenizer)
    assert bos is not None
    made: dict[str, Any] = {"passages": [], "streams": [], "texts": [], "stream_texts": []}
    for name, text in TEXTS.items():
        ids = list(text().encode())  # a token is a byte
        made["passages"] += spread(ids, bos, LENGTH, count)
        made["streams"] += spread(ids, bos, STREAM, max(1, count // 4))
        made["texts"] += [name] * count
        made["stream_texts"] += [name] * max(1, count // 4)
    made["timed"] = spread(list(python_heldout().encode()), bos, 8192, 1)
    return made | prompts(Writer(tokenizer, bos), examples)


def interpreter(library: str, folder: Path) -> str:
    """The Python of a library's environment, made if it isn't there; attnspan's is this one."""
    if library == "attnspan":
        return sys.executable
    python = folder / library / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / library)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", *PACKAGES[library]]
        subprocess.run(pip, check=True)
    return str(python)


def run(library: str, given: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """One library's versions and then its rows, from a process of its own."""
    python = interpreter(library, folder)
    source = str(HERE.parent / "src")
    environment = {**os.environ, "PYTHONPATH": source if library == "attnspan" else ""}
    environment |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "inputs.json"
        file.write_text(json.dumps(given))
        command = [python, str(HERE / "cache_peers_worker.py"), library, str(file)]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdout is not None
            yield from map(json.loads, worker.stdout)
    if worker.returncode:
        raise RuntimeError(f"the worker of {library} ended with status {worker.returncode}")


def key(row: dict[str, Any]) -> list[Any]:
    return [row[name] for name in ("library", "setting", "budget", "row")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="the picture and the tables")
    parser.add_argument("--settings", default="text,tasks,stream,speed", help="which, with commas")
    parser.add_argument("--libraries", default=",".join(PACKAGES), help="which, with commas")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--missing", action="store_true", help="only rows that aren't there")
    parser.add_argument("--passages", type=int, default=12, help="of each text")
    parser.add_argument("--examples", type=int, default=8, help="prompts of each setting")
    parser.add_argument("--venvs", type=Path, default=Path(tempfile.gettempdir()) / "cache-peers")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the results")
    given = parser.parse_args(arguments)
    path = given.out.resolve() / "cache_peers.json"
    if not given.report:
        measure(given, path)
    else:
        result = json.loads(path.read_text())
        write_file(path.with_suffix(".png"), draw(result))
        write_file(DOCS, tables(result, DOCS.read_text()).encode())


def measure(given: argparse.Namespace, path: Path) -> None:
    old = json.loads(path.read_text()) if path.exists() else {"versions": {}, "rows": []}
    made = inputs(given.passages, given.examples)
    made |= {
        "model": str(bundled.path()),
        "threads": torch.get_num_threads(),
        "only": given.only,
        "known": [key(row) for row in old["rows"]] if given.missing else [],
        "settings": list(settings(given.settings.split(","))),
    }
    result = {
        **old,
        "meta": {
            "model": "bundled",
            "dtype": "bfloat16",
            "device": device(),
            "python": platform.python_version(),
            "date": datetime.date.today().isoformat(),
        },
        "texts": made["texts"],
        "stream_texts": made["stream_texts"],
        "prompts": {task: [p["setting"] for p in made[task]] for task in ("passkey", "copy")},
    }
    for library in given.libraries.split(","):
        found = run(library, made, given.venvs)
        result["versions"][library] = next(found)
        for row in found:
            print(*key(row), f"{row['seconds']} s", row.get("error", ""), flush=True)
            result["rows"] = [r for r in result["rows"] if key(r) != key(row)] + [row]
            # Each row at once: the whole takes long, and what is there need not run again.
            write_file(path, (json.dumps(result) + "\n").encode())


if __name__ == "__main__":
    main()
