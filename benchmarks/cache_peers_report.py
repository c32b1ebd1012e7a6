"""The picture and the tables of benchmarks/cache_peers.py."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from attnspan.evaluation.tasks.intervals import Rate, clustered, mean

Row = dict[str, Any]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"attnspan": "#0072B2", "kvpress": "#D55E00", "transformers": "#009E73"}
MARKERS = {"whole": "s", "cut": "^", "bounded": "o"}
_MARKS = ("<!-- {}: written by benchmarks/cache_peers.py --report -->", "<!-- end of {} -->")
STREAM_BASE = "sinks:4+window:508"
"""What streams are held against: the whole cache fails beyond the trained length."""


def short(name: str) -> str:
    """A row's name with layers and heads that are alike counted.

    >>> short("layers(window:8; window:8; heads(window:8; keep-all))")
    'layers(2 x window:8; heads(window:8; keep-all))'
    """
    several = re.fullmatch(r"layers\((.*)\)(.*)", name)
    if not several:
        return name
    parts = re.split(r"; (?![^(]*\))", several[1])
    runs = [(part, len(list(group))) for part, group in itertools.groupby(parts)]
    inside = "; ".join(part if count == 1 else f"{count} x {part}" for part, count in runs)
    return f"layers({inside}){several[2]}"


def ratio(row: Row, base: Row) -> Rate:
    """Perplexity over the base's, passage by passage, two standard errors on either side."""
    gap = mean([a - b for a, b in zip(row["nll"], base["nll"], strict=True)])
    return Rate(*(math.exp(x) for x in (gap.value, gap.low, gap.high)))


def accuracy(row: Row, task: str) -> Rate:
    right = row[task]
    return clustered([sum(one) for one in right], [len(one) for one in right])


def perplexity(row: Row, texts: Sequence[str], text: str) -> float:
    own = [nll for nll, name in zip(row["nll"], texts, strict=True) if name == text]
    return math.exp(math.fsum(own) / len(own))


def _kib(size: float) -> str:
    return f"{size / 1024:,.0f}"


def _rate(rate: Rate, digits: int) -> str:
    low, high = f"{rate.low:.{digits}f}", f"{rate.high:.{digits}f}"
    if rate.value >= 100:
        return f"{rate.value:,.0f}"
    return f"{rate.value:.{digits}f} ({low}-{high})"


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def of(result: dict[str, Any], setting: str, budget: int | None = None) -> list[Row]:
    """Rows of a setting; without a budget, those that keep everything."""
    return [
        row
        for row in result["rows"]
        if row["setting"] == setting
        and (row["kind"] == "whole" if budget is None else row["budget"] == budget)
        and (budget is None or row["kind"] != "whole" or setting.startswith(("stream", "speed")))
    ]


def base(result: dict[str, Any], setting: str) -> Row:
    """The whole cache of transformers; of streams, sinks and a window."""
    wanted = STREAM_BASE if setting == "stream" else "DynamicCache"
    library = "attnspan" if setting == "stream" else "transformers"
    return next(
        row
        for row in result["rows"]
        if (row["library"], row["setting"], row["row"]) == (library, setting, wanted)
    )


def _order(row: Row) -> tuple[Any, ...]:
    return ("whole", "bounded", "cut").index(row["kind"]), row["library"]


def text_table(result: dict[str, Any], budget: int | None) -> str:
    against, lines = base(result, "text"), []
    for row in sorted(of(result, "text", budget), key=_order):
        start = [row["library"], f"`{short(row['row'])}`"]
        if "error" in row:
            lines.append([*start, row["error"], "", "", "", ""])
            continue
        size = row["bytes"]
        values = [f"{perplexity(row, result['texts'], t):.3f}" for t in ("Python", "English")]
        after, most = _kib(size["after_context"]), _kib(size["most"])
        lines.append([*start, _rate(ratio(row, against), 3), *values, after, most])
    names = ("over the whole cache", "Python", "English", "KiB after the prompt", "KiB at most")
    return _table(("library", "cache", *names), lines)


def tasks_table(result: dict[str, Any], budget: int | None) -> str:
    lines = []
    for row in sorted(of(result, "tasks", budget), key=_order):
        start = [row["library"], f"`{short(row['row'])}`"]
        if "error" in row:
            lines.append([*start, row["error"], "", "", ""])
            continue
        rates = [_rate(accuracy(row, task), 2) for task in ("passkey", "copy")]
        size = row["bytes"]
        lines.append([*start, *rates, _kib(size["after_context"]), _kib(size["most"])])
    names = ("passkey", "copy", "KiB after the prompt", "KiB at most")
    return _table(("library", "cache", *names), lines)


