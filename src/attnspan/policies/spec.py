"""SPEC texts: `parse(str(policy)) == policy`."""

from __future__ import annotations

import re
from dataclasses import fields

from attnspan.policies.base import Policy
from attnspan.policies.compressive import Compressive
from attnspan.policies.heavy_hitter import HeavyHitter
from attnspan.policies.keep_all import KeepAll
from attnspan.policies.per_layer import PerLayer
from attnspan.policies.sink_window import SinkWindow
from attnspan.policies.window import Window

FORMS = (
    "keep-all",
    "window:1024",
    "sinks:4+window:1020",
    "heavy:512+window:512",
    "compressive:window=512,memory=256,rate=4",
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
    layers = re.fullmatch(r"layers\((.*)\)", spec, re.DOTALL)
    if layers:
        policies = [parse(part) for part in layers[1].split(";")]
        if any(isinstance(p, PerLayer) for p in policies):
            raise ValueError(f"policy {spec!r}: layers(...) can't stand inside layers(...)")
        return PerLayer(tuple(p for p in policies if isinstance(p, Policy)))
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
    }
    if names not in kinds:
        raise _wrong(spec)
    return _build(spec, kinds[names], [part.replace(":", "=", 1) for part in counts] + options)


def parse_list(text: str) -> list[Policy | PerLayer]:
    """Policies from a comma-separated list; a part such as `block=64` belongs to the SPEC before.

    >>> [str(p) for p in parse_list("keep-all, heavy:8+window:8,block=1, window:4")]
    ['keep-all', 'heavy:8+window:8,block=1', 'window:4']
    """
    specs: list[str] = []
    depth = 0
    for part in text.split(","):
        name, equals, _ = part.partition("=")
        if specs and (depth > 0 or (equals and ":" not in name)):
            specs[-1] += f",{part}"
        else:
            specs.append(part)
        depth += part.count("(") - part.count(")")
    return [parse(spec) for spec in specs]


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
