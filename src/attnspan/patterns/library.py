"""The patterns that have a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from attnspan.patterns.algebra import Cover, Pattern


@final
@dataclass(frozen=True, repr=False)
class Full(Pattern):
    """Every query sees every key."""

    def sees(self, i: Any, j: Any) -> Any:
        return (i == i) & (j == j)

    def cover(self, queries: range, keys: range) -> Cover:
        return "full"

    def __str__(self) -> str:
        return "Full()"


@final
@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    """A query sees itself and all before it: `j <= i`."""

    def sees(self, i: Any, j: Any) -> Any:
        return j <= i

    def cover(self, queries: range, keys: range) -> Cover:
        if keys[-1] <= queries[0]:
            return "full"
        return "partial" if keys[0] <= queries[-1] else "empty"

    def __str__(self) -> str:
        return "Causal()"


@final
@dataclass(frozen=True, repr=False)
class SlidingWindow(Pattern):
    """A query sees the `window` nearest keys up to itself: `0 <= i - j < window`.

    This is Hugging Face's `sliding_window=W`, FlashAttention's `window_size=(W-1, 0)`, FlashInfer's
    `window_left=W-1` and cuDNN's `left_bound=W`. With `include_self=False` the window ends before
    the token itself, `1 <= i - j <= window`, as in `K[max(0, i-W):i]`; the first query then sees
    nothing.

    >>> [j for j in range(10) if SlidingWindow(3).sees(7, j)]
    [5, 6, 7]
    >>> [j for j in range(10) if SlidingWindow(3, include_self=False).sees(7, j)]
    [4, 5, 6]

    Raises:
        ValueError: `window` is not a whole number of at least 1.
        TypeError: `include_self` is not a bool.
    """

    window: int
    include_self: bool = True

    def __post_init__(self) -> None:
        _check_count("SlidingWindow", "window", self.window, 1)
        if not isinstance(self.include_self, bool):
            raise TypeError(
                f"SlidingWindow: include_self is {self.include_self!r}; True or False is allowed"
            )

    @property
    def nearest(self) -> int:
        """The least distance `i - j` that is seen; the greatest is `nearest + window - 1`."""
        return 0 if self.include_self else 1

    def sees(self, i: Any, j: Any) -> Any:
        distance = i - j
        return (distance >= self.nearest) & (distance < self.nearest + self.window)

    def cover(self, queries: range, keys: range) -> Cover:
        least, most = queries[0] - keys[-1], queries[-1] - keys[0]
        end = self.nearest + self.window
        if least >= self.nearest and most < end:
            return "full"
        return "partial" if most >= self.nearest and least < end else "empty"

    def __str__(self) -> str:
        return f"SlidingWindow({self.window}{'' if self.include_self else ', include_self=False'})"


@final
@dataclass(frozen=True, repr=False)
class Sinks(Pattern):
    """A query sees the first `sinks` tokens, up to itself: `j < sinks` and `j <= i`.

    `SlidingWindow(4096) | Sinks(4)` is StreamingLLM's pattern (https://arxiv.org/abs/2309.17453)
    without its shift of positions.

    Raises:
        ValueError: `sinks` is not a whole number of at least 0.
    """

    sinks: int

    def __post_init__(self) -> None:
        _check_count("Sinks", "sinks", self.sinks, 0)

    def sees(self, i: Any, j: Any) -> Any:
        return (j < self.sinks) & (j <= i)

    def cover(self, queries: range, keys: range) -> Cover:
        if keys[-1] < self.sinks and keys[-1] <= queries[0]:
            return "full"
        return "partial" if keys[0] < self.sinks and keys[0] <= queries[-1] else "empty"

    def __str__(self) -> str:
        return f"Sinks({self.sinks})"


def _check_count(owner: str, name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{owner}: {name} is {value!r}; a whole number of at least {least} is allowed"
        )
