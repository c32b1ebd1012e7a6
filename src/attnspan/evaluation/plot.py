"""Perplexity and memory along the stream, a line for each policy and storage."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

FORMATS = ("png", "svg", "pdf")

# Okabe and Ito's palette, which colour-blind readers can tell apart; styles tell lines that lie
# on each other apart, and lines in print.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", ":")

_SMOOTHED = 40
"""Points along a line at most: a mean over a fortieth of the text, for one block is mere noise."""


def check_plot(path: str | Path) -> str:
    """The format that a path's ending names.

    Raises:
        ValueError: it names none of `FORMATS`.
        ImportError: matplotlib is not installed; the message names the extra.
    """
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ValueError(
            f"plot {str(path)!r}: a name that ends in .{', .'.join(FORMATS)} is allowed"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "a plot needs matplotlib: install the extra with `pip install 'attnspan[plot]'`"
        ) from None
    return kind


def plot(result: dict[str, Any], kind: str = "png") -> bytes:
    """A picture of what `compare` or `stream` gave, as a file of the format `kind`."""
    from matplotlib.figure import Figure  # without pyplot, which keeps figures in global state

    details = result["meta"]["details"]
    several = len({d["storage"] for d in details}) > 1
    figure = Figure(figsize=(9, 7.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    low, high = math.inf, 0.0
    for i, detail in enumerate(details):
        series = detail["series"]
        tokens, perplexity = _smooth(series["tokens"], series["nll"])
        low, high = min(low, *perplexity), max(high, *perplexity)
        look: dict[str, Any] = {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": _STYLES[i % len(_STYLES)],
            "linewidth": 1.8,
        }
        stopped = detail["series"]["tokens"][-1] < max(d["series"]["tokens"][-1] for d in details)
        name = detail["policy"] + (f", {detail['storage']}" if several else "")
        name += " (stopped)" if stopped else ""
        above.plot(tokens, perplexity, label=name, **look)
        mib = [size / 2**20 for size in series["cache_bytes"]]
        below.plot(series["tokens"], mib, **look)
        if stopped:
            end = {"marker": "X", "markersize": 8, "color": look["color"]}
            above.plot(tokens[-1:], perplexity[-1:], **end)
            below.plot(series["tokens"][-1:], mib[-1:], **end)
    if high > 4 * low:
        above.set_yscale("log")
        above.yaxis.set_major_formatter("{x:g}")
    unit = "perplexity per token"
    above.set_ylabel(f"{unit} (log scale)" if high > 4 * low else unit)
    above.set_title(f"{result['meta']['model']['name']} on {result['meta']['text']}")
    below.set_ylabel("cache memory (MiB)")
    below.set_ylim(bottom=0)
    below.set_xlabel("tokens of the stream")
    below.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    # Below the axes, where it covers no line.
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=150)
    return data.getvalue()


def _smooth(tokens: list[int], nlls: list[float]) -> tuple[list[int], list[float]]:
    """Perplexity over runs of points, at the token that each run ends with."""
    group = math.ceil(len(tokens) / _SMOOTHED)
    ends, perplexities = [], []
    for first in range(0, len(tokens), group):
        counts = [
            tokens[i] - (tokens[i - 1] if i else 0)
            for i in range(first, min(first + group, len(tokens)))
        ]
        weighed = math.fsum(n * c for n, c in zip(nlls[first : first + group], counts, strict=True))
        ends.append(tokens[min(first + group, len(tokens)) - 1])
        perplexities.append(math.exp(min(weighed / sum(counts), 709.0)))
    return ends, perplexities
