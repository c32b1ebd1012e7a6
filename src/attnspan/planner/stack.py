"""The stack of optimisations multiplied out: what each does, and to which quantity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnspan.planner.layers import token_bytes

if TYPE_CHECKING:
    from attnspan.planner.plan import Plan


@dataclass(frozen=True)
class Factor:
    """One optimisation, and what it does to one quantity: `before / after`."""

    name: str
    quantity: str
    before: int
    after: int

    @property
    def ratio(self) -> float:
        return self.before / self.after if self.after else float("inf")


CACHE, WORKING = "KV cache", "attention's working memory"


def stack(plan: Plan) -> tuple[Factor, ...]:
    """From keys and values of every query head for every token in bf16, to what is held.

    The cache's factors follow each other: the product of their ratios is the ratio of the first
    `before` to the last `after`. A factor of 1 is left out. Flash attention's is of another
    quantity, and isn't multiplied with them.
    """
    spec, tokens = plan.spec, plan.context * plan.batch
    every = 2 * spec.heads * spec.head_dim * 2 * tokens * spec.layers
    dense, stored = token_bytes(spec, "dense"), token_bytes(spec, plan.storage)
    owners = sum(kind.layers for kind in plan.kinds if kind.held)
    held = plan.batch * sum(kind.layers * kind.held for kind in plan.kinds)
    name = (
        "latents instead of keys and values"
        if spec.latent is not None
        else f"{spec.kv_heads} KV heads for {spec.heads} query heads"
    )
    steps = [
        (name, spec.layers * tokens * dense),
        (f"{owners} of {spec.layers} layers have keys of their own", owners * tokens * dense),
        ("what the layers keep of the tokens", held * dense),
        (f"{plan.storage} instead of bf16", held * stored),
        (f"as {plan.engine} allocates it", plan.cache.total),
    ]
    factors, before = [], every
    for step, after in steps:
        if after != before:
            factors.append(Factor(step, CACHE, before, after))
        before = after
    working = plan.working
    factors.append(
        Factor("flash instead of standard attention", WORKING, working.standard, working.flash)
    )
    return tuple(factors)


def product(factors: tuple[Factor, ...]) -> float:
    """Of the cache's factors."""
    of_cache = [each for each in factors if each.quantity == CACHE]
    return of_cache[0].before / of_cache[-1].after if of_cache else 1.0
