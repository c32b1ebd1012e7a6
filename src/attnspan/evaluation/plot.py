"""Perplexity and memory along the stream, a line for each policy and storage."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

FORMATS = ("png", "svg", "pdf")

# A colour for each policy, from Okabe and Ito's palette, which colour-blind readers can tell apart;
# a style for each storage, whose lines lie close to each other.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = {"dense": "-", "int8": "--", "int4": ":"}

_RUNS = 40
"""Points along the stream: each a mean over a fortieth of the tokens, for less is mere noise."""

_EXPLODED = 1.5
"""Lines that lie on average so far above the best are left out of the close view."""


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
    """A picture of what `compare` or `stream` gave, as a file of the format `kind`.

    Perplexity per token, on a log scale where some row explodes; where several rows went all the
    way, a close view of each over the best of them; and the cache's memory.
    """
    from matplotlib.figure import Figure  # without pyplot, which keeps figures in global state

    details = result["meta"]["details"]
    length = max(detail["series"]["tokens"][-1] for detail in details)
    lines = [_runs(detail["series"], length / _RUNS) for detail in details]
    whole = [i for i, detail in enumerate(details) if detail["series"]["tokens"][-1] == length]
    best = min(whole, key=lambda i: result["rows"][i]["nll"])
    close = [i for i in whole if _mean_ratio(lines[i], lines[best]) < _EXPLODED]
    panels = 3 if len(close) > 1 else 2
    figure = Figure(figsize=(9, 3.2 * panels), layout="constrained")
    axes = list(figure.subplots(panels, 1, sharex=True))
    policies = list(dict.fromkeys(detail["policy"] for detail in details))
    names = [f"{detail['policy']}, {detail['storage']}" for detail in details]
    for i, (detail, (tokens, perplexity)) in enumerate(zip(details, lines, strict=True)):
        look: dict[str, Any] = {
            "color": _COLOURS[policies.index(detail["policy"]) % len(_COLOURS)],
            "linestyle": _STYLES.get(detail["storage"], "-."),
            "linewidth": 1.4 if detail["storage"] == "dense" else 2.2,
        }
        stopped = i not in whole
        if stopped:
            look |= {"marker": "X", "markersize": 8, "markevery": [-1]}
        label = names[i] + (" (stopped)" if stopped else "")
        axes[0].plot(tokens, perplexity, label=label, **look)
        mib = [size / 2**20 for size in detail["series"]["cache_bytes"]]
        axes[-1].plot(detail["series"]["tokens"], mib, **look)
        if panels == 3 and i in close:
            over = [a / b for a, b in zip(perplexity, lines[best][1], strict=True)]
            axes[1].plot(tokens, over, **look)
    shown = [p for _, perplexity in lines for p in perplexity]
    axes[0].set_ylabel("perplexity per token")
    if max(shown) > 10 * min(shown):
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].set_ylabel("perplexity per token (log scale)")
    if panels == 3:
        axes[1].set_ylabel(f"perplexity over that of\n{names[best]}")
    axes[0].set_title(f"{result['meta']['model']['name']} on {result['meta']['text']}")
    axes[-1].set_ylabel("cache memory (MiB)")
    axes[-1].set_ylim(bottom=0)
    axes[-1].set_xlabel("tokens of the stream")
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.set_xlim(left=0)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # there it covers no line
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=150)
    return data.getvalue()


def _runs(series: dict[str, list[Any]], size: float) -> tuple[list[int], list[float]]:
    """Perplexity over runs of at least `size` tokens, and the token that each ends with."""
    ends: list[int] = []
    sums: list[tuple[int, float]] = []
    before, count, total = 0, 0, 0.0
    for tokens, nll in zip(series["tokens"], series["nll"], strict=True):
        count, total = count + tokens - before, total + nll * (tokens - before)
        before = tokens
        if count >= size:
            ends.append(tokens)
            sums.append((count, total))
            count, total = 0, 0.0
    if count and ends and count < size / 2:  # a short rest would be noise: it joins the last run
        ends[-1], sums[-1] = before, (sums[-1][0] + count, sums[-1][1] + total)
    elif count:
        ends.append(before)
        sums.append((count, total))
    return ends, [math.exp(min(total / count, 709.0)) for count, total in sums]


def _mean_ratio(line: tuple[list[int], list[float]], best: tuple[list[int], list[float]]) -> float:
    return sum(a / b for a, b in zip(line[1], best[1], strict=True)) / len(best[1])
