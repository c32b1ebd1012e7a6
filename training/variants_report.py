"""One file of all runs' figures, and the tables of docs/variants.md.

    python -m training.variants_report OUT... --json benchmarks/results/variants.json
    python -m training.variants_report --docs docs/variants.md

The first joins what `training.train_variants` wrote to the folders OUT; the second puts the tables
between the marks of a document.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from attnspan.evaluation.intervals import STUDENT
from attnspan.patterns.text import parse
from training.variants import variants

RESULTS = Path("benchmarks/results/variants.json")
TEXTS = ("python", "english")
COST = {
    "full": "n²/2",
    "window": "n W",
    "learned-sinks": "n W",
    "first-token": "n W",
    "hybrid": "n W, and n²/2 in 2 of 10",
    "strided": "n W + n²/(2 s)",
    "blockwise": "n b/2",
    "longformer": "n W + n G",
}

Runs = dict[str, dict[int, dict[str, Any]]]


def joined(folders: list[Path]) -> dict[str, Any]:
    """The runs of some folders; what all share stands once.

    Raises:
        ValueError: they were made by different recipes or versions.
    """
    shared = ("recipe", "device", "torch", "transformers")
    runs = [json.loads(path.read_text()) for f in folders for path in sorted(f.glob("*-*.json"))]
    heads = {json.dumps({name: run[name] for name in shared}, sort_keys=True) for run in runs}
    if len(heads) != 1:
        raise ValueError(f"the folders hold runs of {len(heads)} recipes; one is allowed")
    order = list(variants(runs[0]["recipe"]["length"]))
    runs.sort(key=lambda run: (order.index(run["variant"]), run["seed"]))
    rest = [{k: v for k, v in run.items() if k not in shared} for run in runs]
    return {**json.loads(heads.pop()), "runs": rest}


def by_variant(data: dict[str, Any]) -> Runs:
    found: Runs = {}
    for run in data["runs"]:
        found.setdefault(run["variant"], {})[run["seed"]] = run
    return found


def seed_noise(runs: Runs, text: str) -> tuple[float, int]:
    """The standard deviation between seeds, pooled over variants, and its degrees of freedom."""
    squares, free = 0.0, 0
    for seeds in runs.values():
        values = [run[text]["bits_per_byte"] for run in seeds.values()]
        mean = sum(values) / len(values)
        squares += sum((value - mean) ** 2 for value in values)
        free += len(values) - 1
    return math.sqrt(squares / free), free


def mean_bits(seeds: dict[int, dict[str, Any]], text: str) -> float:
    return sum(run[text]["bits_per_byte"] for run in seeds.values()) / len(seeds)


def difference(runs: Runs, one: str, other: str, text: str) -> tuple[float, float]:
    """Bits a byte of one variant less another's, and half of its 95 % interval.

    By the noise between seeds, the same for all variants; the rows of text are the same for all.
    """
    noise, free = seed_noise(runs, text)
    width = math.sqrt(1 / len(runs[one]) + 1 / len(runs[other])) * noise
    gap = mean_bits(runs[one], text) - mean_bits(runs[other], text)
    return gap, STUDENT[free - 1] * width


def keys_seen(patterns: list[str], length: int) -> float:
    """Keys a query sees, the mean over positions and layers."""
    place = torch.arange(length)
    counts = {p: int(parse(p).sees(place[:, None], place).sum()) for p in set(patterns)}
    return sum(counts[p] for p in patterns) / len(patterns) / length


def _task(run: dict[str, Any], name: str) -> dict[float, float]:
    rows = [row for row in run["tasks"] if row["task"] == name]
    return {next(iter(row["setting"].values())): row["value"] for row in rows}


def _mean_task(seeds: dict[int, dict[str, Any]], name: str) -> dict[float, float]:
    each = [_task(run, name) for run in seeds.values()]
    return {key: sum(one[key] for one in each) / len(each) for key in each[0]}


def quality(data: dict[str, Any]) -> str:
    """Cost and quality of each variant, as a Markdown table."""
    runs = by_variant(data)
    length = data["recipe"]["length"]
    lines = [
        "| layers see | pairs | keys a query sees | Python, bits a byte (seeds) | against full | "
        "English | against full |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seeds in runs.items():
        patterns = next(iter(seeds.values()))["patterns"]
        cells = [f"**{name}** {_shown(patterns)}", COST[name], f"{keys_seen(patterns, length):.0f}"]
        for text in TEXTS:
            values = ", ".join(f"{run[text]['bits_per_byte']:.4f}" for run in seeds.values())
            cells += [values, _against(runs, name, text)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(patterns: list[str]) -> str:
    kinds = list(dict.fromkeys(patterns))
    return ", ".join(f"`{kind}`".replace("|", "\\|") for kind in kinds)


def _against(runs: Runs, name: str, text: str) -> str:
    if name == "full":
        return ""
    gap, half = difference(runs, name, "full", text)
    whole = mean_bits(runs["full"], text)
    sure = "" if abs(gap) > half else ", not significant"
    return f"{gap / whole:+.1%} (± {half / whole:.1%}){sure}"


def distance(data: dict[str, Any]) -> str:
    """What each variant can look up, by distance, and how far it sees, as a Markdown table."""
    runs = by_variant(data)
    copies = list(_mean_task(runs["full"], "copy"))
    depths = list(_mean_task(runs["full"], "passkey"))
    needles = list(_mean_task(runs["full"], "needle"))
    lines = [
        "| variant | copy at "
        + ", ".join(f"{d:g}" for d in copies)
        + " | passkey at depth "
        + ", ".join(f"{d:g}" for d in depths)
        + " | needle at depth "
        + ", ".join(f"{d:g}" for d in needles)
        + " | bits in the last quarter, Python | 90 % of the gradients within | 99 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seeds in runs.items():
        copy, passkey = _mean_task(seeds, "copy"), _mean_task(seeds, "passkey")
        needle = _mean_task(seeds, "needle")
        reach = [run["reach"]["gradients"]["within"] for run in seeds.values()]
        last = sum(run["python"]["by_quarter"][-1] for run in seeds.values()) / len(seeds)
        cells = [
            name,
            ", ".join(f"{copy[d]:.2f}" for d in copies),
            ", ".join(f"{passkey[d]:.2f}" for d in depths),
            ", ".join(f"{needle[d]:.2f}" for d in needles),
            f"{last:.3f}",
            ", ".join(str(each["0.9"]) for each in reach),
            ", ".join(str(each["0.99"]) for each in reach),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def applied(data: dict[str, Any]) -> str:
    """Full models that are made to see less after training, as a Markdown table."""
    runs = by_variant(data)
    lines = [
        "| pattern | full model made to see it (seeds) | trained with it |",
        "|---|---|---|",
    ]
    full = runs["full"]
    whole = mean_bits(full, "python")
    for name in next(iter(full.values()))["applied"]:
        values = [run["applied"][name]["python"] for run in full.values()]
        each = ", ".join(f"{value:.3f}" for value in values)
        gap = sum(values) / len(values) / whole - 1
        trained = "not trained"
        if name in runs:
            own = mean_bits(runs[name], "python")
            trained = f"{own:.3f} ({own / whole - 1:+.0%})"
        lines.append(f"| {name} | {each} ({gap:+.0%}) | {trained} |")
    return "\n".join(lines)


def pairs(data: dict[str, Any]) -> str:
    """Variants beside the window, as a Markdown table."""
    runs = by_variant(data)
    lines = ["| against the window | Python | English |", "|---|---|---|"]
    for name in runs:
        if name in ("full", "window"):
            continue
        cells = []
        for text in TEXTS:
            gap, half = difference(runs, name, "window", text)
            sure = "" if abs(gap) > half else ", not significant"
            cells.append(f"{gap:+.4f} (± {half:.4f}){sure}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {"quality": quality, "distance": distance, "applied": applied, "pairs": pairs}


def filled(text: str, data: dict[str, Any]) -> str:
    """A document with the tables between its marks.

    Raises:
        ValueError: a mark is missing.
    """
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the document has no place for {name}: {begin.strip()} ... {end}")
        head, rest = text.split(begin)
        text = head + begin + table(data) + "\n" + end + rest.split(end)[1]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.variants_report", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path)
    given = parser.parse_args()
    if given.folders:
        try:
            text = json.dumps(joined(given.folders), indent=1)
        except ValueError as error:
            sys.exit(str(error))
        given.json.write_text(text + "\n")
    data = json.loads(given.json.read_text())
    if given.docs:
        given.docs.write_text(filled(given.docs.read_text(), data))
    else:
        print("\n\n".join(table(data) for table in TABLES.values()))


if __name__ == "__main__":
    main()
