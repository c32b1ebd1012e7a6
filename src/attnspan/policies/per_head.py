"""A policy for each KV head: retrieval heads kept full and others streaming, as in DuoAttention
(https://arxiv.org/abs/2410.10819)."""

from __future__ import annotations

from dataclasses import dataclass, field

from attnspan.policies.base import Decision, Held, Policy


@dataclass(frozen=True)
class PerHead(Policy):
    """One policy for each KV head of a layer, the first head's first.

    The query heads that share a KV head go with it. Heads that are alike share their slots, and
    those that differ hold more or fewer, each in memory of its own. Which heads look far back can
    be measured: `attnspan doctor` names retrieval heads.
    SPEC: `heads(keep-all; sinks:4+window:60)`, also inside `layers(...)`.
    """

    policies: tuple[Policy, ...]
    block: int = field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))
        if not self.policies or not all(
            isinstance(p, Policy) and not isinstance(p, PerHead) for p in self.policies
        ):
            raise ValueError(
                f"heads: policies is {self.policies!r}; one policy for each KV head is allowed"
            )

    def of_heads(self, count: int) -> tuple[Policy, ...]:
        """Each head's own.

        Raises:
            ValueError: a layer has another number of KV heads.
        """
        if count != len(self.policies):
            raise ValueError(
                f"policy {self} has {len(self.policies)} heads; the layer's {count} KV heads are "
                "allowed"
            )
        return self.policies

    @property
    def needs_scores(self) -> bool:
        return any(policy.needs_scores for policy in self.policies)

    @property
    def capacity(self) -> int | None:
        """That of the head with the most."""
        most = [policy.capacity for policy in self.policies]
        return None if None in most else max(c for c in most if c is not None)

    def decide(self, held: Held) -> Decision:
        raise TypeError(f"policy {self} has slots of its own for each head; their policies decide")

    def __str__(self) -> str:
        return f"heads({'; '.join(str(p) for p in self.policies)})"
