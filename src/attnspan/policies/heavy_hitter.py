"""Heavy hitters and a sliding window: H2O (https://arxiv.org/abs/2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass

from attnspan.policies.base import Decision, Held, Keep, Pick, Policy, check_count


@dataclass(frozen=True)
class HeavyHitter(Policy):
    """The `heavy` tokens with the most attention received and the last `window` stay, per KV head.

    Attention received is summed from the attention itself, over all queries since the token came
    in and the query heads that share its KV head. `window` counts the query's own token. Positions
    count inside the cache. The paper decides at every token (`block=1`); a larger block lets the
    cache work on whole blocks and hold up to `block - 1` tokens more.
    SPEC: `heavy:512+window:512`, `heavy:512+window:512,block=1`.
    """

    heavy: int
    window: int
    block: int = 64

    def __post_init__(self) -> None:
        check_count("heavy+window", "heavy", self.heavy, 1)
        check_count("heavy+window", "window", self.window, 1)
        check_count("heavy+window", "block", self.block, 1)

    @property
    def needs_scores(self) -> bool:
        return True

    @property
    def capacity(self) -> int:
        return self.heavy + self.window - 1 + self.block

    def decide(self, held: Held) -> Decision:
        recent = self.window - 1
        old = held.slots - recent
        if old <= self.heavy:
            return (Keep(0, held.slots),)
        assert held.scores is not None, "the cache gives scores to a policy that asks for them"
        # A stable sort makes equal scores a rule (the older stays) rather than an accident.
        order = held.scores[..., :old].argsort(dim=-1, descending=True, stable=True)
        heavy = order[..., : self.heavy].sort(dim=-1).values
        return (Pick(heavy), Keep(old, held.slots))

    def __str__(self) -> str:
        spec = f"heavy:{self.heavy}+window:{self.window}"
        return spec + (f",block={self.block}" if self.block != 64 else "")
