"""What each figure of the explorer shows, in numbers; `attnspan.explorer.drawing` draws them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.links import machine
from attnspan.planner.plan import plan
from attnspan.planner.presets import model as find
from attnspan.planner.reach import bound
from attnspan.planner.ring import Cost, Heads, cost
from attnspan.planner.spec import ModelSpec
from attnspan.planner.stack import CACHE, Factor, product

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from attnspan.planner.work import Work

FIGURES = {
    "memory": "cache, prefill and a decoded token against context: full attention and a window",
    "pattern": "which query sees which key",
    "policy": "which tokens a cache policy keeps, token by token",
    "reach": "how far back layers reach: the bound, and what the doctor measured",
    "ring": "what each rank of a ring computes and receives, and its rounds, under each layout",
    "stack": "what each optimisation takes off the cache, one after the other",
}

LEAST_CONTEXT = 2
MOST_CELLS = 512
POINTS = 64
WINDOW = 4096


@dataclass(frozen=True)
class Line:
    """One way of attending, at each context.

    Attributes:
        name: "full attention", "as it is" or a policy.
        contexts: tokens, rising.
        cache: bytes of keys and values.
        prefill: seconds.
        decode: seconds of the step that adds the last token.
    """

    name: str
    contexts: tuple[int, ...]
    cache: tuple[int, ...]
    prefill: tuple[float, ...]
    decode: tuple[float, ...]


@dataclass(frozen=True)
class Memory:
    """Memory and time against context.

    Attributes:
        model, device, storage, batch: what they are of.
        room: bytes that the weights leave of the device's memory; None: not known.
        lines: full attention first.
    """

    model: str
    device: str
    storage: str
    batch: int
    room: int | None
    lines: tuple[Line, ...]


def contexts(most: int, log: bool) -> tuple[int, ...]:
    """Where the lines have points: halves of an octave, or even steps, up to `most` tokens.

    >>> contexts(4096, log=True), len(contexts(131_072, log=False))
    ((1024, 1448, 2048, 2896, 4096), 64)
    """
    if log:
        least = min(1024, most // 2)
        halves = round(2 * _octaves(most / least))
        found = (round(least * (most / least) ** (k / halves)) for k in range(halves + 1))
    else:
        found = (max(1, round(most * k / POINTS)) for k in range(1, POINTS + 1))
    return tuple(dict.fromkeys(found))


def _octaves(ratio: float) -> float:
    from math import log2

    return max(0.5, log2(ratio))


def memory(
    model: str,
    context: int,
    *,
    window: int | None = None,
    storage: str = "dense",
    batch: int = 1,
    device: str = "h100",
    log: bool = False,
) -> Memory:
    """Full attention, the model as it is where that differs, and a window in every layer.

    Args:
        model: a preset, or the path of a `config.json`.
        context: the longest, in tokens.
        window: tokens; None: the model's own where every layer slides, else 4,096.
        storage, batch, device: as in `attnspan.planner.plan.plan`.
        log: points for a logarithmic axis.

    Raises:
        ValueError: as in `plan`, or the context is below 2 tokens.
    """
    if context < LEAST_CONTEXT:
        raise ValueError(f"context is {context}; at least {LEAST_CONTEXT} tokens are allowed")
    spec = find(model)
    slides = [each for each in spec.windows if each is not None]
    if window is None:
        window = min(slides) if len(slides) == spec.layers else WINDOW
    unbounded = replace(spec, windows=(None,) * spec.layers, chunked=False)
    policy = f"window:{window}"
    ways: list[tuple[str, ModelSpec, str | None]] = [("full attention", unbounded, None)]
    if slides and not (len(slides) == spec.layers and set(slides) == {window}):
        ways.append(("as it is", spec, None))
    ways.append((policy, unbounded, policy))
    lines, room = [], None
    for name, of, kept in ways:
        plans = [
            plan(of, n, policy=kept, storage=storage, batch=batch, device=device)
            for n in contexts(context, log)
        ]
        room = None if plans[0].memory is None else max(0, plans[0].memory - plans[0].weights)
        steps = [each.decode for each in plans]
        lines.append(
            Line(
                name,
                tuple(each.context for each in plans),
                tuple(each.cache.total for each in plans),
                tuple(each.prefill.seconds for each in plans),
                tuple(step.seconds for step in steps if step is not None),
            )
        )
    return Memory(spec.name, device, storage, batch, room, tuple(lines))


@dataclass(frozen=True)
class Matrix:
    """Which query sees which key.

    Attributes:
        pattern: as text.
        seen: bool `(tokens, tokens)`, a row for each query.
        pairs: how many are seen.
    """

    pattern: str
    seen: NDArray[Any]
    pairs: int


def matrix(pattern: str, tokens: int) -> Matrix:
    """The matrix of a pattern's text over so many tokens.

    Raises:
        ValueError: the text is no pattern, or there are more than 512 tokens.

    >>> matrix("SlidingWindow(2) | Sinks(1)", 4).pairs
    9
    """
    import numpy as np

    from attnspan.patterns.text import parse

    if not 1 <= tokens <= MOST_CELLS:
        raise ValueError(f"tokens is {tokens}; 1 to {MOST_CELLS} are drawn")
    rows = np.arange(tokens)
    parsed = parse(pattern)
    seen = np.broadcast_to(parsed.sees(rows[:, None], rows[None, :]), (tokens, tokens))
    return Matrix(str(parsed), seen, int(seen.sum()))


@dataclass(frozen=True)
class Measured:
    """What `attnspan doctor` measured of a model.

    Attributes:
        model: its name.
        bound: tokens; None: none.
        length: tokens of each sequence that was measured.
        curves: for "gradients" and "changes" the distances (the middle of each span) and the mean
            influence at them.
        within: for both, the distances that hold 50, 90 and 99 % of the influence.
    """

    model: str
    bound: int | None
    length: int
    curves: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
    within: dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Reach:
    """How far back the first layers of a model reach.

    Attributes:
        model: its name.
        windows: of each layer; None: it sees all.
        bounds: of the first 1, 2, ... layers, in tokens; None: no bound from there on.
        measured: of a model, by the doctor; None: not given.
    """

    model: str
    windows: tuple[int | None, ...]
    bounds: tuple[int | None, ...]
    measured: Measured | None


def reach(
    model: str | None, *, window: int | None = None, layers: int | None = None, measured: Any = None
) -> Reach:
    """The bound after each layer.

    Args:
        model: a preset or the path of a `config.json`; None: `layers` layers of `window`.
        window: of every layer instead of the model's own.
        layers: only so many.
        measured: the file that `attnspan doctor --json` wrote.

    Raises:
        ValueError: neither a model nor both a window and layers; no such layers; not the doctor's
            file.
    """
    if model is None:
        if window is None or layers is None:
            raise ValueError("preset is missing; without it both --window and --layers are allowed")
        name, windows, chunked, shares = f"{layers} layers", (window,) * layers, False, ()
    else:
        spec = find(model)
        name, windows, chunked, shares = spec.name, spec.windows, spec.chunked, spec.shares
        if window is not None:
            windows, chunked = (window,) * spec.layers, False
        if layers is not None and layers > spec.layers:
            raise ValueError(f"layers is {layers}; {spec.name} has {spec.layers}")
        windows, shares = windows[:layers], shares[:layers]
    bounds = tuple(
        bound(windows[:k], chunked=chunked, shares=shares[:k]) for k in range(1, len(windows) + 1)
    )
    return Reach(name, windows, bounds, None if measured is None else read_measured(measured))


def read_measured(path: str | Path) -> Measured:
    """What the doctor wrote of a model's reach.

    Raises:
        ValueError: the file holds nothing of the kind.
        OSError: it can't be read.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        found, kinds = held["reach"], ("gradients", "changes")
        return Measured(
            held["meta"]["model"]["name"],
            found["bound"],
            found["length"],
            {kind: _curve(found[kind]["curve"]) for kind in kinds},
            {kind: tuple(found[kind]["within"][s] for s in _SHARES) for kind in kinds},  # pyright: ignore[reportArgumentType]
        )
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"measured {path}: it holds no reach; a file of `attnspan doctor --json` is allowed"
        ) from None


