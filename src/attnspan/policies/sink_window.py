"""Sinks and a sliding window: StreamingLLM (https://arxiv.org/abs/2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

from attnspan.policies.base import Band, Decision, Held, Keep, Policy, check_count


@dataclass(frozen=True)
class SinkWindow(Policy):
    """The first `sinks` tokens and the last `window` stay. SPEC: `sinks:4+window:1020`.

    `window` counts the query's own token, so `sinks + window` tokens are seen once the cache is
    full. Positions count inside the cache: the sinks stand right before the window.
    """

    sinks: int
    window: int
    block: int = 1

    def __post_init__(self) -> None:
        check_count("sinks+window", "sinks", self.sinks, 0)
        check_count("sinks+window", "window", self.window, 1)
        check_count("sinks+window", "block", self.block, 1)

    @property
    def leading(self) -> int:
        return self.sinks

    @property
    def band(self) -> Band:
        return Band(sinks=self.sinks, window=self.window)

    @property
    def capacity(self) -> int:
        return self.sinks + self.window - 1 + self.block

    def decide(self, held: Held) -> Decision:
        first = min(self.sinks, held.slots)
        return (Keep(0, first), Keep(max(first, held.slots - (self.window - 1)), held.slots))

    def __str__(self) -> str:
        spec = f"sinks:{self.sinks}+window:{self.window}"
        return spec + (f",block={self.block}" if self.block != 1 else "")
