"""The planner's predictions beside published times, and where a ring's communication stops hiding.

Llama 3.1 405B on hosts of 8 H100 as in https://arxiv.org/abs/2411.01783 (abstract, section 4.2 and
table 7; 1M is 10**6 tokens there, by its appendix A, and 128K 128,000). Rates are the presets
`h100-500w` and `ib`: nothing is fitted to the times. Meta ran fp8 weights in the feed-forward
layers, so "fp8" is its set-up. Writes benchmarks/results/ring_planning.json.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from record import RESULTS, write

from attnspan.planner.links import LINKS, machine
from attnspan.planner.prefill import Simulation
from attnspan.planner.presets import model

# Tokens, GPUs, seconds.
PUBLISHED = (
    (10**6, 128, 77.0),
    (128_000, 8, 42.010),
    (128_000, 16, 21.042),
    (128_000, 32, 10.950),
    (128_000, 64, 5.85),
    (128_000, 128, 3.8),
)
EFFICIENCY = 0.93
KERNEL = 540e12  # one GPU's attention, of which that efficiency is a share
POWERS = [2**k for k in range(11)]


def simulation(context: int, weights: str) -> Simulation:
    rates = machine("ib", "h100-500w")
    return Simulation(model("llama-3.1-405b"), context, rates, tensor=8, weights=weights)


def efficiency(context: int, gpus: int, seconds: float) -> float:
    """As the paper's appendix A counts it: operations a second of a GPU, over its kernel's."""
    spec = model("llama-3.1-405b")
    width = spec.heads * spec.head_dim
    work = 2 * spec.parameters * context + 2 * context**2 * width * spec.layers
    return work / gpus / seconds / KERNEL


def beside() -> list[dict[str, Any]]:
    rows = []
    for context, gpus, seconds in PUBLISHED:
        row: dict[str, Any] = {"context": context, "gpus": gpus, "published": seconds}
        for weights in ("fp8", "bf16"):
            predicted = simulation(context, weights).prefill(gpus, "ring")
            row[weights] = asdict(predicted)
            row[f"error_{weights}"] = predicted.seconds / seconds - 1
            row[f"efficiency_{weights}"] = efficiency(context, gpus, predicted.seconds)
        rows.append(row)
    return rows


def scaling() -> list[dict[str, Any]]:
    return [asdict(simulation(10**6, "fp8").prefill(gpus, "ring")) for gpus in POWERS[3:8]]


def hiding() -> list[dict[str, Any]]:
    """The fewest of 1 to 1,024 devices whose ring no longer hides its communication, if any."""
    rows = []
    for name in ("mistral-7b", "llama-3.1-8b", "llama-3.1-70b"):
        for context in (2**17, 2**20):
            for link in LINKS:
                simulated = Simulation(model(name), context, machine(link))
                given = (simulated.prefill(n, "ring") for n in POWERS)
                first = next((row.devices for row in given if not row.hides), None)
                rows.append({"model": name, "context": context, "link": link, "from": first})
    return rows


if __name__ == "__main__":
    results = {
        "efficiency": EFFICIENCY,
        "beside": beside(),
        "scaling": scaling(),
        "hiding": hiding(),
    }
    write(RESULTS / "ring_planning.json", results)
    for row in results["beside"]:
        print(
            f"{row['context']:9,} tokens, {row['gpus']:3} GPUs: {row['published']:6.2f} s "
            + ", ".join(
                f"{w} {row[w]['seconds']:6.2f} ({row[f'error_{w}']:+.1%}, at "
                f"{row[f'efficiency_{w}']:.0%})"
                for w in ("fp8", "bf16")
            )
        )
    shown = "devices", "seconds", "attention", "linear", "tensor", "exposed"
    for row in results["scaling"]:
        print(", ".join(f"{key} {row[key]:.4g}" for key in shown))
    for row in results["hiding"]:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
