"""Writes what the explorer shows of measured reach into the package.

    python web/measured.py

It takes it from benchmarks/results/doctor_*.json, which `attnspan doctor` wrote (docs/doctor.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OUT = ROOT / "src" / "attnspan" / "explorer" / "measured.json"
# What each model is, and the window it was trained under.
MODELS = {
    "windowed": ("four layers, trained under a window of 32 that its config declares", 32),
    "undeclared": ("the same weights under a config without a window", 32),
    "bundled": ("the bundled byte-level model: ten full layers", None),
    "random": ("four full layers, never trained", None),
}


def measured() -> dict[str, Any]:
    """Fit for JSON."""
    return {"reach": [_reach(name, *about) for name, about in MODELS.items()]}


def _reach(name: str, says: str, trained: int | None) -> dict[str, Any]:
    path = RESULTS / f"doctor_{name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    reach = found["reach"]
    return {
        "name": name,
        "says": says,
        "windows": found["config"]["windows"],
        "trained_window": trained,
        "bound": reach["bound"],
        "length": reach["length"],
        "date": found["meta"]["date"],
        "source": str(path.relative_to(ROOT)),
        **{kind: _measure(reach[kind]) for kind in ("gradients", "changes")},
    }


def _measure(kind: dict[str, Any]) -> dict[str, Any]:
    kept = ("within", "first_tokens", "beyond_bound", "beyond_bound_pairs")
    return {key: kind[key] for key in kept} | {
        "curve": [{key: each[key] for key in ("from", "to", "mean")} for each in kind["curve"]]
    }


if __name__ == "__main__":
    OUT.write_text(json.dumps(measured(), indent=1) + "\n", encoding="utf-8")
