"""The explorer's figures as files for papers, by matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attnspan.explorer.figures import Matrix, Measured, Memory, Reach, Ring, Stack
from attnspan.explorer.kept import Kept
from attnspan.planner.quantities import scaled, short, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

WIDTH = 7.0
"""Inches: a page's two columns. 3.4 is one column."""

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"
_WAYS = (VERMILION, BLUE, GREEN)
_STYLES = ("-", "--", "-.")
_HATCHES = ("", "///", "...")
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "attnspan",  # so that the same figure is the same file
    "pdf.fonttype": 42,  # publishers refuse outlines of type 3
}
_DATED = {"svg": {"Date": None}, "png": {"Software": None}, "pdf": {"CreationDate": None}}


@contextmanager
def _styled() -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield


def save(figure: Figure, kind: str) -> bytes:
    """The figure as a file of the format `kind`: "svg", "png" or "pdf"."""
    data = io.BytesIO()
    with _styled():
        figure.savefig(data, format=kind, dpi=200, metadata=_DATED[kind])
    return data.getvalue()


def draw(found: Memory | Matrix | Kept | Reach | Ring | Stack, *, width: float = WIDTH) -> Figure:
    """The figure of what `attnspan.explorer.figures` gave, `width` inches wide."""
    with _styled():
        match found:
            case Memory():
                return _memory(found, width)
            case Matrix():
                return _matrix(found, width)
            case Kept():
                return _kept(found, width)
            case Reach():
                return _reach(found, width)
            case Ring():
                return _ring(found, width)
            case Stack():
                return _stack(found, width)


