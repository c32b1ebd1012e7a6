"""The figures for papers: what the artists hold is what the planner says."""

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from attnspan.explorer import figures
from attnspan.explorer.drawing import BLUE, GREEN, VERMILION, draw, save
from attnspan.explorer.kept import kept
from attnspan.patterns import parse
from attnspan.patterns.text import NAMED
from attnspan.planner.forms import work
from attnspan.planner.links import machine
from attnspan.planner.plan import plan
from attnspan.planner.presets import model
from attnspan.planner.ring import Heads, cost

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "doctor_windowed.json"
PATTERNS = [
    "Full()",
    "Causal()",
    "SlidingWindow(5)",
    "SlidingWindow(3, include_self=False)",
    "SlidingWindow(3, dilation=2, right=1)",
    "Sinks(3)",
    "Strided(3, 4)",
    "Blockwise(6, before=True)",
    "GlobalTokens((2, 9))",
    "Longformer(4, 2, right=2)",
    "Documents((7, 5, 9))",
    "SlidingWindow(4) | Sinks(2)",
    "Causal() & ~SlidingWindow(4)",
]


def drawn_cells(figure: Any, n: int) -> np.ndarray:
    """The matrix that the bars of the figure cover."""
    seen = np.zeros((n, n), int)
    (bars,) = (each for each in figure.axes[0].collections if each.get_gid() == "cells")
    for path in bars.get_paths():
        (left, top), (right, bottom) = path.vertices.min(0), path.vertices.max(0)
        assert bottom == top + 1
        seen[int(top), int(left) : int(right)] += 1
    return seen


def test_every_named_pattern_is_among_those_tried() -> None:
    assert {name for name in NAMED if any(name in text for text in PATTERNS)} == set(NAMED)


@pytest.mark.parametrize("text", PATTERNS)
def test_pattern_cells_are_what_the_pattern_sees(text: str) -> None:
    found = figures.matrix(text, 24)
    rule = parse(text)
    truth = [[int(bool(rule.sees(i, j))) for j in range(24)] for i in range(24)]
    figure = draw(found)
    assert drawn_cells(figure, 24).tolist() == truth
    assert f"{sum(map(sum, truth)):,} of 576 pairs" in figure.axes[0].get_title()


def test_a_cell_that_is_wrong_would_be_noticed() -> None:
    found = figures.matrix("SlidingWindow(4)", 12)
    other = replace(found, seen=figures.matrix("SlidingWindow(5)", 12).seen)
    assert (drawn_cells(draw(other), 12) != found.seen).any()


@pytest.mark.parametrize(
    ("policy", "pattern"),
    [
        ("keep-all", "Causal()"),
        ("window:5", "SlidingWindow(5)"),
        ("sinks:2+window:4", "SlidingWindow(4) | Sinks(2)"),
    ],
)
def test_policies_with_a_closed_form_keep_what_their_pattern_sees(
    policy: str, pattern: str
) -> None:
    found = kept(policy, 24)
    assert (found.held == figures.matrix(pattern, 24).seen).all()
    assert (drawn_cells(draw(found), 24) == (found.held > 0)).all()


