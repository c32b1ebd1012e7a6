"""Budgets that change with depth: PyramidKV (https://arxiv.org/abs/2406.02069)."""

from __future__ import annotations

from collections.abc import Callable

from attnspan.policies.base import Policy, check_count
from attnspan.policies.per_layer import PerLayer


def pyramid(
    make: Callable[[int], Policy], tokens: int, layers: int, *, last: float = 0.1
) -> PerLayer:
    """A policy whose budgets fall in equal steps from the first layer to the last.

    Args:
        make: a policy of so many tokens.
        tokens: of a layer on average; all layers together have `tokens * layers`.
        layers: of the model.
        last: the last layer's budget, in parts of the average: from 0 to 2. The first one's is
            `2 - last`, so 1 makes all equal, and more than 1 turns the pyramid upside down: the
            bundled model, which retrieves in late layers, does better so. The paper's is 1/beta,
            with a beta of 20 and less.

    Raises:
        ValueError: a size is wrong, or a budget too small for `make`.

    >>> from attnspan.policies.sink_window import SinkWindow
    >>> str(pyramid(lambda tokens: SinkWindow(4, tokens - 4), 64, 3, last=0.25))
    'layers(sinks:4+window:108; sinks:4+window:60; sinks:4+window:12)'
    """
    check_count("pyramid", "tokens", tokens, 1)
    check_count("pyramid", "layers", layers, 1)
    if not 0 <= last <= 2:
        raise ValueError(f"pyramid: last is {last!r}; a number from 0 to 2 is allowed")
    step = 2 * tokens * (1 - last) / max(1, layers - 1)
    first = tokens + step * (layers - 1) / 2
    # What all layers up to each have, rounded: so the whole comes out exactly.
    sums = [round((i + 1) * first - step * i * (i + 1) / 2) for i in range(layers)]
    return PerLayer(
        tuple(make(stop - start) for start, stop in zip((0, *sums), sums, strict=False))
    )
