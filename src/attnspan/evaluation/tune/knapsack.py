"""The least loss for each number of bytes, where parts of a cache lose and cost on their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Option(Generic[T]):
    """One way to hold a part: its bytes, what it is expected to lose, and what it is."""

    bytes: int
    loss: float
    value: T


def pareto(options: Iterable[Option[T]]) -> list[Option[T]]:
    """Those that no option of as few bytes loses less than, by rising bytes.

    >>> [o.value for o in pareto([Option(4, 1.0, "a"), Option(2, 1.0, "b"), Option(8, 0.5, "c")])]
    ['b', 'c']
    """
    kept: list[Option[T]] = []
    for each in sorted(options, key=lambda each: (each.bytes, each.loss)):
        if not kept or each.loss < kept[-1].loss:
            kept.append(each)
    return kept


def frontier(parts: Sequence[Sequence[Option[T]]]) -> list[Option[tuple[T, ...]]]:
    """One option for each part, so that no other choice of as few bytes loses less.

    Losses and bytes add up. It is exact: parts come in one after the other, and of what was chosen
    for those before only what is not beaten can be part of the best (Bellman's principle).

    >>> parts = [[Option(1, 0.5, "a"), Option(2, 0.0, "A")], [Option(1, 0.25, "b")]]
    >>> [("".join(o.value), o.bytes, o.loss) for o in frontier(parts)]
    [('ab', 2, 0.75), ('Ab', 3, 0.25)]
    """
    found: list[Option[tuple[T, ...]]] = [Option(0, 0.0, ())]
    for options in parts:
        found = pareto(
            Option(before.bytes + each.bytes, before.loss + each.loss, (*before.value, each.value))
            for each in pareto(options)
            for before in found
        )
    return found
