"""Numbers as users write them."""

from __future__ import annotations

import re

MOST_RANKS = 1024
MOST_TOKENS = 2**31 - 1
_SUFFIXES = {"": 1, "K": 1024, "M": 1024**2}
_UNITS = {"B": 1} | {
    f"{letter}{end}": base ** (power + 1)
    for end, base in (("IB", 1024), ("B", 1000))
    for power, letter in enumerate("KMGT")
}


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


def size(text: str) -> int:
    """Bytes: "80GiB" counts in 1,024s, "80GB" in 1,000s.

    Raises:
        ValueError: it is no size, or not of at least 1 byte; or a number below a million alone, by
            which hardly bytes are meant.

    >>> size("80GiB"), size("80 GB"), size("1.5MiB"), size("80_000_000")
    (85899345920, 80000000000, 1572864, 80000000)
    """
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    unit = _UNITS.get(match[2] or "B") if match else None
    count = round(float(re.sub("[_,]", "", match[1])) * unit) if match and unit else 0
    bare = match is not None and not match[2] and count < 10**6
    if bare or not 1 <= count < 2**63:
        raise ValueError(
            f"memory {text!r} is no size; a number with GiB, MiB, KiB, TiB (1,024s) or GB, MB, KB, "
            "TB (1,000s) is allowed"
        )
    return count


def shown(count: float) -> str:
    """Bytes in GiB, MiB or KiB.

    >>> shown(17_179_869_184), shown(131_072), shown(100)
    ('16.00 GiB', '128.0 KiB', '100 B')
    """
    for unit, scale, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if abs(count) >= scale:
            return f"{count / scale:,.{digits}f} {unit}"
    return f"{count:,.0f} B"


def short(seconds: float) -> str:
    """Seconds, milliseconds or microseconds, three digits.

    >>> short(12.345), short(0.00432), short(28e-6)
    ('12.3 s', '4.32 ms', '28 us')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds / 1e-6:.3g} us"


def scaled(count: float) -> str:
    """A large number with a power of ten.

    >>> scaled(5_000_050_000), scaled(1_234)
    ('5.000e9', '1,234')
    """
    if count < 1e6:
        return f"{count:,.0f}"
    digits, power = f"{count:.3e}".split("e+")
    return f"{digits}e{int(power)}"
