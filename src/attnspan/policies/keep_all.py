"""Keep every token: exact attention, and a cache that grows with the stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from attnspan.policies.base import Band, Decision, Held, Keep, Policy


@dataclass(frozen=True)
class KeepAll(Policy):
    """Every token stays. SPEC: `keep-all`."""

    block: int = field(default=1, init=False, repr=False)

    @property
    def band(self) -> Band:
        return Band(sinks=0, window=None)

    @property
    def capacity(self) -> None:
        return None

    def decide(self, held: Held) -> Decision:
        return (Keep(0, held.slots),)

    def __str__(self) -> str:
        return "keep-all"
