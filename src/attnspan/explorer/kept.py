"""Which tokens a policy keeps, token by token, under attention that is made up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnspan.policies import PerHead, PerLayer, Policy, parse
from attnspan.policies.base import Held, Keep, Pick, Pool

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_TOKENS = 512
HEAVY = 7
"""Every seventh token from the fifth on is attended to much, as are the first: made up."""


@dataclass(frozen=True)
class Kept:
    """What the cache holds while each token is the newest.

    Attributes:
        policy: its SPEC.
        held: int8 `(tokens, tokens)`, a row for each newest token and a column for each token:
            1 where it has a slot of its own, 2 where it shares a pooled one, 0 where it is gone.
        slots: how many slots are held then.
        scored: whether the policy decided by attention, which is made up.
    """

    policy: str
    held: NDArray[Any]
    slots: tuple[int, ...]
    scored: bool


def kept(policy: str, tokens: int) -> Kept:
    """Runs the policy's own decisions over so many tokens of one KV head.

    Raises:
        ValueError: the SPEC is none, or of several layers; or there are more than 512 tokens.

    >>> kept("sinks:1+window:2", 4).held.tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    """
    import numpy as np

    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"tokens is {tokens}; 1 to {MOST_TOKENS} are drawn")
    parsed = parse(policy)
    if isinstance(parsed, (PerLayer, PerHead)):
        parts = "layers" if isinstance(parsed, PerLayer) else "heads"
        raise ValueError(f"policy {policy!r} has several {parts}; that of one is drawn")
    held, counts = np.zeros((tokens, tokens), np.int8), []
    slots: list[_Slot] = []
    for newest in range(tokens):
        slots.append(_Slot((newest,)))
        for slot in slots:
            held[newest, list(slot.tokens)] = 2 if slot.pooled else 1
            slot.received.append(_attention(slot.tokens, newest))
        counts.append(len(slots))
        if (newest + 1) % parsed.block == 0:
            slots = _decide(parsed, slots)
    return Kept(str(parsed), held, tuple(counts), parsed.needs_scores)


@dataclass
class _Slot:
    tokens: tuple[int, ...]
    pooled: bool = False
    received: list[float] = field(default_factory=list)


def _attention(tokens: tuple[int, ...], newest: int) -> float:
    """What a query gives a slot, up to a factor: some tokens get much, all others by nearness."""
    heavy = sum(token == 0 or token % HEAVY == 5 for token in tokens)
    return heavy + 1 / (2 + newest - tokens[-1])


def _decide(policy: Policy, slots: list[_Slot]) -> list[_Slot]:
    scores = None
    if policy.needs_scores:
        import torch

        latest = slice(None if policy.observed is None else -policy.observed, None)
        received = [sum(slot.received[latest]) for slot in slots]
        scores = torch.tensor([[received]], dtype=torch.float32)
    memory = sum(slot.pooled for slot in slots)
    stays: list[_Slot] = []
    for part in policy.decide(Held(len(slots), memory, scores)):
        match part:
            case Keep(start, stop):
                stays += slots[start:stop]
            case Pick(index):
                stays += [slots[place] for place in index[0, 0].tolist()]
            case Pool(start, groups, rate, _):
                for first in range(start, start + groups * rate, rate):
                    group = slots[first : first + rate]
                    stays.append(_Slot(tuple(t for slot in group for t in slot.tokens), True))
    return stays
