"""How long a command takes that loads nothing, in processes of its own.

Each command is started many times, in turns, so that a machine's drift meets them alike. Beside
them stands an interpreter that does nothing. Writes benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from record import write

COMMANDS = (
    "plan mistral-7b --context 128K",
    "plan gemma-3-27b --context 128K --policy sinks:4+window:4092 --storage int8 --explain",
    "plan llama-3.1-70b --fit --memory 80GiB --weights int4",
    "plan mistral-7b --context 128K --compare",
    "plan llama-3-8b --context 128K --pattern Strided(2048,64)",
    "plan llama-3-8b --context 1M --devices 8",
    "article",
    "ring simulate --devices 1..64",
)


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    cases = {"python -c pass": [sys.executable, "-c", "pass"]}
    cases |= {
        f"attnspan {each}": [sys.executable, "-m", "attnspan", *each.split()] for each in COMMANDS
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for command in cases.values():
        seconds(command)  # compiles what Python compiles, and reads it from the disk
    for _ in range(runs):
        for name, command in cases.items():
            times[name].append(seconds(command))
    rows = [
        {
            "command": name,
            "seconds": statistics.median(each),
            "least": min(each),
            "most": max(each),
            "runs": runs,
        }
        for name, each in times.items()
    ]
    for row in rows:
        print(
            f"{row['seconds'] * 1e3:7.0f} ms ({row['least'] * 1e3:.0f} to "
            f"{row['most'] * 1e3:.0f})  {row['command']}"
        )
    print(write(Path("startup.json"), {"rows": rows}))


if __name__ == "__main__":
    main()
