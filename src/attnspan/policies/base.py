"""What a cache policy is: a frozen value that decides which held tokens stay.

A policy decides on a grid. Every `block` tokens, counted from token 0 of the stream, it is shown
what is held and answers with what stays; between two grid points every new token is held. A query
sees what the last grid point kept and all tokens since, so the result depends on the tokens and
`block`, never on how calls cut the input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Held:
    """What one layer holds when a policy decides, oldest slot first.

    Attributes:
        slots: number of held slots, `n`.
        memory: how many of them are pooled slots (they follow the policy's sinks).
        scores: attention each slot has received since it came in, from the queries that
            `Policy.observed` names, summed over them and the query heads of its KV head, float32
            `(batch, num_kv_heads, n)`; None unless the policy asks for scores.
    """

    slots: int
    memory: int = 0
    scores: Tensor | None = None


@dataclass(frozen=True)
class Keep:
    """The slots `start <= s < stop` stay as they are."""

    start: int
    stop: int


@dataclass(frozen=True)
class Pick:
    """The slots that `index` names stay: int64 `(batch, num_kv_heads, k)`, ascending in `k`."""

    index: Tensor


@dataclass(frozen=True)
class Pool:
    """`groups` runs of `rate` slots, from `start` on, become one slot each.

    `how` is "mean", "max" (per channel), "most-used" (the slot with the highest score, per KV
    head) or `rate` weights of a convolution whose stride is its length.
    """

    start: int
    groups: int
    rate: int
    how: str | tuple[float, ...]


Decision = tuple[Keep | Pick | Pool, ...]
"""The held slots from now on, oldest first."""


@dataclass(frozen=True)
class Band:
    """The closed form of a policy that keeps the first `sinks` and the last `window` tokens.

    `window` counts the query's own token; None keeps every token.
    """

    sinks: int
    window: int | None


class Policy(ABC):
    """Which tokens a cache keeps once it is full. Final subclasses are frozen dataclasses."""

    block: int

    @property
    def needs_scores(self) -> bool:
        """Whether `decide` reads `Held.scores`."""
        return False

    @property
    def observed(self) -> int | None:
        """Scores are of the last so many queries before a grid point alone; None: of all."""
        return None

    def of_heads(self, count: int) -> tuple[Policy, ...]:
        """The policy of each of a layer's `count` KV heads; here they all share this one."""
        return (self,) * count

    @property
    def leading(self) -> int:
        """How many of the stream's first tokens stay for ever: the sinks."""
        return 0

    @property
    def band(self) -> Band | None:
        """The closed form of the policy if it has one: a rolling buffer can then serve it."""
        return None

    @property
    @abstractmethod
    def capacity(self) -> int | None:
        """The most slots held at once, those of an unfinished block included; None: no bound."""

    @abstractmethod
    def decide(self, held: Held) -> Decision:
        """What stays at a grid point."""

    @abstractmethod
    def __str__(self) -> str:
        """The SPEC text: `attnspan.policies.parse(str(policy)) == policy`."""


def check_count(owner: str, name: str, value: Any, least: int) -> None:
    """Raises ValueError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{owner}: {name} is {value!r}; a whole number of at least {least} is allowed"
        )
