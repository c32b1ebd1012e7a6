"""Attention on a CPU: patterns, implementations and peers in one run, and cost against length.

Writes benchmarks/results/cpu.json and cpu.png.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from record import RESULTS, write

from attnspan import bench
from attnspan.evaluation.files import write_file

LENGTHS = tuple(1024 * 2**i for i in range(8))


def ratios(rows: list[bench.Row], decoded: list[bench.Row]) -> dict[str, float]:
    """The figures that the README names, each from one run."""
    rate = {(r.what, r.pattern, r.impl, r.dtype): r.rate for r in rows}
    found = {}
    for window in ("SlidingWindow(512)", "SlidingWindow(1024)"):
        for impl in ("native", "cpu"):
            for what in ("forward", "backward"):
                base = rate[what, "Causal()", bench.DENSE, "float32"]
                name = f"{impl} {what} {window}"
                found[f"{name}, of dense causal SDPA"] = rate[what, window, impl, "float32"] / base
        ours = rate["forward", window, "native", "float32"]
        found[f"native forward {window}, of FlexAttention"] = (
            ours / rate["forward", window, "flex", "float32"]
        )
        for impl in ("native", "cpu"):
            found[f"{impl} forward {window}, bfloat16 of float32"] = (
                rate["forward", window, impl, "bfloat16"] / rate["forward", window, impl, "float32"]
            )
    seconds = {r.impl: r.seconds for r in decoded}
    found["native decode, of a plain read"] = seconds["read"] / seconds["native, float32"]
    found["native decode, of SDPA"] = seconds["sdpa"] / seconds["native, float32"]
    found["cpu decode, of SDPA"] = seconds["sdpa"] / seconds["cpu"]
    found["int8 decode, of float32"] = seconds["native, float32"] / seconds["native, int8"]
    return found


def plot(rows: list[bench.Row], device: str) -> bytes:
    figure, axes = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
    patterns = list(dict.fromkeys(row.pattern for row in rows))
    for pattern, marker in zip(patterns, "os^Dv*x", strict=True):
        line = [row for row in rows if row.pattern == pattern]
        x, y = [row.n for row in line], [row.seconds * 1e3 for row in line]
        axes.plot(x, y, marker=marker, label=pattern)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds, forward")
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [f"{n // 1024}K" for n in LENGTHS])
    axes.set_title(f"8 query heads, 2 KV heads of 64, fp32, {device}", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=16_384, help="tokens of the comparison")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    rows = bench.prefill(options.n, runs=options.runs)
    print(bench.table(rows), flush=True)
    decoded = bench.decode(runs=2 * options.runs)
    print(bench.table(decoded), flush=True)
    scaled = bench.scaling(LENGTHS)
    print(bench.table(scaled), flush=True)
    found: dict[str, Any] = ratios(rows, decoded)
    for impl in ("native", "cpu"):
        for dtype in (torch.float32, torch.bfloat16):
            for pattern in (bench.PATTERNS[1], bench.PATTERNS[3]):
                name = f"{impl} extra memory at {LENGTHS[-1]}, {pattern}, {dtype}, of the output's"
                found[name] = bench.extra_memory(LENGTHS[-1], impl, pattern, dtype)
    for name, value in found.items():
        print(f"{value:6.2f}  {name}")
    machine = bench.machine()
    results = {
        "machine": machine,
        "ratios": found,
        "prefill": bench.as_json(rows),
        "decode": bench.as_json(decoded),
        "scaling": bench.as_json(scaled),
    }
    write(Path("cpu.json"), results)
    write_file(RESULTS / "cpu.png", plot(scaled, machine["device"]))


if __name__ == "__main__":
    main()