def stream_table(result: dict[str, Any]) -> str:
    against, lines = base(result, "stream"), []
    for row in sorted(of(result, "stream", against["budget"]), key=_order):
        start = [row["library"], f"`{short(row['row'])}`"]
        if "error" in row:
            lines.append([*start, row["error"], "", "", ""])
            continue
        texts = result["stream_texts"]
        values = [f"{perplexity(row, texts, t):.3f}" for t in ("Python", "English")]
        found = "1" if row is against else _rate(ratio(row, against), 3)
        lines.append([*start, found, *values, _kib(row["bytes"]["most"])])
    names = (f"over `{STREAM_BASE}`", "Python", "English", "KiB at most")
    return _table(("library", "cache", *names), lines)


def speed_table(result: dict[str, Any], setting: str) -> str:
    rows, lines = [row for row in result["rows"] if row["setting"] == setting], []
    for row in sorted(rows, key=_order):
        start = [row["library"], f"`{short(row['row'])}`"]
        if "error" in row:
            lines.append([*start, row["error"], "", "", "", ""])
            continue
        found = row["speed"]
        least, most = found["decode_wall_spread"]
        lines.append(
            [
                *start,
                f"{found['prompt_wall']:,.0f}",
                f"{found['prompt_processor']:,.0f}",
                f"{found['decode_wall']:,.0f} ({least:,.0f}-{most:,.0f})",
                f"{found['decode_processor']:,.0f}",
                f"{found['load']:.1f}",
            ]
        )
    if not lines:
        return "Not measured yet."
    names = ("prompt", "by processor time", "one at a time", "by processor time", "load")
    return _table(("library", "cache", *names), lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "text, everything kept": lambda r: text_table(r, None),
    "text, 128": lambda r: text_table(r, 128),
    "text, 256": lambda r: text_table(r, 256),
    "tasks, everything kept": lambda r: tasks_table(r, None),
    "tasks, 256": lambda r: tasks_table(r, 256),
    "tasks, 512": lambda r: tasks_table(r, 512),
    "stream": stream_table,
    "speed": lambda r: speed_table(r, "speed"),
    "speed, long": lambda r: speed_table(r, "speed, long"),
}


def tables(result: dict[str, Any], document: str) -> str:
    """The document with its tables written anew.

    Raises:
        ValueError: it has no place for one.
    """
    for name, written in TABLES.items():
        start, end = (mark.format(name) for mark in _MARKS)
        before, found, rest = document.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the document has no place for the table {name!r}")
        document = f"{before}{start}\n{written(result)}\n{end}{after}"
    return document


def draw(result: dict[str, Any]) -> bytes:
    """Quality against the most bytes held: perplexity, copy and passkey."""
    from matplotlib.figure import Figure

    against = base(result, "text")
    panels: tuple[tuple[str, str, Callable[[Row], Rate], bool], ...] = (
        (
            "text",
            "perplexity lost, % (0.1 and less at 0.1)",
            lambda row: _lost(row, against),
            False,
        ),
        ("tasks", "copy: share of right tokens", lambda row: accuracy(row, "copy"), True),
        ("tasks", "passkey: share of right answers", lambda row: accuracy(row, "passkey"), True),
    )
    figure = Figure(figsize=(17, 5), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (setting, title, measured, more) in zip(axes, panels, strict=True):
        rows = [r for r in result["rows"] if r["setting"] == setting and "error" not in r]
        for row in rows:
            rate, size = measured(row), row["bytes"]["most"] / 1024
            axis.errorbar(
                size,
                rate.value,
                [[rate.value - rate.low], [rate.high - rate.value]],
                color=COLOURS[row["library"]],
                marker=MARKERS[row["kind"]],
                markersize=5,
                linewidth=0.7,
                alpha=0.8,
            )
        for row in front(rows, measured, more):
            place = row["bytes"]["most"] / 1024, measured(row).value
            name = short(row["row"])
            name = name if len(name) < 45 else f"{name[:42]}..."
            axis.annotate(name, place, (5, -9), textcoords="offset points", fontsize=6)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_title(title)
        axis.set_xlabel("KiB held at most, one row")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    _legend(axes[-1])
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _lost(row: Row, against: Row) -> Rate:
    found = ratio(row, against)
    return Rate(*(max(0.1, 100 * (x - 1)) for x in (found.value, found.low, found.high)))


def front(rows: Sequence[Row], measured: Callable[[Row], Rate], more: bool) -> list[Row]:
    """The rows that no other one beats with as few bytes."""
    sign = -1 if more else 1
    best, found = math.inf, []
    for row in sorted(rows, key=lambda r: (r["bytes"]["most"], sign * measured(r).value)):
        if sign * measured(row).value < best:
            best = sign * measured(row).value
            found.append(row)
    return found


def _legend(axis: Any) -> None:
    from matplotlib.lines import Line2D

    kinds = {"whole": "keeps all", "cut": "cut once, then grows", "bounded": "bounded"}
    lines = [Line2D([], [], color=c, marker="o", linestyle="", label=n) for n, c in COLOURS.items()]
    lines += [
        Line2D([], [], color="#555555", marker=MARKERS[kind], linestyle="", label=label)
        for kind, label in kinds.items()
    ]
    # Beside the panel, where it covers no point.
    axis.legend(
        handles=lines, fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
    )
