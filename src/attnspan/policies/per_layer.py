"""A policy for each layer, for budgets that differ with depth."""

from __future__ import annotations

from dataclasses import dataclass

from attnspan.policies.base import Policy


@dataclass(frozen=True)
class PerLayer:
    """One policy for each layer of the model, the first layer's first.

    In a hybrid model the entries of sliding layers are not used: those keep the model's own band.
    SPEC: `layers(window:512; sinks:4+window:252; ...)`.
    """

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))
        if not self.policies or not all(isinstance(p, Policy) for p in self.policies):
            raise ValueError(
                f"layers: policies is {self.policies!r}; one policy for each layer is allowed"
            )

    def __str__(self) -> str:
        return f"layers({'; '.join(str(p) for p in self.policies)})"
