"""The doctor's report as one picture, and the reach alone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from attnspan.evaluation.heads import SINK
from attnspan.evaluation.verdicts import TOLERANCE, named

# Of Okabe and Ito's palette, which colour-blind readers can tell apart, as in `evaluation.plot`.
_BLACK, _RED, _BLUE, _GREEN, _GREY = "#000000", "#D55E00", "#0072B2", "#009E73", "#999999"
_MARKS = ("o", "s", "^", "D", "v")


def plot(result: Mapping[str, Any], kind: str = "png") -> bytes:
    """Attention to token 0, perplexity against the window, reach, and the cost of each layer."""
    from matplotlib.figure import Figure  # without pyplot, which keeps figures in global state

    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2)
    _attention(figure, panels[0][0], result)
    _perplexity(panels[0][1], result["windows"])
    _reach(panels[1][0], result["reach"])
    _layers(panels[1][1], result)
    figure.suptitle(f"{result['meta']['model']['name']} on {result['meta']['text']}")
    return _bytes(figure, kind)


def plot_reach(found: Mapping[str, Any], kind: str = "png") -> bytes:
    """Influence against distance; `found` is `reach.Reach.as_dict()`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    _reach(figure.subplots(), found)
    return _bytes(figure, kind)


def _bytes(figure: Any, kind: str) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=150)
    return data.getvalue()


