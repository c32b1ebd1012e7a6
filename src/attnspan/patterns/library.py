"""The patterns that have a name."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import index
from typing import Any, final

from attnspan.patterns.algebra import Pattern
from attnspan.patterns.atoms import ALL, Blocks, Distance, Keys, Queries, Segments, Stride

_CAUSAL = Distance(0)
# Positions and distances stay far from where 64 bits wrap around, sums of several included.
MOST = 2**48


@final
@dataclass(frozen=True, repr=False)
class Full(Pattern):
    """Every query sees every key."""

    def rule(self) -> Pattern:
        return ALL

    def __str__(self) -> str:
        return "Full()"


@final
@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    """A query sees itself and all before it: `j <= i`."""

    def rule(self) -> Pattern:
        return _CAUSAL

    def __str__(self) -> str:
        return "Causal()"


@final
@dataclass(frozen=True, repr=False)
class SlidingWindow(Pattern):
    """A query sees the `window` nearest keys up to itself: `0 <= i - j < window`.

    This is Hugging Face's `sliding_window=W`, FlashAttention's `window_size=(W-1, 0)`, FlashInfer's
    `window_left=W-1` and cuDNN's `left_bound=W` (`attnspan.patterns.conventions` converts). With
    `include_self=False` the window ends before the token itself, `1 <= i - j <= window`, as in
    `K[max(0, i-W):i]`; the first query then sees nothing. With `dilation=d` it takes every d-th
    key (Longformer, https://arxiv.org/abs/2004.05150), and with `right=r` also r keys after.

    >>> [j for j in range(10) if SlidingWindow(3).sees(7, j)]
    [5, 6, 7]
    >>> [j for j in range(10) if SlidingWindow(3, include_self=False).sees(7, j)]
    [4, 5, 6]
    >>> [j for j in range(10) if SlidingWindow(3, dilation=2, right=1).sees(7, j)]
    [3, 5, 7, 9]

    Raises:
        ValueError: `window` or `dilation` is not a whole number of at least 1, `right` not one of
            at least 0, or `right` is given where the token itself is left out.
        TypeError: `include_self` is not a bool.
    """

    window: int
    include_self: bool = True
    dilation: int = 1
    right: int = 0

    def __post_init__(self) -> None:
        _check_count("SlidingWindow", "window", self.window, 1)
        _check_bool("SlidingWindow", "include_self", self.include_self)
        _check_count("SlidingWindow", "dilation", self.dilation, 1)
        _check_count("SlidingWindow", "right", self.right, 0)
        for name, count in (("window", self.window), ("right", self.right)):
            _check_count("SlidingWindow", f"{name} times dilation", count * self.dilation, 0)
        if self.right and not self.include_self:
            raise ValueError(
                f"SlidingWindow: right is {self.right} with include_self=False; 0 is allowed"
            )

    def rule(self) -> Pattern:
        least = -self.right if self.include_self else 1
        end = self.window if self.include_self else self.window + 1
        if self.dilation == 1:
            return Distance(least, end)
        d = self.dilation
        return Stride(d) & Distance(least * d, (end - 1) * d + 1)

    def __str__(self) -> str:
        options = [] if self.include_self else ["include_self=False"]
        options += [] if self.dilation == 1 else [f"dilation={_text(self.dilation)}"]
        options += [] if not self.right else [f"right={_text(self.right)}"]
        return f"SlidingWindow({', '.join([_text(self.window), *options])})"


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

    def rule(self) -> Pattern:
        return _CAUSAL & Keys(((0, self.sinks),) if self.sinks else ())

    def __str__(self) -> str:
        return f"Sinks({_text(self.sinks)})"


@final
@dataclass(frozen=True, repr=False)
class Strided(Pattern):
    """A query sees the `window` nearest keys up to itself, and before it every `stride`-th one.

    `0 <= i - j` and (`i - j < window` or `(i - j) % stride == 0`): the strided pattern of Sparse
    Transformers (https://arxiv.org/abs/1904.10509), its two heads in one.

    >>> [j for j in range(10) if Strided(2, 3).sees(9, j)]
    [0, 3, 6, 8, 9]

    Raises:
        ValueError: `window` or `stride` is not a whole number of at least 1.
    """

    window: int
    stride: int

    def __post_init__(self) -> None:
        _check_count("Strided", "window", self.window, 1)
        _check_count("Strided", "stride", self.stride, 1)

    def rule(self) -> Pattern:
        return Distance(0, self.window) | (_CAUSAL & Stride(self.stride))

    def __str__(self) -> str:
        return f"Strided({_text(self.window)}, {_text(self.stride)})"


@final
@dataclass(frozen=True, repr=False)
class Blockwise(Pattern):
    """Tokens see each other within blocks of `block`, with `before` also the block before theirs.

    Block b holds the positions `b * block` to `(b + 1) * block - 1`. With `causal=False` a token
    sees its block's later tokens as well.

    >>> [j for j in range(12) if Blockwise(4, before=True).sees(9, j)]
    [4, 5, 6, 7, 8, 9]

    Raises:
        ValueError: `block` is not a whole number of at least 1.
        TypeError: `before` or `causal` is not a bool.
    """

    block: int
    before: bool = False
    causal: bool = True

    def __post_init__(self) -> None:
        _check_count("Blockwise", "block", self.block, 1)
        _check_bool("Blockwise", "before", self.before)
        _check_bool("Blockwise", "causal", self.causal)

    def rule(self) -> Pattern:
        return _causal_if(self.causal, Blocks(self.block, int(self.before)))

    def __str__(self) -> str:
        options = ["before=True"] if self.before else []
        options += [] if self.causal else ["causal=False"]
        return f"Blockwise({', '.join([_text(self.block), *options])})"


@final
@dataclass(frozen=True, repr=False)
class GlobalTokens(Pattern):
    """Some tokens are seen by all, and see all: the first `tokens`, or those at given positions.

    Causal, it lets nobody see the future: a global token sees all before it, and is seen by all
    after it.

    >>> [j for j in range(6) if GlobalTokens((1, 4)).sees(5, j)]
    [1, 4]
    >>> [j for j in range(6) if GlobalTokens((1, 4)).sees(4, j)]
    [0, 1, 2, 3, 4]

    Raises:
        ValueError: `tokens` is neither a whole number of at least 0 nor a rising tuple of such.
        TypeError: `causal` is not a bool.
    """

    tokens: int | tuple[int, ...]
    causal: bool = True

    def __post_init__(self) -> None:
        _check_tokens("GlobalTokens", "tokens", self.tokens)
        _check_bool("GlobalTokens", "causal", self.causal)

    def rule(self) -> Pattern:
        return _causal_if(self.causal, _globals(self.tokens))

    def __str__(self) -> str:
        return f"GlobalTokens({_text(self.tokens)}{'' if self.causal else ', causal=False'})"


@final
@dataclass(frozen=True, repr=False)
class Longformer(Pattern):
    """A sliding window and global tokens: `SlidingWindow(window) | GlobalTokens(global_tokens)`.

    With `right=0` it is causal. With `right=r` the window reaches r keys to the right and global
    tokens see, and are seen by, all others, as in the paper (https://arxiv.org/abs/2004.05150),
    whose window of w is `Longformer(w // 2 + 1, ..., right=w // 2)`.

    Raises:
        ValueError: as in `SlidingWindow` and `GlobalTokens`.
    """

    window: int
    global_tokens: int | tuple[int, ...]
    right: int = 0

    def __post_init__(self) -> None:
        _check_count("Longformer", "window", self.window, 1)
        _check_tokens("Longformer", "global_tokens", self.global_tokens)
        _check_count("Longformer", "right", self.right, 0)

    def rule(self) -> Pattern:
        window = Distance(-self.right, self.window)
        return window | _causal_if(not self.right, _globals(self.global_tokens))

    def __str__(self) -> str:
        right = f", right={_text(self.right)}" if self.right else ""
        return f"Longformer({_text(self.window)}, {_text(self.global_tokens)}{right})"


@final
@dataclass(frozen=True, repr=False)
class Documents(Pattern):
    """Documents packed one after the other: tokens see those of their own document alone.

    `lengths` are the documents' tokens, in order. Positions past the last document see none and
    are seen by none, so padding at the end needs no document. Sinks, globals and blocks count from
    the start of the whole sequence, not of a document.

    >>> [j for j in range(8) if Documents((3, 5)).sees(5, j)]
    [3, 4, 5]

    Raises:
        ValueError: `lengths` is not a tuple of at least one whole number of at least 1.
        TypeError: `causal` is not a bool.
    """

    lengths: tuple[int, ...]
    causal: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.lengths, tuple) or not self.lengths:
            raise ValueError(
                f"Documents: lengths is {self.lengths!r}; a tuple of at least one length is allowed"
            )
        for length in self.lengths:
            _check_count("Documents", "a length", length, 1)
        _check_count("Documents", "the sum of lengths", sum(self.lengths), 1)
        _check_bool("Documents", "causal", self.causal)

    def rule(self) -> Pattern:
        return _causal_if(self.causal, Segments((0, *accumulate(self.lengths))))

    def __str__(self) -> str:
        return f"Documents({_text(self.lengths)}{'' if self.causal else ', causal=False'})"


def _text(value: int | tuple[int, ...]) -> str:
    """As `str`; under torch.compile `index` makes a number that may change a constant, guarded."""
    if isinstance(value, tuple):
        inside = ", ".join([str(index(x)) for x in value])
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return str(index(value))


def _causal_if(causal: bool, rule: Pattern) -> Pattern:
    return _CAUSAL & rule if causal else rule


def _globals(tokens: int | tuple[int, ...]) -> Pattern:
    if isinstance(tokens, int):
        ranges = [(0, tokens)] if tokens else []
    else:
        ranges = []
        for token in tokens:
            if ranges and ranges[-1][1] == token:
                ranges[-1] = (ranges[-1][0], token + 1)
            else:
                ranges.append((token, token + 1))
    return Keys(tuple(ranges)) | Queries(tuple(ranges))


def _check_count(owner: str, name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{owner}: {name} is {value!r}; a whole number of at least {least} is allowed"
        )
    if value > MOST:
        raise ValueError(f"{owner}: {name} is {value}; a whole number up to {MOST} is allowed")


def _check_bool(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} is {value!r}; True or False is allowed")


def _check_tokens(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, tuple):
        _check_count(owner, name, value, 0)
        return
    for token in value:
        _check_count(owner, f"a position in {name}", token, 0)
    if any(b <= a for a, b in pairwise(value)):
        raise ValueError(f"{owner}: {name} is {value!r}; positions in rising order are allowed")
