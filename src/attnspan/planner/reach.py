"""How far back a token can reach the present one, from the windows of a model's layers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def bound(
    windows: Sequence[int | None], *, chunked: bool = False, shares: Sequence[int | None] = ()
) -> int | None:
    """The farthest distance at which a token can influence another's output.

    A layer with a window of W, the token itself included, carries what it knows W - 1 places on; a
    stack of layers carries it the sum of these. Between two tokens farther apart no path exists,
    whatever the weights. First tokens that are kept for every query (sinks) are the exception: what
    stands in them reaches everywhere; all other tokens stay within the bound, for a sink itself
    sees nothing but what came before it.

    Args:
        windows: for each layer its window, or None where it sees all of the past.
        chunked: the windows are chunks counted from token 0 (Llama 4), of which a query sees its
            own. Nothing crosses a place where chunks of all layers begin, so the bound doesn't grow
            with the layers once they share such places.
        shares: for each layer the earlier one whose keys and values it reads, or None where it has
            its own; empty: all have their own. Such a layer carries on from where that one stood,
            so it adds less.

    Returns:
        A distance in tokens; None where some layer sees all of the past.

    Raises:
        ValueError: there is no layer, or a window is below 1.

    >>> bound([4096] * 32)  # not 32 * 4096: a window of W holds the token itself
    131040
    >>> bound([512, None, 512]), bound([5, 3]), bound([1, 1])
    (None, 6, 0)
    >>> bound([8192] * 48, chunked=True), bound([4, 6], chunked=True)
    (8191, 8)
    """
    if not windows:
        raise ValueError("windows is empty; a window for each layer is allowed")
    known: list[int] = []
    for window in windows:
        if window is None:
            continue
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(
                f"windows holds {window!r}; None or a whole number of at least 1 is allowed"
            )
        known.append(window)
    if len(known) < len(windows):
        return None
    reach = 0
    before: list[int] = []  # how far back what each layer reads may come from
    for layer, window in enumerate(known):
        before.append(reach)
        source = shares[layer] if shares else None
        reach = max(reach, before[layer if source is None else source] + window - 1)
    return min(reach, math.lcm(*known) - 1) if chunked else reach
