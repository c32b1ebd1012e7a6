"""What a run of benchmarks/gpu.py says: its goals, tables, plot, and rates for the package."""

from __future__ import annotations

import io
import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_cases import CASES, HEADS, KV_HEADS, OURS, SWEEP, W1, W4, Case, Goal, K, goals, length

from attnspan.patterns import SlidingWindow

# What the maker says: TFLOP/s of dense 16-bit products, and GB/s of the memory.
DATASHEET = {"H200": (989, 4800), "H100": (989, 3350)}
_MARKED = "<!-- {0}: written by benchmarks/gpu.py --docs -->\n{1}\n<!-- end -->"


_RATED = ("hopper", "triton", "fa4", "cudnn", "flash", "flex", "sdpa")


@dataclass
class Row:
    """One contender of a case; `work` is operations or bytes of one call."""

    case: str
    contender: str
    unit: str
    work: float
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    extra_mib: float | None = None  # backward's peak over what was held before it
    mhz: list[int] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rates(self) -> tuple[float, float, float]:
        """In its unit: by the median, the slowest and the fastest burst."""
        scale = self.work / (1e12 if self.unit == "TFLOP/s" else 1e9)
        return scale / self.median, scale / max(self.seconds), scale / min(self.seconds)


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    ours: Row | None
    theirs: Row | None

    @property
    def value(self) -> float | None:
        """What is held against `must` and `aim`; None where a figure is missing."""
        alone = self.goal.kind in ("rate", "us", "MiB")
        if self.ours is None or (self.theirs is None and not alone):
            return None
        match self.goal.kind, self.theirs:
            case "speed", Row() as theirs:
                return theirs.median / self.ours.median
            case "time", Row() as theirs:
                return self.ours.median / theirs.median
            case "both", Row() as theirs:
                return 1 + self.ours.median / theirs.median
            case "rate", _:
                return self.ours.rates[0]
            case "us", _:
                return self.ours.median * 1e6
            case _:
                return self.ours.extra_mib

    @property
    def level(self) -> str:
        value = self.value
        if value is None:
            return "no figure"
        more = self.goal.kind in ("speed", "rate")
        met = [value >= x if more else value <= x for x in (self.goal.aim, self.goal.must)]
        return "aim met" if met[0] else "met" if met[1] else "missed"

    def as_dict(self) -> dict[str, Any]:
        by = [None if row is None else row.contender for row in (self.ours, self.theirs)]
        more = {"by": by[0], "beside": by[1], "value": self.value, "verdict": self.level}
        return {**asdict(self.goal), **more}

    @property
    def faster(self) -> str:
        """Of a speed, who is the faster one, which is what `auto` takes where it is installed."""
        if self.goal.kind != "speed" or self.ours is None or self.theirs is None:
            return ""
        return min(self.ours, self.theirs, key=lambda row: row.median).contender


def judged(rows: list[Row]) -> list[Verdict]:
    done = {(row.case, row.contender): row for row in rows if row.seconds}

    def fastest(case: str, names: tuple[str, ...]) -> Row | None:
        found = [done[case, name] for name in names if (case, name) in done]
        return min(found, key=lambda row: row.median, default=None)

    return [
        Verdict(
            goal,
            fastest(goal.case, OURS if goal.ours is None else (goal.ours,)),
            fastest(goal.case, goal.theirs),
        )
        for goal in goals()
    ]


def table(rows: list[Row]) -> str:
    lines, case = [], None
    for row in rows:
        if row.case != case:
            case = row.case
            lines.append(f"{case} ({row.unit})")
        if not row.seconds:
            lines.append(f"    {row.contender:15} -- {row.failure}")
            continue
        rate, least, most = row.rates
        error = "" if row.error is None else f"  error {row.error:.1e}"
        memory = "" if row.extra_mib is None else f"  extra {row.extra_mib:.0f} MiB"
        gauge = f"  {statistics.median(row.mhz):.0f} MHz {max(row.watts):.0f} W"
        lines.append(
            f"    {row.contender:15} {rate:7.1f} [{least:.1f} to {most:.1f}]"
            f"  {row.median * 1e6:10.1f} us{error}{memory}{gauge if any(row.mhz) else ''}"
        )
    return "\n".join(lines)


