"""When each token of a stream was pooled, and when it left the cache.

A policy with a closed form needs no watching. The others decide in the open: `Watched` passes each
question on and tells `Lives` the answer, which moves its own list of tokens just so. Caches know
nothing of it, and cost what they do without.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from attnspan.policies.base import Band, Decision, Held, Keep, Pick, Policy, Pool


@dataclass(eq=False)  # so that policies with it can be compared and hashed, as all can
class Lives:
    """The lives of the tokens in one KV head, which are decided upon every `block` tokens.

    Attributes:
        head: the KV head.
        left: for each token the count of tokens seen when it left; 0: it is held.
        pooled: likewise when it went into a slot with others; 0: it never did.
        changed: the tokens for which one of the two has changed, oldest change first, until `news`
            is asked.
        slots: the tokens in each slot held, oldest slot first, of a policy that is watched.
    """

    head: int = 0
    left: array[int] = field(default_factory=lambda: array("I"))
    pooled: array[int] = field(default_factory=lambda: array("I"))
    changed: dict[int, None] = field(default_factory=dict)
    slots: list[tuple[int, ...]] = field(default_factory=list)
    _next: int = 0  # the first token that may leave next, of a policy with a closed form

    def grow(self, seen: int) -> None:
        """Tokens came in, `seen` of them by now."""
        old = self._extend(seen)
        self.slots.extend((i,) for i in range(old, seen))

    def _extend(self, seen: int) -> int:
        old = len(self.left)
        self.left.extend([0] * (seen - old))
        self.pooled.extend([0] * (seen - old))
        return old

    def news(self) -> list[tuple[int, int, int]]:
        """Each token that has changed since the last call, its `left` and its `pooled`."""
        told = [(token, self.left[token], self.pooled[token]) for token in self.changed]
        self.changed = {}
        return told

    def move(self, held: Held, decision: Decision) -> None:
        """Tokens came in up to `held.slots` slots, and then the policy decided.

        >>> lives = Lives()
        >>> lives.move(Held(4), (Keep(0, 1), Pool(1, 1, 2, "mean"), Keep(3, 4)))
        >>> lives.slots, list(lives.pooled)
        ([(0,), (1, 2), (3,)], [0, 4, 4, 0])
        >>> lives.move(Held(5), (Keep(0, 1), Keep(2, 5)))
        >>> lives.slots, list(lives.left)
        ([(0,), (3,), (4,), (5,)], [0, 6, 6, 0, 0, 0])
        """
        self.grow(len(self.left) + held.slots - len(self.slots))
        seen, old = len(self.left), self.slots
        kept: list[tuple[int, ...]] = []
        for move in decision:
            match move:
                case Keep(start, stop):
                    kept += old[start:stop]
                case Pick(index):
                    kept += [old[slot] for slot in index[0, self.head].tolist()]
                case Pool(start, groups, rate):
                    for first in range(start, start + groups * rate, rate):
                        group = sum(old[first : first + rate], ())
                        kept.append(group)
                        if rate > 1:
                            for token in group:
                                self.pooled[token] = self.pooled[token] or seen
                                self.changed[token] = None
        staying = {token for slot in kept for token in slot}
        for slot in old:
            for token in slot:
                if token not in staying:
                    self.left[token] = seen
                    self.changed[token] = None
        self.slots = kept

    def roll(self, band: Band, block: int, seen: int) -> None:
        """Tokens came in, `seen` of them by now, to a policy that keeps the first and the last.

        >>> lives = Lives()
        >>> lives.roll(Band(sinks=1, window=3), 1, 8)  # the query at 5 sees 0, 3, 4 and itself
        >>> list(lives.left)
        [0, 4, 5, 6, 7, 8, 0, 0]
        >>> lives = Lives()
        >>> lives.roll(Band(sinks=0, window=3), 4, 8)  # decided at 4 and 8, which keep two tokens
        >>> list(lives.left)
        [4, 4, 8, 8, 8, 8, 0, 0]
        """
        self._extend(seen)
        if band.window is None:
            return
        self._next = max(self._next, band.sinks)
        while (end := -(-(self._next + band.window) // block) * block) <= seen:
            self.left[self._next] = end
            self.changed[self._next] = None
            self._next += 1


@dataclass(frozen=True)
class Watched(Policy):
    """`policy`, whose decisions `lives` is told of."""

    policy: Policy
    lives: Lives

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.policy.block

    @property
    def needs_scores(self) -> bool:
        return self.policy.needs_scores

    @property
    def observed(self) -> int | None:
        return self.policy.observed

    @property
    def leading(self) -> int:
        return self.policy.leading

    @property
    def capacity(self) -> int | None:
        return self.policy.capacity

    def decide(self, held: Held) -> Decision:
        decision = self.policy.decide(held)
        self.lives.move(held, decision)
        return decision

    def __str__(self) -> str:
        return str(self.policy)