_SHARES = ("0.5", "0.9", "0.99")


def _curve(points: list[dict[str, Any]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (
        tuple((each["from"] + each["to"]) / 2 for each in points),
        tuple(each["mean"] for each in points),
    )


@dataclass(frozen=True)
class Layout:
    """A ring under one layout: `work` says what it does, `cost` what a layer's forward takes."""

    name: str
    work: Work
    cost: Cost


@dataclass(frozen=True)
class Ring:
    """A ring of devices under several layouts.

    Attributes:
        model: whose heads they are.
        pattern: as text.
        context: tokens.
        devices: ranks.
        link, device: their names.
        layouts: those that can be.
        refused: why others can't, a sentence each.
    """

    model: str
    pattern: str
    context: int
    devices: int
    link: str
    device: str
    layouts: tuple[Layout, ...]
    refused: tuple[str, ...]


def ring(
    pattern: str,
    context: int,
    devices: int,
    *,
    model: str = "llama-3.1-8b",
    layouts: Sequence[str] | None = None,
    link: str = "ib",
    device: str = "h100",
) -> Ring:
    """What each rank computes and receives, of one attention layer's forward.

    Args:
        pattern: its text; one that has a closed form (`attnspan.planner.forms.work`).
        context: tokens.
        devices: ranks, at least 2.
        model: whose heads they are.
        layouts: None: all that the pattern can be laid out in.
        link, device: rates.

    Raises:
        ValueError: as in `work`, `machine` and `cost`.
    """
    from attnspan.patterns.text import parse
    from attnspan.planner.forms import LAYOUTS, works

    if devices < 2:
        raise ValueError(f"devices is {devices}; at least 2 make a ring")
    spec, parsed, rates = find(model), parse(pattern), machine(link, device)
    if spec.latent is not None:
        raise ValueError(f"model {spec.name} has multi-head latent attention; a ring isn't planned")
    heads = Heads(spec.heads, spec.kv_heads, spec.head_dim)
    drawn, refused = [], []
    for name in LAYOUTS if layouts is None else layouts:
        of = works(parsed, context, name)
        try:
            drawn.append(Layout(name, of(devices), cost("ring", of, devices, heads, rates)))
        except ValueError as error:
            if layouts is not None:
                raise
            refused.append(str(error))
    if not drawn:
        raise ValueError(refused[0])
    return Ring(
        spec.name, str(parsed), context, devices, link, device, tuple(drawn), tuple(refused)
    )


@dataclass(frozen=True)
class Stack:
    """What each optimisation takes off.

    Attributes:
        model, context: what it is of.
        cache: of the KV cache, one after the other; those that change nothing are left out.
        held: bytes of the cache after them.
        working: flash attention's, of another quantity.
        product: the cache's ratios multiplied.
    """

    model: str
    context: int
    cache: tuple[Factor, ...]
    held: int
    working: Factor
    product: float


def stack(model: str, context: int, **how: Any) -> Stack:
    """The stack of optimisations, by the planner.

    Args:
        model: a preset or the path of a `config.json`.
        context: tokens.
        how: policy, storage, batch and engine, as in `attnspan.planner.plan.plan`.

    Raises:
        ValueError: as in `plan`.
    """
    made = plan(model, context, **how)
    cache = tuple(each for each in made.stack if each.quantity == CACHE)
    (working,) = (each for each in made.stack if each.quantity != CACHE)
    return Stack(made.spec.name, context, cache, made.cache.total, working, product(made.stack))
