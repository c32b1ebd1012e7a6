"""Negative log-likelihood along a stream, in memory that doesn't grow with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

MOST_BLOCKS = 800
"""Blocks of tokens kept; when they are full, neighbours merge."""

MOST_POINTS = 200
"""Points of a series at most."""


class Sums(NamedTuple):
    """Tokens, their summed nll in nats, and the bytes of text that they stand for."""

    tokens: int
    nll: float
    bytes: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token, at most about the largest float, so that JSON can hold it.

        >>> round(Sums(tokens=2, nll=2 * math.log(8), bytes=6).perplexity, 9)
        8.0
        """
        return math.exp(min(self.mean, 709.0))

    @property
    def bits_per_byte(self) -> float | None:
        """None where the tokens stand for no text.

        >>> Sums(tokens=2, nll=2 * math.log(8), bytes=6).bits_per_byte
        1.0
        """
        return self.nll / math.log(2) / self.bytes if self.bytes else None

    def figures(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "nll": self.mean,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


class Point(NamedTuple):
    """One point of a series: figures since the point before, at `tokens` tokens.

    Attributes:
        tokens: scored up to here.
        nll: mean since the last point, nats per token.
        cache_bytes: allocated now.
        tokens_held: held now.
    """

    tokens: int
    nll: float
    cache_bytes: int
    tokens_held: int


class Score:
    """Sums over a whole stream, over its last quarter, and a series along it.

    Tokens go into blocks of equal size. Once there are `MOST_BLOCKS`, each two neighbours become
    one: so a block is never more than a 400th of the stream, and the last quarter is exact to that.
    All sums are float64.
    """

    def __init__(self) -> None:
        self.tokens, self.nll, self.bytes = 0, 0.0, 0
        self._size = 1  # tokens of a full block
        # Of each block: tokens, nll, bytes, and the cache's bytes and tokens at its end.
        self._blocks: list[list[Any]] = []

    @property
    def total(self) -> Sums:
        return Sums(self.tokens, self.nll, self.bytes)

    def add(
        self, nlls: Sequence[float], widths: Sequence[int], cache_bytes: int, tokens_held: int
    ) -> None:
        """Takes in a chunk: each token's nll in nats and bytes, and the cache after it.

        Raises:
            ArithmeticError: an nll is not finite; the sentence names the token.
        """
        for i, nll in enumerate(nlls, self.tokens + 1):
            if not math.isfinite(nll):
                raise ArithmeticError(
                    f"the nll of token {i:,} is {nll}: the model's output is broken"
                )
        self.tokens += len(nlls)
        self.nll += math.fsum(nlls)
        self.bytes += sum(widths)
        done = 0
        while done < len(nlls):
            if not self._blocks or self._blocks[-1][0] == self._size:
                if len(self._blocks) == MOST_BLOCKS:
                    self._merge()
                self._blocks.append([0, 0.0, 0, 0, 0])
            block = self._blocks[-1]
            stop = min(len(nlls), done + self._size - block[0])
            block[0] += stop - done
            block[1] += math.fsum(nlls[done:stop])
            block[2] += sum(widths[done:stop])
            block[3:] = cache_bytes, tokens_held
            done = stop

    def last_quarter(self) -> Sums:
        """Over the blocks that begin in the last quarter of the tokens."""
        start, kept = 0, []
        for block in self._blocks:
            if 4 * start >= 3 * self.tokens:
                kept.append(block)
            start += block[0]
        # A stream of one token is its own last quarter.
        return _sums(kept or self._blocks[-1:])

    def series(self) -> list[Point]:
        """At most `MOST_POINTS` points, evenly spaced but for the last."""
        group = math.ceil(len(self._blocks) / MOST_POINTS) or 1
        points, tokens = [], 0
        for first in range(0, len(self._blocks), group):
            blocks = self._blocks[first : first + group]
            sums = _sums(blocks)
            tokens += sums.tokens
            points.append(Point(tokens, sums.mean, blocks[-1][3], blocks[-1][4]))
        return points

    def state(self) -> dict[str, Any]:
        """JSON that `from_state` takes; floats come back bit for bit."""
        return {
            "tokens": self.tokens,
            "nll": self.nll,
            "bytes": self.bytes,
            "size": self._size,
            "blocks": self._blocks,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Score:
        score = cls()
        score.tokens, score.nll, score.bytes = state["tokens"], state["nll"], state["bytes"]
        score._size = state["size"]
        score._blocks = [list(block) for block in state["blocks"]]
        return score

    def _merge(self) -> None:
        self._size *= 2
        self._blocks = [
            [a[0] + b[0], a[1] + b[1], a[2] + b[2], *b[3:]]
            for a, b in zip(self._blocks[::2], self._blocks[1::2], strict=True)
        ]


def _sums(blocks: list[list[Any]]) -> Sums:
    return Sums(
        sum(block[0] for block in blocks),
        math.fsum(block[1] for block in blocks),
        sum(block[2] for block in blocks),
    )


def token_nll(logits: Tensor, targets: Tensor) -> list[float]:
    """Each target's negative log-likelihood in nats, in float64.

    Args:
        logits: `(n, vocabulary)`.
        targets: `(n,)`, int64.
    """
    nlls: list[float] = []
    # Some rows at a time: float64 of a large vocabulary would be more than the model's own output.
    for rows, wanted in zip(logits.split(64), targets.split(64), strict=True):
        rows = rows.double()
        chosen = rows.gather(1, wanted[:, None])[:, 0]
        nlls += (rows.logsumexp(-1) - chosen).tolist()
    return nlls
