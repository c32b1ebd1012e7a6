"""A pattern over a part of the sequence, in that part's own count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from attnspan.patterns.algebra import And, Not, Or, Pattern
from attnspan.patterns.atoms import Atom, Distance, Stride, atoms
from attnspan.patterns.library import MOST


@final
@dataclass(frozen=True, repr=False)
class Placed(Pattern):
    """`pattern` for queries at `start + lead + step * i` and keys at `start + step * j`.

    So a process that holds a part of a sequence computes what the whole sequence's pattern says.

    >>> from attnspan.patterns import Causal, Sinks
    >>> [j for j in range(8) if Placed(Sinks(6), 4).sees(5, j)]
    [0, 1]
    >>> [j for j in range(8) if Placed(Causal(), 1, 2, -1).sees(3, j)]  # query 6, keys 1, 3, 5, ...
    [0, 1, 2]

    Raises:
        TypeError: `pattern` is none.
        ValueError: a number that is none, a `step` below 1, or a `lead` where `pattern` has a
            stride.
    """

    pattern: Pattern
    start: int
    step: int = 1
    lead: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern):
            raise TypeError(
                f"Placed: pattern is {self.pattern!r}; a Pattern such as Causal() is allowed"
            )
        for name, least in (("start", -MOST), ("step", 1), ("lead", -MOST)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
                raise ValueError(
                    f"Placed: {name} is {value!r}; a whole number from {least} to {MOST} is allowed"
                )
        if self.lead and any(isinstance(atom, Stride) for atom in atoms(self.pattern.rule())):
            raise ValueError(
                f"Placed: lead is {self.lead}, and {self.pattern} has a stride; 0 is allowed there"
            )

    def rule(self) -> Pattern:
        return _moved(self.pattern.rule(), self)

    def __str__(self) -> str:
        rest = f", {self.step}, {self.lead}" if self.step != 1 or self.lead else ""
        return f"Placed({self.pattern}, {self.start}{rest})"


def _moved(rule: Pattern, to: Placed) -> Pattern:
    match rule:
        case And(left, right):
            return And(_moved(left, to), _moved(right, to))
        case Or(left, right):
            return Or(_moved(left, to), _moved(right, to))
        case Not(inner):
            return Not(_moved(inner, to))
    assert isinstance(rule, Atom), f"{rule!r} is no rule"
    return rule.thin(to.step, to.start, to.lead)


def placed(pattern: Pattern, q_start: int, k_start: int, step: int = 1) -> tuple[Pattern, int]:
    """The pattern for queries from `q_start` on and keys from `k_start` on, and their `q_offset`.

    Both stand `step` apart. A pattern that depends on distances alone stays itself, so equal parts
    share their plans.
    """
    if step != 1:
        return Placed(pattern, k_start, step, q_start - k_start), 0
    if all(isinstance(atom, Distance | Stride) for atom in atoms(pattern.rule())):
        return pattern, q_start - k_start
    return Placed(pattern, k_start), q_start - k_start