def test_what_compressive_pools_by_hand() -> None:
    found = kept("compressive:window=3,memory=2,rate=2,sinks=1,block=1", 12)
    # Token 0 is a sink. Once 4 has come, 1 and 2 are no more among the last two that stay beside
    # the next: they share a pool. So do 3 and 4 once 6 has, and 5 and 6 once 8 has, when the first
    # pool goes.
    assert found.held[4].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert found.held[6].tolist() == [1, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert found.held[7].tolist() == [1, 2, 2, 2, 2, 1, 1, 1, 0, 0, 0, 0]
    assert found.held[9].tolist() == [1, 0, 0, 2, 2, 2, 2, 1, 1, 1, 0, 0]
    assert found.slots[9] == 1 + 2 + 3
    figure = draw(found)
    (bars,) = (each for each in figure.axes[0].collections if each.get_gid() == "cells")
    assert {*map(tuple, bars.get_facecolor())} == {
        (*to_rgb(colour), 1.0) for colour in (BLUE, GREEN, VERMILION)
    }


def test_heavy_hitters_are_those_that_the_attention_chose() -> None:
    found = kept("heavy:3+window:4,block=1", 24)
    assert np.flatnonzero(found.held[23]).tolist() == [0, 5, 12, 20, 21, 22, 23]
    assert max(found.slots) == 7
    assert "attention made up" in draw(found).axes[0].get_title()


@pytest.mark.parametrize(("name", "ways"), [("mistral-7b", 2), ("gemma-3-27b", 3)])
@pytest.mark.parametrize("log", [False, True])
def test_memory_lines_are_plans(name: str, ways: int, log: bool) -> None:
    figure = draw(figures.memory(name, 65_536, log=log, storage="int8", batch=2))
    cache, prefill, decode = (panel.get_lines()[:ways] for panel in figure.axes)
    whole = replace(model(name), windows=(None,) * model(name).layers)
    of = {"full attention": (whole, None), "as it is": (model(name), None)}
    of["window:4096"] = (whole, "window:4096")
    for lines in zip(cache, prefill, decode, strict=True):
        spec, policy = of[lines[0].get_label()]
        xs = [line.get_xdata() for line in lines]
        assert xs[0].tolist() == xs[1].tolist() == xs[2].tolist()
        assert xs[0][-1] == 65_536
        for k in range(0, len(xs[0]), 9):
            made = plan(spec, int(xs[0][k]), policy=policy, storage="int8", batch=2)
            assert made.decode is not None
            assert lines[0].get_ydata()[k] == made.cache.total / 2**30
            assert lines[1].get_ydata()[k] == made.prefill.seconds
            assert lines[2].get_ydata()[k] == made.decode.seconds * 1e3
    assert figure.axes[0].get_xscale() == ("log" if log else "linear")
    assert [panel.get_ylabel() for panel in figure.axes] == [
        "KV cache (GiB)",
        "prefill (s)",
        "a decoded token (ms)",
    ]


def test_hand_arithmetic_of_the_first_figure() -> None:
    full, window = draw(figures.memory("mistral-7b", 131_072)).axes[0].get_lines()[:2]
    # 2 * 32 layers * 8 heads * 128 channels * 2 bytes are 128 KiB a token.
    assert full.get_ydata()[-1] == 131_072 * 128 / 2**20
    assert window.get_ydata()[-1] == 4096 * 128 / 2**20


def test_contexts_of_a_linear_axis_are_even() -> None:
    found = figures.contexts(131_072, log=False)
    assert {b - a for a, b in pairwise(found)} == {2048}
    assert figures.contexts(3, log=True)[-1] == figures.contexts(3, log=False)[-1] == 3


def test_reach_is_the_sum_of_windows() -> None:
    figure = draw(figures.reach("mistral-7b"))
    line = figure.axes[0].get_lines()[0]
    assert line.get_ydata().tolist() == [4095 * k for k in range(1, 33)]
    assert line.get_ydata()[-1] == model("mistral-7b").reach


def test_reach_stops_where_a_layer_sees_all() -> None:
    found = figures.reach("gemma-3-27b")
    assert found.bounds == (*(1023 * k for k in range(1, 6)), *(None,) * 57)
    panel = draw(found).axes[0]
    assert panel.get_lines()[0].get_ydata().tolist() == [1023 * k for k in range(1, 6)]
    assert panel.texts[-1].get_text() == "no bound: a layer\nsees all tokens"


def test_measured_reach_is_the_doctors() -> None:
    held = json.loads(MEASURED.read_text())["reach"]
    figure = draw(figures.reach(None, window=32, layers=4, measured=MEASURED))
    bound, measured = figure.axes
    assert bound.get_lines()[0].get_ydata().tolist() == [31, 62, 93, 124]
    for line, kind in zip(measured.get_lines(), ("gradients", "changes"), strict=False):
        points = [each for each in held[kind]["curve"] if each["mean"] > 0]
        assert [*line.get_ydata()] == [each["mean"] for each in points]
        assert [*line.get_xdata()] == [1 + (each["from"] + each["to"]) / 2 for each in points]
        shares = " / ".join(f"{distance:,}" for distance in held[kind]["within"].values())
        assert line.get_label() == f"{kind}: 50 / 90 / 99 % within {shares}"
    assert measured.get_lines()[2].get_xdata() == [held["bound"] + 1] * 2


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("Causal()", ["contiguous", "zigzag", "striped"]),
        ("SlidingWindow(300) | Sinks(4)", ["contiguous", "zigzag"]),
    ],
)
def test_ring_bars_are_the_work(pattern: str, names: list[str]) -> None:
    found = figures.ring(pattern, 4096, 8)
    assert [each.name for each in found.layouts] == names
    panels = draw(found).axes
    spec = model("llama-3.1-8b")
    heads = Heads(spec.heads, spec.kv_heads, spec.head_dim)
    for k, name in enumerate(names):
        of = work(parse(pattern), 4096, 8, name)
        bars = [[bar.get_height() for bar in panel.containers[k]] for panel in panels]
        assert bars[0] == [share / (of.total / 8) for share in of.pairs.sum(1)]
        assert bars[1] == of.received.tolist()
        assert bars[2] == [each.pairs for each in of.rounds]
        assert bars[3] == [each.received for each in of.rounds]
        taken = cost("ring", lambda _, of=of: of, 8, heads, machine("ib", "h100"))
        assert found.layouts[k].cost == taken


