"""`ring_attention` beside what else spreads one sequence over processes, on CPUs over gloo.

    pip install --no-deps ring-flash-attn==0.1.8   # without it, its rows say so
    python benchmarks/ring.py

Starts 2 and 4 processes by itself. Writes benchmarks/results/ring.json and prints the tables of
docs/ring-peers.md. ring-flash-attn needs flash-attn, and so a GPU: its exchange runs here, over
attention by the definition. Takes about five minutes on 2 cores.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import RESULTS, version, write
from ring_peers import PEERS, SINKS, WINDOW
from ring_worker import SHAPE, VICTIM

SIZES = (2, 4)
CUT = 15.0  # seconds after which a survivor counts as hanging
SHORT = 5.0  # a time-out for torch's groups that is shorter than its 30 minutes
FAULTY = (
    "attnspan",
    "torch context_parallel, FlexAttention",
    "ring-flash-attn, zigzag",
)
# Where ring-flash-attn runs as it is meant to: its README's figures, not measured here.
PUBLISHED = {
    "what": "share of the single GPU's rate, 8 H800, Llama 3.1 8B, 8K tokens a GPU",
    "forward": {"ring": 0.521, "zigzag": 0.852, "stripe": 0.744},
    "forward and backward": {"ring": 0.539, "zigzag": 0.902, "stripe": 0.829},
}


def command(size: int, folder: Path, *given: str) -> list[str]:
    """The agent looks after its processes so rarely that it ends none of them before we look."""
    worker = Path(__file__).with_name("ring_worker.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(size)]
    launcher += ["--monitor-interval", "3600"] if given[0] == "fault" else []
    return [*launcher, str(worker), given[0], str(folder), *given[1:]]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def exact(size: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(command(size, folder, "exact"), check=True, env=environment(), timeout=600)
        return json.loads((folder / "rows.json").read_text())


def fault(peer: str, how: str, timeout: float | None, leaves: bool) -> dict[str, Any]:
    """What each survivor of 4 processes sees, and how many seconds after rank 1 went."""
    size = SIZES[-1]
    given = ["fault", "--peer", peer, "--how", how]
    given += [] if timeout is None else ["--timeout", str(timeout)]
    given += ["--leaves"] if leaves else []
    survivors = [rank for rank in range(size) if rank != VICTIM]
    with tempfile.TemporaryDirectory() as name, open(f"{name}/log", "wb") as log:
        folder = Path(name)
        agent = subprocess.Popen(
            command(size, folder, *given), stdout=log, stderr=log, env=environment()
        )
        try:
            if not _until(lambda: (folder / "gone").exists(), 120.0):
                raise RuntimeError(f"{peer}: not started\n{(folder / 'log').read_text()}")
            results = [folder / f"{rank}.json" for rank in survivors]
            _until(lambda: all(path.exists() for path in results), CUT)
            gone = float((folder / "gone").read_text())
            seen = [_seen(path, rank, gone) for path, rank in zip(results, survivors, strict=True)]
        finally:
            _end(agent, [int(path.read_text()) for path in folder.glob("*.pid")])
    about = {"peer": peer, "how": how, "timeout": timeout, "survivors_exit": leaves}
    return {**about, "survivors": seen}


def _seen(path: Path, rank: int, gone: float) -> dict[str, Any]:
    if not path.exists():
        return {"rank": rank, "seconds": None}
    found = json.loads(path.read_text())
    return {"rank": rank, "seconds": found.pop("at") - gone, **found}


def _until(reached: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _end(agent: subprocess.Popen[bytes], workers: Sequence[int]) -> None:
    for pid in workers:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it exited, or was killed
            continue
    agent.kill()
    agent.wait()


def faults() -> list[dict[str, Any]]:
    rows = []
    for peer in FAULTY:
        rows += [fault(peer, "kill", None, leaves) for leaves in (False, True)]
        # Ours has a deadline of its own, and asks nothing of the group's.
        timeouts = (None,) if peer == "attnspan" else (None, SHORT)
        rows += [fault(peer, "stop", timeout, False) for timeout in timeouts]
    return rows


def cell(row: dict[str, Any]) -> str:
    """What a peer does with a pattern: its errors, or what it says instead."""
    if "lacks" in row:
        return "-"
    if "refused" in row:
        return "raises"
    forward, back = row["error"]["forward"], row["error"].get("gradients")
    bound = {"bfloat16": 0.05, "float32": 1e-4}[row["dtype"]]
    worst = max(forward, back or 0.0)
    given = f"{forward:.2g}, " + ("raises" if back is None else f"{back:.2g}")
    return f"**wrong: {given}**" if worst > bound else given


def sent(row: dict[str, Any]) -> str:
    """Forward, and with a backward; in brackets what the pattern needs under that layout."""
    if "sent" not in row:
        return "-"
    parts = []
    for way in ("forward", "both"):
        took, needs = row["sent"].get(way), row["counted"][way]
        parts.append("-" if took is None else f"{took / 1024:.1f} ({needs / 1024:.1f})")
    return ", ".join(parts)


def after(row: dict[str, Any]) -> str:
    """Seconds and types of errors of the survivors, alike ones together."""
    texts: dict[str, list[int]] = {}
    for each in row["survivors"]:
        late = each["seconds"] is None
        text = f"nothing within {CUT:.0f} s" if late else f"{each['error']} {each['seconds']:.2f} s"
        texts.setdefault(text, []).append(each["rank"])
    return "; ".join(f"rank {', '.join(map(str, who))}: {text}" for text, who in texts.items())


def summary(rows: list[dict[str, Any]], broken: list[dict[str, Any]]) -> list[str]:
    """A row for each peer: what holds, in bfloat16 over the most processes."""
    names = "peer", "exact", "wrong", "window's error", "here on CPUs", "backward"
    names += "KiB sent for a window, forward", "kill -9", "SIGSTOP"
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for peer in PEERS:
        own = {
            row["pattern"]: row
            for row in rows
            if (row["processes"], row["dtype"], row["peer"]) == (SIZES[-1], "bfloat16", peer.name)
        }
        ran = {name: cell(row) for name, row in own.items() if "error" in row}
        bad = [name for name, text in ran.items() if "wrong" in text]
        window = own["window"]
        took = f"{window['sent']['forward'] / 1024:.1f}" if "sent" in window else "-"
        error = f"{window['error']['forward']:.2g}" if "error" in window else "refused"
        back = any("gradients" in row.get("error", {}) for row in own.values())
        seen = {
            row["how"]: after(row)
            for row in broken
            if row["peer"] == peer.name and row["timeout"] is None and not row["survivors_exit"]
        }
        cpu = "yes" if peer.over == "its own" else "its exchange alone"
        cells = peer.name, ", ".join(n for n in ran if n not in bad) or "-", ", ".join(bad) or "-"
        cells += error, cpu if ran else "raises", "yes" if back else "raises" if ran else "-", took
        cells += seen.get("kill", "not tried"), seen.get("stop", "not tried")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def tables(rows: list[dict[str, Any]], broken: list[dict[str, Any]]) -> str:
    size, names = SIZES[-1], list(dict.fromkeys(row["pattern"] for row in rows))
    at = {(r["processes"], r["dtype"], r["peer"], r["pattern"]): r for r in rows}
    lines = summary(rows, broken)
    for title, show in (("errors", cell), ("KiB a rank sends", sent)):
        lines += [
            f"| {title} | computed by | {' | '.join(names)} |",
            "|---" * (2 + len(names)) + "|",
        ]
        for peer in PEERS:
            shown = [show(at[size, "bfloat16", peer.name, name]) for name in names]
            lines.append(f"| {peer.name} | {peer.over} | {' | '.join(shown)} |")
        lines.append("")
    lines += ["| fault of rank 1 | peer | the others see |", "|---|---|---|"]
    for row in broken:
        how = {"kill": "kill -9", "stop": "SIGSTOP"}[row["how"]]
        how += ", who sees it exits" if row["survivors_exit"] else ""
        how += "" if row["timeout"] is None else f", group's time-out {row['timeout']:.0f} s"
        lines.append(f"| {how} | {row['peer']} | {after(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    rows = [row for size in SIZES for row in exact(size)]
    broken = faults()
    write(
        RESULTS / "ring.json",
        {
            "shape": {**asdict(SHAPE), "window": WINDOW, "sinks": SINKS},
            "rows": rows,
            "faults": broken,
            "ring_flash_attn": version("ring-flash-attn"),
            "published": PUBLISHED,
        },
    )
    print(tables(rows, broken))
    for refusal in dict.fromkeys(
        f"{row['peer']}: {row[key]}"
        for row in rows
        for key in ("refused", "backward_refused", "lacks")
        if key in row
    ):
        print(refusal)
