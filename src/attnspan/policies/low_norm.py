"""Keys of low norm: the L2 strategy of Devoto et al. (https://arxiv.org/abs/2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass

from attnspan.policies.base import Decision, Held, Keep, Pick, Policy, check_count


@dataclass(frozen=True)
class LowNorm(Policy):
    """The first `sinks`, the `low` tokens with the shortest keys and the last `window`, per head.

    Short keys go with high attention, the paper found. It asks for no scores, so it costs what a
    window does. `window` counts the query's own token. Rotation leaves a key's length as it is.
    SPEC: `sinks:4+norm:252+window:256`.
    """

    sinks: int
    low: int
    window: int
    block: int = 64

    def __post_init__(self) -> None:
        check_count("sinks+norm+window", "sinks", self.sinks, 0)
        check_count("sinks+norm+window", "norm", self.low, 1)
        check_count("sinks+norm+window", "window", self.window, 1)
        check_count("sinks+norm+window", "block", self.block, 1)

    @property
    def leading(self) -> int:
        return self.sinks

    @property
    def needs_norms(self) -> bool:
        return True

    @property
    def capacity(self) -> int:
        return self.sinks + self.low + self.window - 1 + self.block

    def decide(self, held: Held) -> Decision:
        first, recent = min(self.sinks, held.slots), held.slots - (self.window - 1)
        if recent - first <= self.low:
            return (Keep(0, held.slots),)
        assert held.norms is not None, "the cache gives norms to a policy that asks for them"
        # In the first layer equal tokens have equal keys, but for rounding, which depends on how
        # calls cut the input: with fewer digits they are equal again, and the latest of them stay.
        norms = held.norms[..., first:recent].bfloat16().flip(-1)
        order = norms.argsort(dim=-1, stable=True)[..., : self.low]
        return (
            Keep(0, first),
            Pick((recent - 1 - order).sort(dim=-1).values),
            Keep(recent, held.slots),
        )

    def __str__(self) -> str:
        spec = f"sinks:{self.sinks}+norm:{self.low}+window:{self.window}"
        return spec + (f",block={self.block}" if self.block != 64 else "")
