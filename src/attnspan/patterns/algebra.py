"""What a pattern is, and how patterns combine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from attnspan.patterns.runs import Runs, complement, intersection, union

Positions = NDArray[np.int64]


def _wide(x: Any) -> Any:
    """Positions whose distances don't wrap around: signed, of 32 bits at least."""
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return x
    signed = dtype.is_signed if hasattr(dtype, "is_signed") else dtype.kind != "u"
    if signed and dtype.itemsize >= 4:
        return x
    return x.long() if hasattr(x, "long") else x.astype("int64")


class Pattern(ABC):
    """Which (query position, key position) pairs see each other.

    A frozen value: comparable, hashable, and printed as the expression that makes it, which
    `attnspan.patterns.parse` reads. `a & b` sees what both see, `a | b` what either sees, `~a`
    exactly the pairs that `a` does not, those in the future of a causal `a` included
    (`Causal() & ~a` leaves them out).

    A named pattern says what it is once, in `rule`, in terms of the atoms; which pairs it sees, how
    many they are and every kernel's tiles follow from that.

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
    def rule(self) -> Pattern:
        """The same pattern as an expression of atoms, `&`, `|` and `~` alone."""

    @cached_property
    def _rule(self) -> Pattern:
        return self.rule()

    @cached_property
    def text(self) -> str:
        """As `str(self)`, made once."""
        return str(self)

    def sees(self, i: Any, j: Any) -> Any:
        """Whether the query at position `i` sees the key at position `j`.

        `i` and `j` are whole numbers, or integer arrays of numpy or torch that broadcast; the
        answer is a bool, or a bool array of the broadcast shape.
        """
        return self._rule.sees(_wide(i), _wide(j))

    def spans(self, first: Positions, last: Positions, m: int) -> tuple[Runs, Runs]:
        """Bounds of what each row, the queries at `first <= i <= last`, sees of the keys 0..m-1.

        Returns:
            Two sets of keys: no query of the row sees a key outside the one, and every query sees
            every key of the other. Where `first == last` they are equal, and exact, but for rules
            with a stride.
        """
        return self._rule.spans(first, last, m)

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

    def rule(self) -> Pattern:
        return And(self.left.rule(), self.right.rule())

    def sees(self, i: Any, j: Any) -> Any:
        return self.left.sees(i, j) & self.right.sees(i, j)

    def spans(self, first: Positions, last: Positions, m: int) -> tuple[Runs, Runs]:
        pairs = zip(self.left.spans(first, last, m), self.right.spans(first, last, m), strict=True)
        some, all_ = (intersection(a, b, m) for a, b in pairs)
        return some, all_

    def __str__(self) -> str:
        left, right = str(self.left), str(self.right)
        left = f"({left})" if isinstance(self.left, Or) else left
        right = f"({right})" if isinstance(self.right, (And, Or)) else right
        return f"{left} & {right}"


@final
@dataclass(frozen=True, repr=False)
class Or(Pattern):
    """Seen by either: `left | right`."""

    left: Pattern
    right: Pattern

    def rule(self) -> Pattern:
        return Or(self.left.rule(), self.right.rule())

    def sees(self, i: Any, j: Any) -> Any:
        return self.left.sees(i, j) | self.right.sees(i, j)

    def spans(self, first: Positions, last: Positions, m: int) -> tuple[Runs, Runs]:
        pairs = zip(self.left.spans(first, last, m), self.right.spans(first, last, m), strict=True)
        some, all_ = (union(a, b) for a, b in pairs)
        return some, all_

    def __str__(self) -> str:
        left, right = str(self.left), str(self.right)
        return f"{left} | ({right})" if isinstance(self.right, Or) else f"{left} | {right}"


@final
@dataclass(frozen=True, repr=False)
class Not(Pattern):
    """Not seen: `~pattern`."""

    pattern: Pattern

    def rule(self) -> Pattern:
        return Not(self.pattern.rule())

    def sees(self, i: Any, j: Any) -> Any:
        # `~` on a Python bool would give -1 or -2.
        return self.pattern.sees(i, j) ^ True

    def spans(self, first: Positions, last: Positions, m: int) -> tuple[Runs, Runs]:
        some, all_ = self.pattern.spans(first, last, m)
        return complement(all_, m), complement(some, m)

    def __str__(self) -> str:
        inner = str(self.pattern)
        return f"~({inner})" if isinstance(self.pattern, (And, Or)) else f"~{inner}"
