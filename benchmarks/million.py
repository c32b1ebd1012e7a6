"""A stream of 1,000,000 tokens: are memory and latency flat?

Streams the bundled model over Python's own source, again and again, under sinks + window; notes
cache bytes and process memory on the way; then takes 500 single steps from the state at token
10,000 and 500 from the state at the end, in turn, and compares the medians. Writes
benchmarks/results/million.json and million.png.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, write

from attnspan.evaluation.texts import python_heldout
from attnspan.models import Cache, attach
from attnspan.models.loading import load
from attnspan.policies import parse

EARLY = 10_000


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def step(model: Any, cache: Cache, ids: torch.Tensor) -> None:
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def run(tokens: int, spec: str, chunk: int, steps: int) -> dict[str, Any]:
    model = load("bundled")[0]
    text = torch.frombuffer(bytearray(python_heldout().encode()), dtype=torch.uint8).long()
    series: list[dict[str, float]] = []
    with attach(model):
        cache, early = Cache(model, parse(spec)), Cache(model, parse(spec))
        step(model, cache, torch.tensor([[model.config.bos_token_id]]))
        began, noted = time.perf_counter(), 0
        while cache.tokens_seen < tokens:
            start = (cache.tokens_seen - 1) % (len(text) - chunk)
            size = min(chunk, tokens - cache.tokens_seen)
            if cache.tokens_seen < EARLY:
                size = min(size, EARLY - cache.tokens_seen)
            step(model, cache, text[None, start : start + size])
            if cache.tokens_seen == EARLY:
                tensors, meta = cache.state(copy=False)
                early.load_state({name: x.clone() for name, x in tensors.items()}, meta)
            if cache.tokens_seen >= noted + tokens // 100:
                now = time.perf_counter()
                rate = (cache.tokens_seen - noted) / (now - began)
                began, noted = now, cache.tokens_seen
                series.append(
                    {
                        "tokens": noted,
                        "cache_bytes": cache.nbytes,
                        "process_bytes": resident(),
                        "tokens_per_second": round(rate, 1),
                    }
                )
                print(
                    f"{noted:>9,} tokens  cache {cache.nbytes:,} bytes  "
                    f"process {resident() / 2**20:.1f} MiB  {rate:,.0f} tokens/s",
                    flush=True,
                )
        latencies: dict[str, list[float]] = {"early": [], "late": []}
        for i in range(steps):
            for name, each in (("early", early), ("late", cache)):
                began = time.perf_counter()
                step(model, each, text[None, i : i + 1])
                latencies[name].append((time.perf_counter() - began) * 1e3)
    settled = [s for s in series if s["tokens"] >= min(50_000, tokens // 2)]
    medians = {name: statistics.median(ms) for name, ms in latencies.items()}
    growth = settled[-1]["process_bytes"] / settled[0]["process_bytes"] - 1
    return {
        "policy": spec,
        "tokens": tokens,
        "chunk": chunk,
        "cache_bytes": sorted({s["cache_bytes"] for s in settled}),
        "process_growth": round(growth, 4),
        "ms_per_token_early": round(medians["early"], 4),
        "ms_per_token_late": round(medians["late"], 4),
        "late_over_early": round(medians["late"] / medians["early"], 4),
        "series": series,
        "latencies_ms": {n: [round(x, 3) for x in ms] for n, ms in latencies.items()},
    }


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, latency) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    tokens = [s["tokens"] for s in result["series"]]
    for key, label, color in (
        ("process_bytes", "process", "#0072B2"),
        ("cache_bytes", "cache", "#D55E00"),
    ):
        memory.plot(tokens, [s[key] / 2**20 for s in result["series"]], color=color, label=label)
    memory.set(xlabel="tokens seen", ylabel="memory (MiB)", ylim=(0, None), title="Memory")
    memory.legend(frameon=False, loc="center right")
    memory.ticklabel_format(axis="x", style="plain")
    memory.set_xticks([0, 250_000, 500_000, 750_000, 1_000_000])
    for key, label, color in (
        ("early", f"from token {EARLY:,}", "#0072B2"),
        ("late", f"from token {result['tokens']:,}", "#D55E00"),
    ):
        ordered = sorted(result["latencies_ms"][key])
        share = [100 * (i + 1) / len(ordered) for i in range(len(ordered))]
        latency.plot(ordered, share, color=color, label=label)
    low, high = sorted(result["latencies_ms"]["early"])[0], result["ms_per_token_early"] * 2
    latency.set(xlim=(low * 0.9, high), ylim=(0, 100))
    latency.set(xlabel="time of one step (ms)", ylabel="steps that took at most that (%)")
    latency.set_title("Latency of 500 single steps, taken in turn")
    latency.legend(frameon=False, loc="lower right")
    for axes in (memory, latency):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--policy", default="sinks:4+window:508")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    result = run(given.tokens, given.policy, given.chunk, given.steps)
    for name in ("cache_bytes", "process_growth", "late_over_early"):
        print(f"{name}: {result[name]}")
    write(Path("million.json"), result)
    plot(result, RESULTS / "million.png")


if __name__ == "__main__":
    main()