def goals_table(verdicts: list[Verdict]) -> str:
    """For a terminal and for a document alike: Markdown, its columns in line."""
    head = ("goal", "ours", "", "error", "peer", "there", "value", "must", "aim", "", "faster")
    lines = [head, *(_cells(v) for v in verdicts)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    texts = [" | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in lines]
    texts.insert(1, "-|-".join("-" * w for w in widths))
    return "\n".join(f"| {text} |" for text in texts)


def _cells(v: Verdict) -> tuple[str, ...]:
    unit = {"us": "us", "time": "us", "MiB": "MiB"}.get(v.goal.kind)
    ours, theirs = (_figure(row, unit) for row in (v.ours, v.theirs))
    relation = {"speed": "{:.2f} x", "time": "{:.2f} of it", "both": "{:.2f} of it"}
    value = relation.get(v.goal.kind, "{:.4g}").format(v.value) if v.value is not None else ""
    error = "" if v.ours is None or v.ours.error is None else f"{v.ours.error:.1e}"
    by, beside = ("" if row is None else row.contender for row in (v.ours, v.theirs))
    must, aim = (f"{x:g}" for x in (v.goal.must, v.goal.aim))
    return v.goal.label, ours, by, error, beside, theirs, value, must, aim, v.level, v.faster


def _figure(row: Row | None, unit: str | None) -> str:
    """A median, its unit, and the least and the most of the bursts."""
    if row is None:
        return "no figure"
    if unit == "MiB":
        return "none" if row.extra_mib is None else f"{row.extra_mib:.0f} MiB"
    if unit == "us":
        us = [1e6 * x for x in (row.median, min(row.seconds), max(row.seconds))]
        return "{:.1f} us ({:.1f}..{:.1f})".format(*us)
    return "{:.0f} {} ({:.0f}..{:.0f})".format(row.rates[0], row.unit, *row.rates[1:])


def loaded(results: dict[str, Any]) -> list[Row]:
    return [Row(**row) for row in results["rows"]]


def dense_table(rows: list[Row]) -> str:
    """Cases outside of the goals that a reader asks about: dense causal attention."""
    lines = ["| case | " + " | ".join((*OURS, "fa4", "cudnn", "flash")) + " |", "|---" * 6 + "|"]
    done = {(row.case, row.contender): row for row in rows if row.seconds}
    for case in (*CASES, *SWEEP):
        if "cudnn" in case.contenders and case.pattern is not None:
            found = [done.get((case.name, name)) for name in (*OURS, "fa4", "cudnn", "flash")]
            figures = ["" if row is None else f"{row.rates[0]:.0f}" for row in found]
            lines.append(f"| {case.name} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


_FLOORS = (
    ("forward with LSE, SlidingWindow(4096), n=32K", ("hopper", "triton", "received")),
    ("forward with LSE, SlidingWindow(1024), n=32K", ("hopper", "triton")),
    ("forward with LSE, SlidingWindow(1024), n=32K, D=64", ("hopper", "triton")),
    ("backward, SlidingWindow(4096), n=32K", ("hopper", "triton")),
    ("backward, SlidingWindow(1024), n=32K", ("hopper", "triton")),
    ("backward, SlidingWindow(1024), n=32K, D=64", ("hopper", "triton")),
    ("decode, n=64K", ("ours", "ours, int8", "ours, int4", "ours, scores")),
)


def floors_table(rows: list[Row], device: str) -> str:
    """Operations and bytes of some kernels, what those take at the least, and what they took."""
    sheet = next((y for x, y in DATASHEET.items() if x in device), None)
    if sheet is None:
        return "No data sheet's figures are known for this device."
    cases = {case.name: case for case in (*CASES, *SWEEP)}
    done = {(row.case, row.contender): row for row in rows if row.seconds}
    lines = [
        "| kernel | case | operations, 1e12 | ms at {} TFLOP/s | bytes, 1e9 | ms at {} GB/s "
        "| measured, ms | share of the floor | rate to a product's |".format(*sheet),
        "|---" * 9 + "|",
    ]
    for name, contenders in _FLOORS:
        for row in (done[name, x] for x in contenders if (name, x) in done):
            operations, size = _two_numbers(cases[name], row)
            times = operations / sheet[0] / 1e12, size / sheet[1] / 1e9
            beside = done.get((name, "product"))
            share = "" if beside is None else f"{row.rates[0] / beside.rates[0]:.2f}"
            given = f"{operations / 1e12:.3g}", times[0] * 1e3, f"{size / 1e9:.3g}", times[1] * 1e3
            lines.append(
                "| {} | {} | {} | {:.3g} | {} | {:.3g} ".format(row.contender, name, *given)
                + f"| {row.median * 1e3:.3g} | {max(times) / row.median:.2f} | {share} |"
            )
    return "\n".join(lines)


def _two_numbers(case: Case, row: Row) -> tuple[float, float]:
    """Operations, and the bytes of all inputs and results, each moved once."""
    if case.what == "decode":
        # Int4's keys lie un-rotated: the angles, fp32 for each channel of a key, are read as well.
        angles = 4.0 * case.head_dim * case.batch * case.n if row.contender == "ours, int4" else 0.0
        return 4.0 * case.head_dim * HEADS * case.batch * case.n, row.work + angles
    queries, keys = ((case.batch * case.n * heads) for heads in (HEADS, KV_HEADS))
    vectors = {"forward": 2 * (queries + keys), "backward": 4 * (queries + keys)}[case.what]
    vectors = queries + keys if row.contender == "received" else vectors
    return row.work, 2.0 * case.head_dim * vectors + 4.0 * queries


_NAMES = {
    "fa4": "FlashAttention-4",
    "flex": "FlexAttention",
    "cudnn": "cuDNN",
    "ours": "bf16, no scores",
    "hopper": "forward alone",
}


def summary_table(verdicts: list[Verdict]) -> str:
    """Some goals, for a reader in a hurry."""
    lines = ["| | attnspan | beside | | must, aim |", "|---" * 5 + "|"]
    for v in (v for v in verdicts if v.goal.first):
        label, ours, _, _, beside, theirs, value, must, aim, level, _ = _cells(v)
        value = "" if v.goal.kind in ("rate", "us", "MiB") else value
        peer = f"{_NAMES[beside]} {theirs}" if beside else theirs
        lines.append(f"| {label} | {ours} | {peer} | {value} | {must}, {aim}: {level} |")
    return "\n".join(lines)


def caption(results: dict[str, Any]) -> str:
    meta, versions, run = results["meta"], results["versions"], results["run"]
    names = ("flash-attn-4", "nvidia-cutlass-dsl", "cudnn", "triton", "driver")
    with_them = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    bursts = (
        f"medians of {run['rounds']} bursts of {run['burst_seconds']:g} s, least and most beside."
    )
    return f"{meta['device']}, {meta['date']}, torch {meta['torch']}, {with_them}; {bursts}"


_SUMMARY = (
    "On one NVIDIA GPU, beside what else PyTorch users can install, all in one run (32 query and 8 "
    "KV heads of\n128, bf16; `benchmarks/gpu.py`; [all figures, and how the kernels work]"
    "(docs/kernels.md)):"
)


def fill(path: Path, results: dict[str, Any]) -> bytes:
    """A document with its marked tables written anew."""
    rows = loaded(results)
    text = path.read_text()
    tables = {
        "goals": f"{goals_table(judged(rows))}\n\n{caption(results)}",
        "dense": f"Dense causal attention, TFLOP/s:\n\n{dense_table(rows)}",
        "floors": floors_table(rows, results["meta"]["device"]),
        "summary": f"{_SUMMARY}\n\n{summary_table(judged(rows))}\n\n{caption(results)}",
    }
    for name, content in tables.items():
        whole = _MARKED.format(name, content)
        start = re.escape(whole.partition("\n")[0])
        text = re.sub(rf"{start}\n.*?<!-- end -->", lambda _, x=whole: x, text, flags=re.DOTALL)
    return text.encode()


def with_rates(known: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """`known`, rates by device for the choice of `auto`, with those of this run put in.

    Of the same versions, those of cases that this run lacks stay. Of a backward, `lse` is false:
    what it takes and gives is the same for all.
    """
    cases = {case.name: case for case in (*CASES, *SWEEP)}
    rates = [
        {
            "what": case.what,
            "head_dim": case.head_dim,
            "pattern": str(case.pattern),
            "n": case.n,
            "lse": case.lse,
            "impl": row.contender,
            "tflops": round(row.rates[0], 1),
        }
        for row in loaded(results)
        if row.seconds and row.contender in _RATED
        for case in (cases[row.case],)
        if case.pattern is not None
    ]
    meta = results["meta"]
    versions = {**results["versions"], "torch": meta["torch"]}
    before = known.get(meta["device"], {})
    if before.get("versions") == versions:
        fresh = {_case_of(row) for row in rates}
        rates += [row for row in before["rates"] if _case_of(row) not in fresh]
    entry = {
        "capability": results["capability"],
        "date": meta["date"],
        "versions": versions,
        "rates": rates,
    }
    return {**known, meta["device"]: entry}


def _case_of(rate: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(rate[x] for x in ("what", "head_dim", "pattern", "n", "lse"))


def rates_text(rates: dict[str, Any]) -> str:
    """JSON with one rate a line, so that changes can be read."""
    text = json.dumps(rates, indent=1)
    return re.sub(r"\{\n\s+\"what\"[^{}]*\}", lambda m: " ".join(m[0].split()), text) + "\n"


def plot(results: dict[str, Any]) -> bytes:
    """Rates against n and W, under the machine's ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [row for row in loaded(results) if row.seconds]
    rate = {(row.case, row.contender): row.rates[0] for row in done}
    figure, all_axes = pyplot.subplots(2, 3, figsize=(12.5, 7.4), layout="constrained")
    legend: dict[str, Any] = {}
    meta = results["meta"]
    sheet = next((y for x, y in DATASHEET.items() if x in meta["device"]), None)
    for axes, (label, cases, place, names) in zip(all_axes.flat, _panels(), strict=True):
        case = cases[0]
        ceiling_name = "copy" if case.what == "decode" else "product"
        for name in names:
            points = sorted((place(c), rate[c.name, name]) for c in cases if (c.name, name) in rate)
            if points:
                color, marker, said = _LOOKS[name]
                (legend[said],) = axes.plot(*zip(*points, strict=True), color=color, marker=marker)
        ceilings = [y for (_, name), y in rate.items() if name == ceiling_name]
        if ceilings:
            top = statistics.median(ceilings)
            legend[_CEILING] = axes.axhline(top, color="0.4", linestyle="--")
        if sheet:
            top = sheet[ceiling_name == "copy"]
            legend["data sheet"] = axes.axhline(top, color="0.4", linestyle=":")
        axes.set_xscale("log", base=2)
        ticks = sorted({place(c) for c in cases})
        axes.set_xticks(ticks, [length(t) for t in ticks])
        axes.set_xlabel(label)
        axes.set_ylim(0)
        axes.set_ylabel(f"{'stored bytes' if case.what == 'decode' else 'useful'}, {case.unit}")
        axes.set_title(case.what + (" with LSE" if case.lse else ""), fontsize=9)
        axes.grid(alpha=0.3)
    ordered = [*(k for _, _, k in _LOOKS.values() if k in legend), _CEILING, "data sheet"]
    ordered = [k for k in ordered if k in legend]
    figure.legend(
        [legend[k] for k in ordered], ordered, loc="outside lower center", ncols=6, fontsize=8
    )
    figure.suptitle(f"{meta['device']}, bf16, 32/8 heads of 128, {meta['date']}", fontsize=9)
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


_CEILING = "an 8192-cubed product, or a copy of 1 GiB, in the same run"
_LOOKS = {
    "hopper": ("C0", "o", "attnspan, hopper"),
    "triton": ("C1", "s", "attnspan, triton"),
    "ours": ("C0", "o", "attnspan, decode"),
    "ours, int8": ("C6", "P", "attnspan, decode int8"),
    "fa4": ("C2", "^", "FlashAttention-4"),
    "cudnn": ("C5", "X", "cuDNN"),
    "flex": ("C3", "D", "FlexAttention"),
    "flash": ("C4", "v", "flash of torch"),
}


def _panels() -> Iterator[tuple[str, list[Case], Callable[[Case], int], tuple[str, ...]]]:
    prefill = [c for c in (*CASES, *SWEEP) if c.pattern is not None and c.head_dim == 128]
    names = ("hopper", "triton", "fa4", "flex", "flash")

    def window(case: Case) -> int:
        assert isinstance(case.pattern, SlidingWindow)
        return case.pattern.window

    for what in ("forward", "backward"):
        some = [c for c in prefill if c.what == what and (c.lse or what == "backward")]
        if what == "forward":
            for pattern in (W4, W1):
                at = [c for c in some if c.pattern == pattern]
                yield f"tokens, W={pattern.window}", at, lambda c: c.n, names
        at = [c for c in some if c.n == 32 * K and isinstance(c.pattern, SlidingWindow)]
        yield "window W, n=32K", at, window, names
    at = [c for c in prefill if c.what == "backward" and c.pattern == W4]
    yield "tokens, W=4096", at, lambda c: c.n, names
    at = [c for c in (*CASES, *SWEEP) if c.what == "decode" and c.batch == 1]
    yield "keys", at, lambda c: c.n, ("ours", "ours, int8", "cudnn", "fa4")