def _figure(width: float, height: float, panels: int) -> tuple[Figure, list[Axes]]:
    """Panels beside each other on a page, below each other in a column."""
    from matplotlib.figure import Figure  # without pyplot, which keeps figures in global state

    beside = width >= 5
    rows, columns = (1, panels) if beside else (panels, 1)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _memory(found: Memory, width: float) -> Figure:
    """Three panels: cache in GiB, prefill in seconds, a decoded token in milliseconds."""
    figure, axes = _figure(width, 2.6, 3)
    gib, log = 2**30, _is_log(found.lines[0].contexts)
    panels: tuple[tuple[str, Callable[[Any], Sequence[float]]], ...] = (
        ("KV cache (GiB)", lambda line: [each / gib for each in line.cache]),
        ("prefill (s)", lambda line: line.prefill),
        ("a decoded token (ms)", lambda line: [each * 1e3 for each in line.decode]),
    )
    for panel, (label, values) in zip(axes, panels, strict=True):
        for line, colour, style in zip(found.lines, _WAYS, _STYLES, strict=False):
            panel.plot(line.contexts, values(line), style, color=colour, label=line.name)
        panel.set_ylabel(label)
        panel.set_xlabel("context (tokens)")
        if log:
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter(lambda n, _: _tokens(n))
        else:
            panel.set_xlim(left=0)
            _count_tokens(panel.xaxis, found.lines[0].contexts[-1])
        if log and panel is not axes[2]:  # a token's time grows by less than a power of ten
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
    most = max(found.lines[0].cache) / gib
    if found.room is not None and 0 < found.room / gib < 2 * most:
        axes[0].axhline(found.room / gib, color=GREY, linestyle=":", linewidth=1)
        axes[0].annotate(
            f"what weights leave of the {found.device}",
            (found.lines[0].contexts[0], found.room / gib),
            (2, 2),
            textcoords="offset points",
            color="#555555",
            fontsize=6,
        )
    batch = f", batch {found.batch}" if found.batch > 1 else ""
    figure.suptitle(f"{found.model}, {found.storage} cache, {found.device}{batch}", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _is_log(contexts: Sequence[int]) -> bool:
    """Even steps are for a linear axis."""
    first, second, *_, last = (*contexts, contexts[-1])
    return last - second > 0 and abs((last - first) / (second - first) + 1 - len(contexts)) > 1


def _matrix(found: Matrix, width: float) -> Figure:
    n = len(found.seen)
    title = f"{_wrapped(found.pattern, width)}\n{found.pairs:,} of {n * n:,} pairs"
    return _cells(found.seen, width, title, "key", "query")


def _kept(found: Kept, width: float) -> Figure:
    title = _wrapped(found.policy, width) + f"\nat most {max(found.slots):,} slots"
    if found.scored:
        title += ", attention made up"
    return _cells(found.held, width, title, "token", "newest token")


def _cells(cells: NDArray[Any], width: float, title: str, across: str, down: str) -> Figure:
    """Each run of cells in a row is a bar, so that the figure stays sharp and small.

    A row's own token is set apart, and so are cells of 2, tokens of pooled slots.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    n = len(cells)
    bars, colours = [], []
    for i, row in enumerate(cells):
        for start, stop, kind in _runs(row, i):
            bars.append([(start, i), (stop, i), (stop, i + 1), (start, i + 1)])
            colours.append((VERMILION, BLUE, GREEN)[kind])
    figure = Figure(figsize=(width, width * 1.02 + 0.25), layout="constrained")
    panel = figure.subplots()
    edge = min(0.8, 0.2 * 72 * width / n)
    drawn = PolyCollection(
        bars, facecolors=colours, edgecolors="white" if n <= 128 else "face", linewidths=edge
    )
    drawn.set_gid("cells")
    panel.add_collection(drawn)
    if n <= 128:
        panel.vlines(range(n + 1), 0, n, color="white", linewidth=edge)
    panel.set_xlim(0, n)
    panel.set_ylim(n, 0)
    panel.set_aspect("equal")
    panel.grid(False)
    for side in ("top", "right"):
        panel.spines[side].set_visible(True)
    panel.set_xlabel(across)
    panel.set_ylabel(down)
    ticks = sorted({0, n // 4, n // 2, 3 * n // 4, n - 1})
    panel.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    panel.set_yticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    panel.set_title(title)
    return figure


def _runs(row: Any, i: int) -> Iterator[tuple[int, int, int]]:
    """Runs of equal cells that aren't 0, and which: 0 for the row's own token."""
    from itertools import groupby

    kinds = [int(kind) for kind in row]
    if kinds[i]:
        kinds[i] = -1
    start = 0
    for kind, run in groupby(kinds):
        stop = start + len(list(run))
        if kind:
            yield start, stop, max(0, kind)
        start = stop


def _reach(found: Reach, width: float) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(width, 2.8, 1 if found.measured is None else 2)
    known = [each for each in found.bounds if each is not None]
    layers = range(1, len(found.bounds) + 1)
    panel = axes[0]
    if known:
        panel.plot(layers[: len(known)], known, "o-", color=BLUE, markersize=3, label="bound")
        panel.annotate(
            f"{known[-1]:,} tokens",
            (len(known), known[-1]),
            (5, 0) if len(known) < len(layers) else (-6, 0),
            textcoords="offset points",
            ha="left" if len(known) < len(layers) else "right",
            va="center",
        )
        _count_tokens(panel.yaxis, known[-1])
    if len(known) < len(layers):
        panel.axvspan(len(known) + 0.5, len(layers) + 0.5, color=VERMILION, alpha=0.15, linewidth=0)
        panel.text(
            (len(known) + len(layers) + 1) / 2,
            0.5,
            "no bound: a layer\nsees all tokens",
            transform=panel.get_xaxis_transform(),
            ha="center",
            va="center",
        )
    panel.set_xlim(0.5, len(layers) + 0.5)
    panel.set_ylim(0, 1.1 * max(known, default=1) or 1)
    panel.set_xlabel("layers")
    panel.set_ylabel("reach at most (tokens)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_title(f"{found.model}: {_windows(found.windows)}")
    if found.measured is not None:
        _measured(axes[1], found.measured)
    return figure


def _windows(windows: Sequence[int | None]) -> str:
    slides = sorted({each for each in windows if each is not None})
    names = [f"windows of {' and '.join(f'{each:,}' for each in slides)}"] if slides else []
    full = sum(each is None for each in windows)
    return ", ".join([*names, *([f"{full} full layers"] if full else [])])


def _measured(panel: Axes, found: Measured) -> None:
    """Mean influence against distance; where half, nine tenths and 99 % of it lie."""
    for (kind, (distances, means)), colour, style in zip(
        found.curves.items(), (GREEN, PURPLE), ("-", "--"), strict=True
    ):
        half, most, nearly = found.within[kind]
        within = f"{kind}: 50 / 90 / 99 % within {half:,} / {most:,} / {nearly:,}"
        seen = [(d + 1, mean) for d, mean in zip(distances, means, strict=True) if mean > 0]
        panel.plot(*zip(*seen, strict=True), style, color=colour, label=within)
    if found.bound is not None:
        panel.axvline(found.bound + 1, color=BLUE, linewidth=1, label=f"bound: {found.bound:,}")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter(lambda n, _: _tokens(n))
    panel.set_xlabel("distance + 1 (tokens)")
    panel.set_ylabel("mean influence (as measured)")
    panel.set_title(f"{found.model}, measured over {found.length:,} tokens")
    panel.legend(loc="lower left", fontsize=6)


def _ring(found: Ring, width: float) -> Figure:
    """Pairs and keys of each rank; pairs and keys of each round; a colour for each layout."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(width, 2.7, 4 if width < 5 else 2)
    if width >= 5:
        figure.clear()
        figure.set_size_inches(width, 5.0)
        axes = list(figure.subplots(2, 2).flat)
    count = len(found.layouts)
    for k, layout in enumerate(found.layouts):
        work = layout.work
        mean = work.total / work.size
        rounds = work.rounds
        series = (
            [float(share / mean) if mean else 0.0 for share in work.pairs.sum(1)],
            work.received.tolist(),
            [each.pairs for each in rounds],
            [each.received for each in rounds],
        )
        for panel, values in zip(axes, series, strict=True):
            places = [x + (k - (count - 1) / 2) * 0.8 / count for x in range(len(values))]
            bars = panel.bar(
                places,
                values,
                0.8 / count,
                color=_WAYS[k % 3],
                hatch=_HATCHES[k % 3],
                edgecolor="white",
                linewidth=0,
            )
            bars.set_label(
                f"{layout.name}: {short(layout.cost.seconds)} a layer, "
                f"{short(layout.cost.exposed) if layout.cost.exposed else 'no'} exchange exposed"
            )
    for panel, across, up in zip(
        axes,
        ("rank", "rank", "round", "round"),
        (
            "pairs computed, of the mean",
            "keys received (tokens)",
            "most pairs of a rank",
            "most keys received (tokens)",
        ),
        strict=True,
    ):
        panel.set_xlabel(across)
        panel.set_ylabel(up)
        panel.grid(axis="x", visible=False)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel, most in (
        (axes[1], max(int(each.work.received.max()) for each in found.layouts)),
        (axes[3], max(each.received for layout in found.layouts for each in layout.work.rounds)),
    ):
        _count_tokens(panel.yaxis, most)
    axes[2].yaxis.set_major_formatter(lambda n, _: scaled(n) if n else "0")
    figure.suptitle(
        _wrapped(
            f"{found.pattern}, {found.context:,} tokens on {found.devices} {found.device} over "
            f"{found.link}, {found.model}'s heads",
            width,
        ),
        fontsize=9,
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1)
    return figure


def _stack(found: Stack, width: float) -> Figure:
    """A bar for what is left after each step, and hatched what the step took off."""
    from matplotlib.figure import Figure

    first = found.cache[0].before if found.cache else found.held
    names = ["keys and values of all query heads, tokens and layers"]
    left, taken, ratios = [first], [0], [1.0]
    for each in found.cache:
        names.append(each.name)
        left.append(each.after)
        taken.append(max(0, each.before - each.after))
        ratios.append(each.ratio)
    row = 0.42 if width >= 5 else 0.6
    figure = Figure(figsize=(width, 0.9 + row * (len(names) + 3)), layout="constrained")
    cache, working = figure.subplots(2, 1, height_ratios=[len(names), 2])
    _waterfall(cache, names, left, taken, ratios, width)
    cache.set_xlabel("KV cache")
    figure.suptitle(
        f"{found.model}, {found.context:,} tokens: {_times(found.product)} times less cache",
        fontsize=8,
    )
    flash = found.working
    _waterfall(
        working,
        ["standard attention", "flash attention"],
        [flash.before, flash.after],
        [0, max(0, flash.before - flash.after)],
        [1.0, flash.ratio],
        width,
    )
    working.set_xlabel(
        _wrapped("attention's working memory, which is not multiplied with the cache", width)
    )
    return figure


def _waterfall(
    panel: Axes,
    names: Sequence[str],
    left: Sequence[int],
    taken: Sequence[int],
    ratios: Sequence[float],
    width: float,
) -> None:
    rows = range(len(names))
    most = max(map(sum, zip(left, taken, strict=True)))
    panel.barh(rows, left, color=BLUE, height=0.62, label="left")
    panel.barh(
        rows,
        taken,
        left=left,
        color="white",
        edgecolor=VERMILION,
        hatch="////",
        linewidth=0.6,
        height=0.62,
        label="taken off",
    )
    for row, size, off, ratio in zip(rows, left, taken, ratios, strict=True):
        text = shown(size) + ("" if ratio == 1 else f"  ({_changed(ratio)})")
        panel.annotate(
            text, (size + off, row), (4, 0), textcoords="offset points", va="center", fontsize=7
        )
    panel.set_xlim(0, most * (1.45 if width >= 5 else 2))
    panel.set_yticks(rows, ["\n".join(textwrap.wrap(name, int(4.6 * width))) for name in names])
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    panel.xaxis.set_major_locator(_locator(most if width >= 5 else 4 * most))
    panel.xaxis.set_major_formatter(lambda size, _: shown(size).replace(".00", "") if size else "0")


def _changed(ratio: float) -> str:
    """An allocation may be more than what theory holds."""
    return f"{_times(ratio)} times less" if ratio > 1 else f"{1 / ratio - 1:.2%} more"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def _locator(most: float) -> Any:
    """Ticks at multiples of a power of two, four to eight of them."""
    from math import floor, log2

    from matplotlib.ticker import MultipleLocator

    return MultipleLocator(2.0 ** floor(log2(max(most, 4) / 4)))


def _count_tokens(axis: Any, most: float) -> None:
    axis.set_major_locator(_locator(most))
    axis.set_major_formatter(lambda n, _: _tokens(n))


def _tokens(count: float) -> str:
    """As users write them: 131072 is 128K."""
    for suffix, size in (("M", 1024**2), ("K", 1024)):
        if count >= size and count % (size / 4) == 0:
            return f"{count / size:g}{suffix}"
    return f"{count:,.0f}" if count >= 1 or count == 0 else f"{count:g}"


def _wrapped(text: str, width: float) -> str:
    return "\n".join(textwrap.wrap(text, max(24, int(width * 14))))
