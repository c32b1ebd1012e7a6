"""What implementations reach on GPUs that were measured, and which to take for a call.

`gpu_rates.json` holds useful operations a second of each implementation, side by side in one run,
for each case; `benchmarks/gpu.py --rates` writes it, and an entry with a `note` came otherwise. A
call is served by its nearest case: of the same kind of pattern, then of the nearest head_dim and
length. A GPU that wasn't measured takes the figures of one with the same compute capability.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from attnspan.patterns.algebra import Pattern
from attnspan.patterns.library import Causal, Full, SlidingWindow
from attnspan.patterns.text import parse


@dataclass(frozen=True)
class Ranking:
    """`figures` are (implementation, TFLOP/s), fastest first; `case` and `source` are theirs."""

    figures: tuple[tuple[str, float], ...]
    case: str
    source: str

    def __str__(self) -> str:
        figures = ", ".join(f"{impl} {rate:.0f}" for impl, rate in self.figures)
        return f"{figures} TFLOP/s for {self.case} on {self.source}"


@lru_cache(maxsize=256)
def ranking(
    device: str,
    capability: tuple[int, int],
    pattern: str,
    head_dim: int,
    length: int,
    with_lse: bool,
    with_backward: bool,
) -> Ranking | None:
    """Implementations by measured speed; None where no such GPU was measured.

    Args:
        device: its name, as `torch.cuda.get_device_name` gives it.
        capability: its compute capability.
        pattern: as text.
        head_dim: channels of a head.
        length: queries.
        with_lse: rank forwards that give the log-sum-exp.
        with_backward: rank forward and backward together.
    """
    tables = _tables()
    if device in tables:
        table, source = tables[device], device
    else:
        alike = [name for name, t in tables.items() if tuple(t["capability"]) == capability]
        if not alike:
            return None
        table, source = tables[alike[0]], f"{alike[0]} (this is {device})"
    wanted = parse(pattern)
    rates = _nearest(table["rates"], "forward", wanted, head_dim, length, with_lse or with_backward)
    if not rates:
        return None
    case = _name(rates[0])
    if with_backward:
        back = _nearest(table["rates"], "backward", wanted, head_dim, length, False)
        if not back:
            return None
        behind = {row["impl"]: row["tflops"] for row in back}
        case = f"{case} and {_name(back[0])}"
    else:
        behind = {}
    figures = []
    for row in rates:
        rate = row["tflops"]
        if with_backward:
            if row["impl"] not in behind:
                continue
            # A backward's useful operations are two and a half times a forward's.
            rate = 3.5 / (1 / rate + 2.5 / behind[row["impl"]])
        figures.append((row["impl"], rate))
    figures.sort(key=lambda figure: -figure[1])
    return Ranking(tuple(figures), case, f"{source}, {table['date']}")


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    return json.loads((files("attnspan") / "gpu_rates.json").read_text())


def _nearest(
    rates: list[dict[str, Any]], what: str, pattern: Pattern, head_dim: int, length: int, lse: bool
) -> list[dict[str, Any]]:
    """The rows of the case that is most like the wanted one."""

    def distance(row: dict[str, Any]) -> tuple[float, ...]:
        return (
            _unlike(parse(row["pattern"]), pattern),
            abs(math.log2(row["head_dim"] / head_dim)),
            abs(math.log2(row["n"] / max(1, length))),
            row["lse"] != lse,
        )

    rows = [row for row in rates if row["what"] == what]
    if not rows:
        return []
    nearest = min(rows, key=distance)
    case = "pattern", "head_dim", "n", "lse"
    return [row for row in rows if all(row[x] == nearest[x] for x in case)]


def _unlike(a: Pattern, b: Pattern) -> float:
    """How far apart two patterns are in what they cost: 0 for equal ones, 1 an octave of window."""
    if a == b:
        return 0
    kinds = [_kind(a), _kind(b)]
    if kinds[0] != kinds[1]:
        return 100.0 + 100 * abs(_KINDS.index(kinds[0]) - _KINDS.index(kinds[1]))
    if isinstance(a, SlidingWindow) and isinstance(b, SlidingWindow):
        return abs(math.log2((a.window + a.right) / (b.window + b.right)))
    return 1


_KINDS = ("dense", "window", "other")


def _kind(pattern: Pattern) -> str:
    match pattern:
        case Causal() | Full():
            return "dense"
        case SlidingWindow(_, True, 1):
            return "window"
    return "other"


def _name(row: dict[str, Any]) -> str:
    return f"{row['what']} of {row['pattern']} at n={row['n']}, head_dim {row['head_dim']}"
