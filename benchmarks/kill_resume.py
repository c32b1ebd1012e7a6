"""kill -9 at random moments of a saved stream, and a resume that must end bit for bit alike.

Streams once without a stop, then again and again with a kill at a random moment and a resume from
what was saved; rows and last snapshots are compared to the byte. Writes
benchmarks/results/kill_resume.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import write

from attnspan.evaluation.texts import python_heldout


def command(folder: Path, policy: str, storage: str, limit: int, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "attnspan", "stream", "--model", "bundled"),
        *("--text", str(folder / "text.py"), "--policy", policy, "--storage", storage),
        *("--limit", str(limit), "--save-every", "512", "--generate", "32", *more),
    ]


def outcome(folder: Path, save: Path) -> tuple[dict[str, Any], str]:
    """The row, speed left out, and a digest of the last snapshot's tensors."""
    made = json.loads((folder / "out.json").read_text())
    row = {k: v for k, v in made["rows"][0].items() if k != "tokens_per_second"}
    row["continuation"] = made["meta"]["details"][0].get("continuation")
    tensors = next(save.glob("*.safetensors")).read_bytes()
    return row, hashlib.sha256(tensors).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--limit", type=int, default=20_000)
    given = parser.parse_args()
    dice = random.Random(0)
    cases = [("sinks:4+window:508", "dense"), ("heavy:128+window:128", "int8")]
    cases += [("compressive:window=128,memory=64,rate=4,pooling=most-used", "int4")]
    records = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.py").write_text(python_heldout())
        expected, seconds = {}, {}
        for case in cases:
            save = folder / "whole"
            began = time.perf_counter()
            line = command(folder, *case, given.limit, "--save", str(save))
            subprocess.run([*line, "--json", str(folder / "out.json")], check=True)
            seconds[case] = time.perf_counter() - began
            expected[case] = outcome(folder, save)
            for file in save.iterdir():
                file.unlink()
        for kill in range(given.kills):
            case = cases[kill % len(cases)]
            save = folder / f"save{kill}"
            moment = dice.uniform(0.2, 0.98) * seconds[case]
            line = command(folder, *case, given.limit, "--save", str(save))
            process = subprocess.Popen([*line, "--json", str(folder / "out.json")])
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kept = (save / "snapshot.json").exists()
            more = ("--resume", str(save)) if kept else ()
            subprocess.run([*line, *more, "--json", str(folder / "out.json")], check=True)
            same = outcome(folder, save) == expected[case]
            records.append(
                {"case": case, "seconds": round(moment, 2), "snapshot": kept, "same": same}
            )
            print(
                f"kill {kill + 1}: {case} after {moment:.1f} s, resumed alike: {same}", flush=True
            )
    print(f"{sum(r['same'] for r in records)} of {len(records)} ended bit for bit alike")
    write(Path("kill_resume.json"), {"limit": given.limit, "kills": records})
    sys.exit(not all(r["same"] for r in records))


if __name__ == "__main__":
    main()
