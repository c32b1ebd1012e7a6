"""What a pattern is, and how patterns combine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, final

Cover = Literal["full", "partial", "empty"]
"""Whether a rectangle of pairs is seen by all, by some, or by none of its pairs."""


class Pattern(ABC):
    """Which (query position, key position) pairs see each other.

    A frozen value: comparable, hashable, and printed as the expression that makes it. `a & b` sees
    what both see, `a | b` what either sees, `~a` exactly the pairs that `a` does not, those in the
    future of a causal `a` included (`Causal() & ~a` leaves them out).

    >>> from attnspan.patterns import Causal, Sinks, SlidingWindow
    >>> streaming = SlidingWindow(3) | Sinks(1)
    >>> streaming
    SlidingWindow(3) | Sinks(1)
    >>> [j for j in range(10) if streaming.sees(7, j)]
    [0, 5, 6, 7]
    >>> [j for j in range(10) if (Causal() & ~streaming).sees(7, j)]
    [1, 2, 3, 4]
    """

    @abstractmethod
    def sees(self, i: Any, j: Any) -> Any:
        """Whether the query at position `i` sees the key at position `j`.

        `i` and `j` are whole numbers, or integer arrays of numpy or torch that broadcast; the
        answer is a bool, or a bool array of the broadcast shape.
        """

    @abstractmethod
    def cover(self, queries: range, keys: range) -> Cover:
        """What the pairs of two non-empty ranges of step 1 have in common, in O(1).

        "full": all of them see each other. "empty": none do. "partial": anything else; for a
        combination it may also mean that its parts don't tell.
        """

    @abstractmethod
    def __str__(self) -> str:
        """The Python expression that makes this pattern."""

    def __repr__(self) -> str:
        return str(self)

    def __and__(self, other: Pattern) -> Pattern:
        return And(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return Or(self, other) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        return Not(self)


@final
@dataclass(frozen=True, repr=False)
class And(Pattern):
    """Seen by both: `left & right`."""

    left: Pattern
    right: Pattern

    def sees(self, i: Any, j: Any) -> Any:
        return self.left.sees(i, j) & self.right.sees(i, j)

    def cover(self, queries: range, keys: range) -> Cover:
        parts = {self.left.cover(queries, keys), self.right.cover(queries, keys)}
        if "empty" in parts:
            return "empty"
        return "full" if parts == {"full"} else "partial"

    def __str__(self) -> str:
        left = f"({self.left})" if isinstance(self.left, Or) else str(self.left)
        right = f"({self.right})" if isinstance(self.right, And | Or) else str(self.right)
        return f"{left} & {right}"


@final
@dataclass(frozen=True, repr=False)
class Or(Pattern):
    """Seen by either: `left | right`."""

    left: Pattern
    right: Pattern

    def sees(self, i: Any, j: Any) -> Any:
        return self.left.sees(i, j) | self.right.sees(i, j)

    def cover(self, queries: range, keys: range) -> Cover:
        parts = {self.left.cover(queries, keys), self.right.cover(queries, keys)}
        if "full" in parts:
            return "full"
        return "empty" if parts == {"empty"} else "partial"

    def __str__(self) -> str:
        right = f"({self.right})" if isinstance(self.right, Or) else str(self.right)
        return f"{self.left} | {right}"


@final
@dataclass(frozen=True, repr=False)
class Not(Pattern):
    """Not seen: `~pattern`."""

    pattern: Pattern

    def sees(self, i: Any, j: Any) -> Any:
        # `~` on a Python bool would give -1 or -2.
        return self.pattern.sees(i, j) ^ True

    def cover(self, queries: range, keys: range) -> Cover:
        opposite: dict[Cover, Cover] = {"full": "empty", "empty": "full", "partial": "partial"}
        return opposite[self.pattern.cover(queries, keys)]

    def __str__(self) -> str:
        inner = f"({self.pattern})" if isinstance(self.pattern, And | Or) else str(self.pattern)
        return f"~{inner}"
