"""What a search may choose from: families of policies, budgets, storages, parts of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from attnspan.cache import Dense, Int4, Int8, Storage
from attnspan.evaluation.layers import grouped
from attnspan.policies import (
    Compressive,
    HeavyHitter,
    KeepAll,
    PerHead,
    PerLayer,
    Policy,
    SinkWindow,
    SnapKV,
    Window,
)

SINKS = 4
"""Tokens kept at the start, as in StreamingLLM (https://arxiv.org/abs/2309.17453)."""

LEAST_BUDGET = 8

BUDGETS = tuple(map(Fraction, ("3/4", "5/8", "1/2", "3/8", "1/4", "3/16", "1/8", "1/16", "1/32")))
"""Of a layer, in parts of all tokens."""

HEAD_GROUPS = 4
"""KV heads of a layer go in so many groups at most."""

STORAGES: Mapping[str, Storage] = {str(each): each for each in (Dense(), Int8(), Int4())}


def _block(budget: int) -> int:
    """Tokens between two decisions of a policy that takes time to decide: they count as held."""
    return max(1, min(64, budget // 8))


def _heavy(budget: int) -> Policy:
    block = _block(budget)
    both = budget - block + 1
    return HeavyHitter(both // 2, both - both // 2, block)


def _compressive(budget: int, rate: int = 4) -> Policy:
    block = _block(budget)
    both = budget - SINKS - (rate - 1) + 1 - block
    memory = max(1, both // 4)
    return Compressive(both - memory, memory, rate, sinks=SINKS, block=block)


def _snap(budget: int) -> Policy:
    block = _block(budget)
    both = budget - block + 1
    window = max(1, both // 4)
    return SnapKV(both - window, window, observed=min(16, block), block=block)


FAMILIES: Mapping[str, Callable[[int], Policy]] = {
    "sinks": lambda budget: SinkWindow(SINKS, budget - SINKS),
    "window": Window,
    "heavy": _heavy,
    "compressive": _compressive,
    "snap": _snap,
}
"""A family is a line: the policy that holds up to `budget` tokens, an unfinished block included. It
raises ValueError where that is too few for it."""


@dataclass(frozen=True)
class Choice:
    """A policy and a storage: a cache."""

    policy: Policy | PerLayer
    storage: Storage

    def __str__(self) -> str:
        return f"{self.policy} {self.storage}"


@dataclass(frozen=True)
class Space:
    """What may be chosen for a model.

    Attributes:
        windows: of each layer, as it was trained; None: it sees everything.
        kv_heads: of each layer.
        length: tokens of a passage.
        families: names of `FAMILIES`.
        storages: how keys and values may be held.
        retrieving: of each layer, which KV heads retrieve (`evaluation.heads`); empty: unknown.
    """

    windows: tuple[int | None, ...]
    kv_heads: tuple[int, ...]
    length: int
    families: tuple[str, ...] = tuple(FAMILIES)
    storages: tuple[Storage, ...] = tuple(STORAGES.values())
    retrieving: tuple[tuple[bool, ...], ...] = ()

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The layers that budgets are for, neighbours of deep models together.

        In a hybrid model they are those without a window; the others keep theirs.
        """
        hybrid = None in self.windows
        free = [i for i, window in enumerate(self.windows) if window is None or not hybrid]
        return grouped(free)

    @property
    def top(self) -> int:
        """The most tokens that a budget may be: no layer sees more of a passage."""
        own = [window for window in self.windows if window is not None]
        return min(self.length, *own) if len(own) == len(self.windows) else self.length

    @property
    def whole(self) -> Policy:
        """What loses nothing on a passage: a window of it all, where the model has none itself."""
        return FAMILIES["sinks"](self.top) if self.top == self.length else KeepAll()

    @property
    def budgets(self) -> tuple[int, ...]:
        """From the largest down, all less than `top`."""
        sizes = {int(self.top * part) for part in BUDGETS}
        return tuple(sorted((size for size in sizes if size >= LEAST_BUDGET), reverse=True))

    @property
    def few_budgets(self) -> tuple[int, ...]:
        """Every other one of many `budgets`, for what is asked of each part of a model."""
        return self.budgets if len(self.budgets) < 6 else self.budgets[1::2]

    def member(self, family: str, budget: int) -> Policy | None:
        """The family's policy of so many tokens; None where that is too few for it."""
        try:
            return FAMILIES[family](budget)
        except ValueError:
            return None

    def beside(self, policy: Policy) -> list[Policy]:
        """The same family's policies of the next smaller budget and of the next larger one.

        Of heads with policies of their own, those that are alike change together.
        """
        if isinstance(policy, PerHead):
            found = []
            for each in dict.fromkeys(policy.policies):
                for other in self.beside(each):
                    heads = tuple(other if p == each else p for p in policy.policies)
                    found.append(heads[0] if len(set(heads)) == 1 else PerHead(heads))
            return found
        family = next((f for f in self.families if type(FAMILIES[f](self.top)) is type(policy)), "")
        if policy == self.whole:
            family = family or self.families[0]
        size = self.top if policy.capacity is None else policy.capacity
        less = [budget for budget in self.budgets if budget < size][:1]
        more = [budget for budget in self.budgets if budget > size][-1:]
        sizes = less + more if family else []
        found = [each for size in sizes if (each := self.member(family, size)) is not None]
        return found + ([self.whole] if not more and policy != self.whole else [])

    def policy(self, chosen: Sequence[Policy]) -> Policy | PerLayer:
        """One policy for each group, as the model takes them."""
        layers: list[Policy] = [KeepAll()] * len(self.windows)
        for group, policy in zip(self.groups, chosen, strict=True):
            for layer in group:
                layers[layer] = policy
        if len(set(chosen)) == 1:
            return chosen[0]
        return PerLayer(tuple(layers))

    def alone(self, group: int, policy: Policy) -> Policy | PerLayer:
        """`policy` for one group, all others whole."""
        return self.policy([policy if i == group else self.whole for i in range(len(self.groups))])

    def heads(self, group: int) -> tuple[tuple[int, ...], ...]:
        """A group's KV heads, in as many groups as may be told apart; one: they aren't."""
        counts = {self.kv_heads[layer] for layer in self.groups[group]}
        if len(counts) > 1:
            return ((0,),)
        return grouped(range(counts.pop()), HEAD_GROUPS)

    def retrieval(self, small: Policy) -> Policy | PerLayer | None:
        """`small` but for the KV heads that retrieve, which are whole; None where none is apart."""
        if len({any(heads) for heads in self.retrieving}) < 2 and not any(
            len(set(heads)) > 1 for heads in self.retrieving
        ):
            return None
        chosen = []
        for group, layers in enumerate(self.groups):
            far = [
                any(self.retrieving[layer][head] for layer in layers for head in heads)
                for heads in self.heads(group)
            ]
            chosen.append(self.by_head(group, [self.whole if yes else small for yes in far]))
        return self.policy(chosen)

    def by_head(self, group: int, chosen: Sequence[Policy]) -> Policy:
        """A policy of one for each group of the heads."""
        if len(set(chosen)) == 1:
            return chosen[0]
        return PerHead(
            tuple(
                policy
                for heads, policy in zip(self.heads(group), chosen, strict=True)
                for _ in heads
            )
        )
