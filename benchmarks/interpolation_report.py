"""The plot and the tables of benchmarks/interpolation.py."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = {
    None: "#000000",
    "linear": "#E69F00",
    "ntk": "#0072B2",
    "yarn": "#009E73",
    "dynamic": "#CC79A7",
    "window": "#D55E00",
    "sinks": "#009E73",
    "heavy": "#0072B2",
    "compressive": "#E69F00",
    "keep-all": "#CC79A7",
}
_NAMES = {None: "plain RoPE", "linear": "linear", "ntk": "NTK", "yarn": "YaRN"}
_MARKS = ("<!-- {}: written by benchmarks/interpolation.py --report -->", "<!-- end of {} -->")


def name(row: Row) -> str:
    """What a row's line is called."""
    rope = _NAMES.get(row["rope"], "dynamic NTK")
    if row["policy"] is not None:
        return row["policy"] if row["rope"] is None else f"{row['policy']}, {rope}, factor 2"
    if row["rope"] is None:
        return rope
    if row["fixed"] is None:
        return f"{rope}, factor length / 1,024"
    return f"{rope}, factor {row['fixed']:g}"


def lines(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of one text by line, ascending lengths."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    return {key: sorted(each, key=lambda row: row["length"]) for key, each in found.items()}


def draw(result: dict[str, Any]) -> bytes:
    """Perplexity against length: fresh forwards above, caches below, a column for each text."""
    from matplotlib.figure import Figure

    texts = list(dict.fromkeys(row["text"] for row in result["rows"]))
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, len(texts), sharex=True, sharey="row", squeeze=False)
    lengths = result["lengths"]
    for column, text in enumerate(texts):
        mine = [row for row in result["rows"] if row["text"] == text]
        for panel, cached in zip(axes[:, column], (False, True), strict=True):
            for label, rows in lines(mine).items():
                if (rows[0]["policy"] is not None) == cached or (cached and label == "plain RoPE"):
                    _line(panel, label, rows)
            best = next(
                r
                for r in mine
                if name(r) == "plain RoPE" and r["length"] == result["trained_length"]
            )
            panel.axhline(best["perplexity"], color="#999999", linewidth=0.8, zorder=0)
            panel.axvline(result["trained_length"], color="#999999", linewidth=0.8, zorder=0)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
            panel.set_yticks([2, 3, 5, 10, 20, 40], minor=False)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("")
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        axes[0][column].set_title(f"held-out {text}: full attention, a fresh forward")
        axes[1][column].set_title(f"held-out {text}: a stream through a cache")
        axes[1][column].set_xlabel("tokens of the input, the last of which are scored")
    for row in axes:
        row[0].set_ylabel("perplexity per token (log scale)")
        # Beside the panels, where it covers no line.
        row[-1].legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _line(panel: Any, label: str, rows: list[Row]) -> None:
    row = rows[0]
    if row["policy"] is None:
        colour = _COLOURS[row["rope"]]
    else:
        colour = next(c for key, c in _COLOURS.items() if key and row["policy"].startswith(key))
    errors = [(each["nll_standard_error"] or 0.0) * each["perplexity"] for each in rows]
    panel.errorbar(
        [each["length"] for each in rows],
        [each["perplexity"] for each in rows],
        errors,
        label=label,
        color=colour,
        linestyle="--" if row["fixed"] is not None and row["rope"] != "dynamic" else "-",
        marker="o",
        markersize=3,
        linewidth=1.4,
        capsize=2,
    )


def tables(result: dict[str, Any], document: str) -> str:
    """The document with its tables written anew, one for each text."""
    for text in dict.fromkeys(row["text"] for row in result["rows"]):
        start, end = (mark.format(text) for mark in _MARKS)
        before, _, rest = document.partition(start)
        _, _, after = rest.partition(end)
        rows = lines(row for row in result["rows"] if row["text"] == text)
        document = f"{before}{start}\n{_table(rows, result['lengths'])}\n{end}{after}"
    return document


def _table(rows: dict[str, list[Row]], lengths: Iterable[int]) -> str:
    out = [f"| | {' | '.join(f'{length:,}' for length in lengths)} |"]
    out.append("|---" * (len(out[0].split("|")) - 2) + "|")
    for label, each in rows.items():
        at = {row["length"]: _cell(row) for row in each}
        out.append(f"| {label} | {' | '.join(at.get(length, '') for length in lengths)} |")
    return "\n".join(out)


def _cell(row: Row) -> str:
    """Perplexity over plain RoPE's at the trained length, with the standard error of the ratio."""
    ratio, error = row["over_trained"], row["gap_standard_error"]
    if error is None or not row["gap"]:
        return f"{ratio:.3f}"
    digits = 3 if ratio < 10 else 1
    return f"{ratio:.{digits}f} ± {ratio * error:.{digits}f}"
