"""What the last query looked at: TOVA (https://arxiv.org/abs/2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass

from attnspan.policies.base import Decision, Held, Keep, Pick, Policy, check_count


@dataclass(frozen=True)
class Tova(Policy):
    """The `tokens` that the last query paid most attention to stay, its own included.

    The attention is summed over the heads of the layer, which all keep the same tokens. None is
    safe: neither the first nor the latest. The paper decides at every token (`block=1`); a larger
    block asks the last query of each block, and holds up to `block - 1` tokens more.
    SPEC: `tova:512`, `tova:512,block=1`.
    """

    tokens: int
    block: int = 64

    def __post_init__(self) -> None:
        check_count("tova", "tokens", self.tokens, 2)
        check_count("tova", "block", self.block, 1)

    @property
    def needs_scores(self) -> bool:
        return True

    @property
    def observed(self) -> int:
        return 1

    @property
    def capacity(self) -> int:
        return self.tokens - 1 + self.block

    def decide(self, held: Held) -> Decision:
        kept = self.tokens - 1
        if held.slots <= kept:
            return (Keep(0, held.slots),)
        assert held.scores is not None, "the cache gives scores to a policy that asks for them"
        order = held.scores.sum(1, keepdim=True).argsort(dim=-1, descending=True, stable=True)
        index = order[..., :kept].sort(dim=-1).values
        return (Pick(index.expand(-1, held.scores.shape[1], -1)),)

    def __str__(self) -> str:
        return f"tova:{self.tokens}" + (f",block={self.block}" if self.block != 64 else "")
