"""The sliding window alone: Mistral's rolling buffer (https://arxiv.org/abs/2310.06825)."""

from __future__ import annotations

from dataclasses import dataclass

from attnspan.policies.base import Band, Decision, Held, Keep, Policy, check_count


@dataclass(frozen=True)
class Window(Policy):
    """The last `window` tokens stay, the query's own included. SPEC: `window:1024`.

    A block larger than 1 lets the window grow to `window + block - 1` between two grid points.
    """

    window: int
    block: int = 1

    def __post_init__(self) -> None:
        check_count("window", "window", self.window, 1)
        check_count("window", "block", self.block, 1)

    @property
    def band(self) -> Band:
        return Band(sinks=0, window=self.window)

    @property
    def capacity(self) -> int:
        return self.window - 1 + self.block

    def decide(self, held: Held) -> Decision:
        return (Keep(max(0, held.slots - (self.window - 1)), held.slots),)

    def __str__(self) -> str:
        return f"window:{self.window}" + (f",block={self.block}" if self.block != 1 else "")
