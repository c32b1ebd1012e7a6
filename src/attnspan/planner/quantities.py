"""Numbers as users write them."""

from __future__ import annotations

import re

from attnspan.planner.forms import MOST_RANKS, MOST_TOKENS

_SUFFIXES = {"": 1, "K": 1024, "M": 1024**2}


def tokens(text: str) -> int:
    """A number of tokens: exact, or with K for 1,024 and M for 1,048,576.

    Raises:
        ValueError: it is none, or more than the planner counts.

    >>> tokens("128K"), tokens("1M"), tokens("1_000_000"), tokens("0.5M")
    (131072, 1048576, 1000000, 524288)
    """
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)\s*([KM]?)", text.strip().upper())
    if match:
        count = float(re.sub("[_,]", "", match[1])) * _SUFFIXES[match[2]]
        if count == int(count) and 1 <= count <= MOST_TOKENS:
            return int(count)
    raise ValueError(
        f"context {text!r} is no number of tokens; a whole number from 1 to {MOST_TOKENS} is "
        "allowed, with K for 1,024 or M for 1,048,576"
    )


def devices(text: str, step: int = 1) -> list[int]:
    """Numbers of devices, rising: a list "1,2,12", or "1..64", the powers of two from 1 to 64.

    Args:
        text: either.
        step: devices of a rank of the ring; of a range, multiples of it.

    Raises:
        ValueError: it is neither, or has a number that isn't positive, no multiple of `step`, or
            more than the planner counts.

    >>> devices("1..64"), devices("1..64", 8), devices("3, 12")
    ([1, 2, 4, 8, 16, 32, 64], [8, 16, 32, 64], [3, 12])
    """
    wrong = ValueError(
        f"devices {text!r} is neither a list such as 1,2,4 nor a range such as 1..1024, in which "
        "the powers of two count"
    )
    first, dots, last = text.partition("..")
    parts = [first, last] if dots else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise wrong
    numbers = sorted({int(part) for part in parts})
    if numbers[-1] > MOST_RANKS * step:
        raise ValueError(
            f"devices has {numbers[-1]} in it; at most {MOST_RANKS * step} are allowed"
        )
    if not dots:
        for number in numbers:
            if number < 1 or number % step:
                allowed = f"a multiple of {step}" if step > 1 else "a whole number of at least 1"
                raise ValueError(f"devices has {number} in it; {allowed} is allowed")
        return numbers
    low, high = numbers[0], numbers[-1]
    if int(first) > int(last):
        raise wrong
    found = [2**k for k in range(high.bit_length()) if low <= 2**k <= high and 2**k % step == 0]
    if not found:
        raise ValueError(f"devices {text!r} holds no power of two that is a multiple of {step}")
    return found
