"""What the latest queries look at, with its neighbours: SnapKV (https://arxiv.org/abs/2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

from attnspan.policies.base import Decision, Held, Keep, Pick, Policy, check_count


@dataclass(frozen=True)
class SnapKV(Policy):
    """The `heavy` tokens that the latest queries look at and the last `window` stay, per KV head.

    At each grid point the attention of the last `observed` queries is summed, and of each token
    counts the most that it or one of its `neighbours` to either side received, so that what stays
    are spans rather than single tokens. Earlier attention doesn't count. The paper does so once, at
    the end of a prompt. `window` counts the query's own token.
    SPEC: `snap:448+window:64`, `snap:448+window:64,observed=32,neighbours=2,block=128`.
    """

    heavy: int
    window: int
    observed: int = 16  # pyright: ignore[reportIncompatibleMethodOverride]
    neighbours: int = 3
    block: int = 64

    def __post_init__(self) -> None:
        check_count("snap+window", "heavy", self.heavy, 1)
        check_count("snap+window", "window", self.window, 1)
        check_count("snap+window", "observed", self.observed, 1)
        check_count("snap+window", "neighbours", self.neighbours, 0)
        check_count("snap+window", "block", self.block, 1)
        if self.observed > self.block:
            raise ValueError(
                f"snap+window: observed is {self.observed}; at most block, {self.block}, is allowed"
            )

    @property
    def needs_scores(self) -> bool:
        return True

    @property
    def capacity(self) -> int:
        return self.heavy + self.window - 1 + self.block

    def decide(self, held: Held) -> Decision:
        old = held.slots - (self.window - 1)
        if old <= self.heavy:
            return (Keep(0, held.slots),)
        assert held.scores is not None, "the cache gives scores to a policy that asks for them"
        scores = held.scores[..., :old]
        most = scores.clone()
        for away in range(1, min(self.neighbours, old - 1) + 1):
            most[..., away:] = most[..., away:].maximum(scores[..., :-away])
            most[..., :-away] = most[..., :-away].maximum(scores[..., away:])
        order = most.argsort(dim=-1, descending=True, stable=True)
        return (Pick(order[..., : self.heavy].sort(dim=-1).values), Keep(old, held.slots))

    def __str__(self) -> str:
        spec = f"snap:{self.heavy}+window:{self.window}"
        for name, usual in (("observed", 16), ("neighbours", 3), ("block", 64)):
            if getattr(self, name) != usual:
                spec += f",{name}={getattr(self, name)}"
        return spec
