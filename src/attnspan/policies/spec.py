"""SPEC texts: `parse(str(policy)) == policy`."""

from __future__ import annotations

import re
from dataclasses import fields

from attnspan.policies.base import Policy
from attnspan.policies.compressive import Compressive
from attnspan.policies.heavy_hitter import HeavyHitter
from attnspan.policies.keep_all import KeepAll
from attnspan.policies.per_head import PerHead
from attnspan.policies.per_layer import PerLayer
from attnspan.policies.sink_window import SinkWindow
from attnspan.policies.snap_kv import SnapKV
from attnspan.policies.window import Window

FORMS = (
    "keep-all",
    "window:1024",
    "sinks:4+window:1020",
    "heavy:512+window:512",
    "snap:448+window:64",
    "compressive:window=512,memory=256,rate=4",
    "heads(SPEC; SPEC; ...)",
    "layers(SPEC; SPEC; ...)",
)


def parse(text: str) -> Policy | PerLayer:
    """The policy that a SPEC text names.

    Raises:
        ValueError: one sentence that names the text and the forms that are allowed.

    >>> parse("sinks:4+window:1020")
    SinkWindow(sinks=4, window=1020, block=1)
    >>> str(parse("heavy:512+window:512,block=64"))
    'heavy:512+window:512'
    """
    spec = text.strip()
    several = re.fullmatch(r"(layers|heads)\((.*)\)", spec, re.DOTALL)
    if several:
        policies = [parse(part) for part in _split(several[2], ";")]
        inside = PerLayer if several[1] == "layers" else PerLayer | PerHead
        if any(isinstance(p, inside) for p in policies):
            wrong = next(str(p).partition("(")[0] for p in policies if isinstance(p, inside))
            raise ValueError(f"policy {spec!r}: {wrong}(...) can't stand inside {several[1]}(...)")
        kind = PerLayer if several[1] == "layers" else PerHead
        return kind(tuple(p for p in policies if isinstance(p, Policy)))
    head, *options = [part.strip() for part in spec.split(",")]
    if head == "keep-all" and not options:
        return KeepAll()
    if head.startswith("compressive:"):
        return _build(spec, Compressive, [head.removeprefix("compressive:"), *options])
    counts = head.split("+")
    names = tuple(part.partition(":")[0].strip() for part in counts)
    kinds = {
        ("window",): Window,
        ("sinks", "window"): SinkWindow,
        ("heavy", "window"): HeavyHitter,
        ("snap", "window"): SnapKV,
    }
    if names not in kinds:
        raise _wrong(spec)
    if names[0] == "snap":
        counts[0] = counts[0].replace("snap", "heavy", 1)
    return _build(spec, kinds[names], [part.replace(":", "=", 1) for part in counts] + options)


def parse_list(text: str) -> list[Policy | PerLayer]:
    """Policies from a comma-separated list; a part such as `block=64` belongs to the SPEC before.

    >>> [str(p) for p in parse_list("keep-all, heavy:8+window:8,block=1, window:4")]
    ['keep-all', 'heavy:8+window:8,block=1', 'window:4']
    """
    specs: list[str] = []
    for part in _split(text, ","):
        name, equals, _ = part.partition("=")
        if specs and equals and ":" not in name:
            specs[-1] += f",{part}"
        else:
            specs.append(part)
    return [parse(spec) for spec in specs]


def _split(text: str, mark: str) -> list[str]:
    """The parts of `text` between marks that stand in no parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _build(spec: str, kind: type[Policy], pairs: list[str]) -> Policy:
    sizes = {field.name for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    values: dict[str, object] = {}
    for pair in pairs:
        name, found, value = (part.strip() for part in pair.partition("="))
        if not found or name in values or name not in sizes:
            raise _wrong(spec)
        if name == "pooling":
            weights = re.fullmatch(r"conv\((.*)\)", value)
            try:
                values[name] = tuple(map(float, weights[1].split("/"))) if weights else value
            except ValueError:
                raise _wrong(spec) from None
        elif re.fullmatch(r"[+-]?\d+", value):
            values[name] = int(value)
        else:
            raise _wrong(spec)
    try:
        return kind(**values)
    except TypeError:  # a size is missing
        raise _wrong(spec) from None


def _wrong(spec: str) -> ValueError:
    return ValueError(f"policy {spec!r} is not known; allowed are {', '.join(FORMS)}")