def test_stack_bars_are_the_plans() -> None:
    how = {"policy": "sinks:4+window:4092", "storage": "int8", "engine": "attnspan"}
    cache, working = draw(figures.stack("mistral-7b", 131_072, **how)).axes
    factors = plan("mistral-7b", 131_072, **how).stack
    left, taken = ([bar.get_width() for bar in bars] for bars in cache.containers[:2])
    assert left == [factors[0].before, *(each.after for each in factors[:-1])]
    assert taken == [0, *(max(0, each.before - each.after) for each in factors[:-1])]
    assert left[-1] == plan("mistral-7b", 131_072, **how).cache.total
    flash = factors[-1]
    assert [bar.get_width() for bar in working.containers[0]] == [flash.before, flash.after]
    # 32 query heads for each of 128 KiB of 8 KV heads: 64 GiB of every head's keys and values.
    assert left[:2] == [64 * 2**30, 16 * 2**30]


def test_a_stack_that_takes_nothing_off_has_one_bar() -> None:
    found = figures.stack("llama-2-7b", 4096)
    assert found.cache == ()
    (bar,) = draw(found).axes[0].containers[0]
    assert bar.get_width() == found.held == plan("llama-2-7b", 4096).cache.total


@pytest.mark.parametrize("width", [3.4, 7.0])
def test_every_figure_is_a_file_of_each_kind(width: float) -> None:
    made = (
        figures.memory("gemma-3-4b", 32_768),
        figures.matrix("Causal()", 8),
        figures.reach("gemma-3-4b", measured=MEASURED),
        figures.ring("Causal()", 1024, 4),
        figures.stack("gemma-3-4b", 32_768, storage="int4"),
    )
    for found in made:
        figure = draw(found, width=width)
        for panel in figure.axes:
            assert panel.get_xlabel()
        svg = save(figure, "svg")
        root = ElementTree.parse(io.BytesIO(svg)).getroot()
        assert float(root.get("width", "").removesuffix("pt")) == pytest.approx(72 * width)


def test_the_same_figure_is_the_same_file() -> None:
    found = figures.matrix("SlidingWindow(3)", 8)
    for kind in ("svg", "png", "pdf"):
        assert save(draw(found), kind) == save(draw(found), kind)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: figures.matrix("Causal()", 513), "tokens is 513; 1 to 512 are drawn"),
        (lambda: figures.matrix("open('x')", 8), "allowed are"),
        (lambda: figures.memory("mistral-7b", 1), "context is 1; at least 2"),
        (lambda: figures.memory("no-such-model", 4096), "no-such-model"),
        (lambda: figures.reach(None, window=4), "preset is missing"),
        (lambda: figures.reach("mistral-7b", layers=33), "layers is 33; mistral-7b has 32"),
        (lambda: figures.ring("Causal()", 4096, 1), "devices is 1; at least 2"),
        (lambda: figures.ring("Causal()", 64, 4, layouts=["round"]), "layout 'round'"),
        (lambda: figures.ring("~Causal()", 64, 4), "no closed form"),
        (lambda: figures.ring("Causal()", 64, 4, model="deepseek-v3"), "latent attention"),
        (lambda: figures.read_measured(Path(__file__)), "it holds no reach"),
    ],
)
def test_bad_input_is_one_sentence(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        call()
    assert "\n" not in str(caught.value)
