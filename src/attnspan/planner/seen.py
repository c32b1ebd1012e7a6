"""What queries see and what must be held for them, in closed form.

A `View` stands for one layer: a policy's cache as our streams fill it, a window of the model, or a
pattern. Nothing here loads numpy, but for patterns without a formula of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnspan.policies.base import Policy
from attnspan.policies.compressive import Compressive
from attnspan.policies.heavy_hitter import HeavyHitter
from attnspan.policies.keep_all import KeepAll
from attnspan.policies.per_head import PerHead
from attnspan.policies.sink_window import SinkWindow
from attnspan.policies.snap_kv import SnapKV
from attnspan.policies.window import Window

if TYPE_CHECKING:
    from attnspan.patterns.algebra import Pattern


class View(ABC):
    """What a layer's queries see of a stream. Final subclasses are frozen dataclasses."""

    @abstractmethod
    def read(self, n: int) -> int:
        """Keys that the query of token `n - 1` sees, its own included: what decoding it reads."""

    @abstractmethod
    def pairs(self, n: int) -> int:
        """Pairs of a query and a key that it sees, over a prefill of `n` tokens."""

    @abstractmethod
    def hold(self, n: int) -> int:
        """Slots that a cache needs at most while `n` tokens go by."""

    def decodes(self, n: int) -> bool:
        """Whether no query of `n` sees a later key."""
        return True