def _attention(figure: Any, axes: Any, result: Mapping[str, Any]) -> None:
    found = result["heads"]
    values = found["token0"]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    figure.colorbar(image, ax=axes, label="mean attention on token 0")
    layers, heads = len(values), len(values[0])
    if layers * heads <= 160:
        for layer, row in enumerate(values):
            for head, value in enumerate(row):
                colour = "white" if value < 0.6 else "black"
                axes.text(head, layer, f"{value:.2f}", ha="center", va="center", color=colour)
    kinds = (("retrieval_heads", "*", "retrieval head"), ("local_heads", "_", "local head"))
    for name, mark, label in kinds:
        if found[name]:
            # Above the number, so that neither hides the other.
            axes.scatter(
                [head for _, head in found[name]],
                [layer + 0.34 for layer, _ in found[name]],
                marker=mark,
                s=60,
                color=_RED if mark == "*" else "white",
                label=label,
            )
    if any(found[name] for name, _, _ in kinds):
        legend = axes.legend(loc="upper left", bbox_to_anchor=(0, -0.09), ncols=2, fontsize="small")
        legend.get_frame().set_facecolor(_GREY)
    axes.set_xlabel("head", loc="right")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, heads, max(1, heads // 16)))
    axes.set_yticks(range(0, layers, max(1, layers // 16)))
    axes.set_title(f"{found['sink_share']:.0%} of the heads above {SINK}")


def _perplexity(axes: Any, curve: Mapping[str, Any]) -> None:
    from matplotlib.ticker import NullFormatter

    for i, best in enumerate(curve["best"]):
        looks = (("window", _RED, "--", "window alone"), ("sinks", _BLUE, "-", None))
        for key, colour, style, label in looks:
            rows = [row for row in curve["rows"] if row[key] is not None]
            figures = [row[key]["texts"][i]["over_best"] for row in rows]
            if not figures:
                continue
            ratios = [min(each["ratio"], 1e6) for each in figures]
            around = [
                [max(0.0, r - each["low"]) for r, each in zip(ratios, figures, strict=True)],
                [
                    max(0.0, min(each["high"], 1e6) - r)
                    for r, each in zip(ratios, figures, strict=True)
                ],
            ]
            axes.errorbar(
                [row["tokens"] for row in rows],
                ratios,
                yerr=around,
                color=colour,
                linestyle=style,
                marker=_MARKS[i % len(_MARKS)],
                capsize=3,
                label=f"{label or str(curve['sinks']) + ' sinks + window'}, {best['text']}",
            )
    axes.axhline(1 + TOLERANCE, color=_BLACK, linestyle=":", label=f"+{TOLERANCE:.0%}")
    sizes = [row["tokens"] for row in curve["rows"]]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{each:,}" for each in sizes])
    axes.minorticks_off()
    tallest = max(
        min(text["over_best"]["ratio"], 1e6)
        for row in curve["rows"]
        for key in ("window", "sinks")
        if row[key] is not None
        for text in row[key]["texts"]
    )
    if tallest > 3:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if tallest < 10 else NullFormatter())
    axes.set_xlabel("tokens that the cache holds")
    reference = curve["reference"]
    best = f"in {curve['length']:,} tokens" if reference is None else f"of all, W={reference}"
    axes.set_ylabel(f"perplexity over the best {best}")
    axes.set_title(
        "a stream as its cache shrinks"
        + ("" if curve["judged"] else " (model no better than frequencies)")
    )
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.3)


def _reach(axes: Any, found: Mapping[str, Any]) -> None:
    looks = (("gradients", _BLUE, "-", "o"), ("changes", _RED, "--", "s"))
    for what, colour, style, mark in looks:
        curve = [each for each in found[what]["curve"] if each["mean"]]
        if not curve:
            continue
        top = curve[0]["mean"]
        axes.plot(
            [each["from"] + 1 for each in curve],
            [each["mean"] / top for each in curve],
            color=colour,
            linestyle=style,
            marker=mark,
            markersize=4,
            label=f"{what}, over that of the token itself",
        )
        for share, distance in found[what]["within"].items():
            axes.axvline(distance + 1, color=colour, linestyle=style, linewidth=0.8, alpha=0.6)
            height = 0.99 if what == "gradients" else 0.9
            axes.text(
                distance + 1,
                height,
                f"{float(share):.0%}",
                color=colour,
                fontsize="small",
                ha="right",
                va="top",
                rotation=90,
                transform=axes.get_xaxis_transform(),
            )
    if found["bound"] is not None and found["bound"] < 2 * found["length"]:
        axes.axvline(found["bound"] + 1, color=_BLACK, label=f"bound, {found['bound']:,}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    axes.set_xlabel("distance in tokens, plus 1")
    axes.set_ylabel("influence")
    axes.set_title("reach, and the distances that hold 50, 90, 99 %")
    axes.legend(fontsize="small", loc="lower left")
    axes.grid(alpha=0.3)


def _layers(axes: Any, result: Mapping[str, Any]) -> None:
    found = result["layers"]
    if found is None:
        axes.set_axis_off()
        reasons = [each for each in result["skipped"] if "layer" in each]
        words = "\n".join(reasons) or "layers were not tried one by one"
        axes.text(0.5, 0.5, words, ha="center", va="center", wrap=True)
        return
    texts = [each["text"] for each in result["windows"]["best"]]
    groups = found["groups"]
    wide = 0.8 / len(texts)
    full = set(found["full_layers"] or [])
    for i, text in enumerate(texts):
        figures = [pairs[i] for pairs in found["alone"]]
        cost = [100 * (min(each["ratio"], 1e6) - 1) for each in figures]
        around = [
            [100 * max(0.0, each["ratio"] - each["low"]) for each in figures],
            [100 * max(0.0, min(each["high"], 1e6) - each["ratio"]) for each in figures],
        ]
        axes.bar(
            [place + (i - (len(texts) - 1) / 2) * wide for place in range(len(groups))],
            cost,
            wide,
            yerr=around,
            color=(_BLUE, _GREEN, _RED)[i % 3],
            hatch=("", "//", "..")[i % 3],
            edgecolor="white",
            capsize=2,
            label=text,
        )
    names = [named(group).partition(" ")[2] for group in groups]
    marked = [
        f"{name}\nfull" if set(group) & full else name
        for name, group in zip(names, groups, strict=True)
    ]
    axes.set_xticks(range(len(groups)), marked)
    axes.axhline(0, color=_BLACK, linewidth=0.8)
    axes.set_xlabel("layer")
    axes.set_ylabel("perplexity lost, %")
    axes.set_title(f"each alone under {found['small']}")
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.3, axis="y")