@dataclass(frozen=True)
class Capped(View):
    """At each grid point `min(tokens, kept)` slots stay, and every token since is held.

    `block` tokens lie between two grid points. With `block` 1 a query sees `min(i + 1, kept + 1)`
    keys: `kept` is W - 1 for a window of W, S + W - 1 with S sinks, H + W - 1 with H heavy hitters
    and W + G - 1 for a causal Longformer; None keeps all.

    >>> Capped(None).pairs(100_000), Capped(4095).pairs(100_000)
    (5000050000, 401213440)
    """

    kept: int | None
    block: int = 1

    def read(self, n: int) -> int:
        if self.kept is None:
            return n
        last = (n - 1) // self.block * self.block
        return min(last, self.kept) + n - last

    def pairs(self, n: int) -> int:
        """`sum of min(g, kept) + i - g + 1` over the queries i, g the grid point before i."""
        if self.kept is None:
            return _up_to(n)
        b, kept = self.block, self.kept
        blocks, rest = divmod(n, b)
        rising = min(blocks, kept // b + 1)  # grid points that keep all
        stay = b * rising * (rising - 1) // 2 + (blocks - rising) * kept
        since = blocks * _up_to(b) + _up_to(rest)
        return b * stay + rest * min(blocks * b, kept) + since

    def hold(self, n: int) -> int:
        return n if self.kept is None else min(n, self.kept + self.block)


@dataclass(frozen=True)
class Pooled(View):
    """Sinks, a memory of pooled slots and a window: `attnspan.Compressive`.

    After g tokens, a grid point, `G = (g - sinks - window + 1) // rate` groups have been pooled.
    Held are `min(g, sinks) + min(memory, G)` slots and the tokens that no group took.
    """

    policy: Compressive

    def _kept(self, g: int) -> int:
        p = self.policy
        groups = max(0, g - p.sinks - p.window + 1) // p.rate
        return g - groups * p.rate + min(p.memory, groups)

    def read(self, n: int) -> int:
        last = (n - 1) // self.policy.block * self.policy.block
        return self._kept(last) + n - last

    def pairs(self, n: int) -> int:
        p = self.policy
        b = p.block
        blocks, rest = divmod(n, b)
        # The first grid point that has pooled, and the first whose memory is full.
        start = p.sinks + p.window - 1
        first = min(blocks, -(-(start + p.rate) // b))
        full = min(blocks, max(first, -(-(start + p.rate * p.memory) // b)))

        def groups(k: int) -> int:
            """Of the grid points from `first` to `k`, all their groups."""
            low = first * b - start
            return _floors(k - first, p.rate, b, low) if k > first else 0

        stay = b * blocks * (blocks - 1) // 2 - p.rate * groups(blocks)
        stay += groups(full) + (blocks - full) * p.memory
        since = blocks * _up_to(b) + _up_to(rest)
        return b * stay + rest * self._kept(blocks * b) + since

    def hold(self, n: int) -> int:
        return min(n, self.policy.capacity)


@dataclass(frozen=True)
class Chunks(View):
    """Blocks of `block` tokens, counted from token 0, and with `before` also the one before.

    Once a block is full its keys are of use to no one (with `before`, after the next), so a cache
    needs one block's slots (two).

    >>> Chunks(4).pairs(10), Chunks(4).read(10), Chunks(4, before=True).read(10)
    (23, 2, 6)
    """

    block: int
    before: bool = False

    def read(self, n: int) -> int:
        whole, rest = divmod(n - 1, self.block)
        return rest + 1 + (self.block if self.before and whole else 0)

    def pairs(self, n: int) -> int:
        whole, rest = divmod(n, self.block)
        inside = whole * _up_to(self.block) + _up_to(rest)
        return inside + (max(0, n - self.block) * self.block if self.before else 0)

    def hold(self, n: int) -> int:
        return min(n, self.block * (2 if self.before else 1))


@dataclass(frozen=True)
class Strides(View):
    """The last `window` keys, and before them those whose distance is a multiple of `stride`.

    A query reads about `window + n / stride` keys. Distances count from the query, so `stride`
    queries in a row read every key between them: a cache can drop none.

    >>> Strides(2, 3).read(10), Strides(2, 3).pairs(4), Strides(2, 3).hold(10)
    (5, 8, 10)
    """

    window: int
    stride: int

    def _far(self, n: int) -> tuple[int, int]:
        """The first and the last multiple of the stride, in strides, beyond the window."""
        return -(-self.window // self.stride), (n - 1) // self.stride

    def read(self, n: int) -> int:
        first, last = self._far(n)
        return min(n, self.window) + max(0, last - first + 1)

    def pairs(self, n: int) -> int:
        first, last = self._far(n)
        far = max(0, last - first + 1)
        # n - d queries have a key at distance d.
        strides = far * n - self.stride * (first + last) * far // 2
        return Capped(self.window - 1).pairs(n) + strides

    def hold(self, n: int) -> int:
        return n


@dataclass(frozen=True)
class Counted(View):
    """Any pattern, counted: in closed form where there is one, else query by query."""

    pattern: Pattern

    def read(self, n: int) -> int:
        from attnspan.patterns import pairs

        return pairs(self.pattern, 1, n)

    def pairs(self, n: int) -> int:
        from attnspan.patterns import pairs
        from attnspan.planner.forms import work

        try:
            found = work(self.pattern, n, 1, "contiguous")
        except ValueError:
            return pairs(self.pattern, n)
        return found.total if found.exact else pairs(self.pattern, n)

    def hold(self, n: int) -> int:
        """At most: a union holds what its sides hold, an intersection what the lesser does."""
        return _hold(self.pattern, n)

    def decodes(self, n: int) -> bool:
        from attnspan.patterns import Causal, pairs
        from attnspan.planner.forms import sees_ahead

        try:
            return n == 1 or not sees_ahead(self.pattern)
        except ValueError:
            return pairs(self.pattern & ~Causal(), n) == 0


CAUSAL = Capped(None)


def of_policy(policy: Policy) -> View:
    """As our streams follow it: a query sees what the last grid point kept and all tokens since.

    >>> of_policy(SinkWindow(4, 1020)).read(10_000), of_policy(HeavyHitter(8, 8)).read(130)
    (1024, 17)
    """
    match policy:
        case KeepAll():
            return CAUSAL
        case Window(window, block):
            return Capped(window - 1, block)
        case SinkWindow(sinks, window, block):
            return Capped(sinks + window - 1, block)
        case HeavyHitter(heavy, window, block) | SnapKV(heavy, window, block=block):
            return Capped(heavy + window - 1, block)
        case Compressive():
            return Pooled(policy)
        case PerHead():
            raise ValueError(
                f"policy {policy}: what heads with policies of their own read isn't planned; "
                "attnspan.planner.engines.cache_bytes counts what they hold"
            )
    raise ValueError(f"policy {policy} is not one whose cost the planner knows")


def of_window(window: int | None, chunked: bool = False) -> View:
    """A layer of the model itself: causal, a window, or chunks."""
    if window is None:
        return CAUSAL
    return Chunks(window) if chunked else Capped(window - 1)


def of_pattern(pattern: Pattern) -> View:
    """A layer whose pattern a user chose."""
    from attnspan.patterns.library import Blockwise, Causal, Longformer, SlidingWindow, Strided

    match pattern:
        case Causal():
            return CAUSAL
        case SlidingWindow(window, True, 1, 0):
            return Capped(window - 1)
        case Longformer(window, tokens, 0) if isinstance(tokens, int):
            return Capped(window + tokens - 1)
        case Blockwise(block, before, True):
            return Chunks(block, before)
        case Strided(window, stride):
            return Strides(window, stride)
    return Counted(pattern)


def _up_to(n: int) -> int:
    return n * (n + 1) // 2


def _floors(n: int, m: int, a: int, b: int) -> int:
    """The sum of `(a * k + b) // m` over k from 0 to n - 1, as Euclid would; all at least 0.

    >>> _floors(5, 3, 2, 1) == sum((2 * k + 1) // 3 for k in range(5))
    True
    """
    total = 0
    while n > 0:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b, a, m = top // m, top % m, m, a
    return total


def _hold(pattern: Pattern, n: int) -> int:
    from attnspan.patterns.algebra import And, Or
    from attnspan.patterns.library import GlobalTokens, Longformer, Sinks, SlidingWindow

    match pattern:
        case Or(left, right):
            return min(n, _hold(left, n) + _hold(right, n))
        case And(left, right):
            return min(_hold(left, n), _hold(right, n))
        case SlidingWindow(window, include, dilation):
            # Queries between the dilated keys need those that lie between.
            return min(n, (window if include else window + 1) * dilation - dilation + 1)
        case Sinks(sinks):
            return min(n, sinks)
        case GlobalTokens(tokens):
            return min(n, _globals(tokens, 0))
        case Longformer(window, tokens):
            return min(n, _globals(tokens, window))
        case _:
            view = of_pattern(pattern)
            return n if isinstance(view, Counted) else view.hold(n)


def _globals(tokens: int | tuple[int, ...], window: int) -> int:
    """The last global token's query sees all before it; after that a window and they are held."""
    if isinstance(tokens, int):
        return window + tokens
    return max(window + len(tokens), tokens[-1] + 1 if tokens else 0)
