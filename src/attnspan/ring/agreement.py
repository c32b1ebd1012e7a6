"""Whether all ranks call alike: short prints of their calls, and the sentence that says how not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b

PRINT = 32
SHOWN = 160
# Names that no fact has: by whom the ranks are asked, and after what.
BY, AFTER = "", " "


class Trail:
    """What a rank exchanged so far, as a chain of hashes.

    Two ranks whose trails are equal made the same calls, in the same order. Sizes alone can't tell:
    the keys of one layer have as many bytes as those of the next.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mark = bytes(8)

    def add(self, step: str, layer: int | None) -> None:
        self.count += 1
        self.mark = blake2b(self.mark + f"{layer} {step}".encode(), digest_size=8).digest()


def record(facts: Mapping[str, str], by: str, trail: Trail) -> bytes:
    """All of it, for the ranks that have to find out what differs."""
    after = f"{trail.count} exchanges (trail {trail.mark.hex()})"
    return json.dumps({BY: by, **facts, AFTER: after}).encode()


def fingerprint(record: bytes) -> bytes:
    """`PRINT` bytes that differ where the records do."""
    return blake2b(record, digest_size=PRINT).digest()


def mismatch(records: Sequence[bytes]) -> str:
    """The first thing in which the ranks' records differ, in one sentence.

    >>> print(mismatch([record({"k": k}, "ring", Trail()) for k in ("(1, 9)", "(1, 9)", "(1, 8)")]))
    ring: rank 2 calls with k (1, 8), ranks 0, 1 with (1, 9); the same on all ranks is allowed
    """
    rows = [json.loads(record) for record in records]
    names = dict.fromkeys(name for row in rows for name in row)
    name = next(name for name in names if len({row.get(name) for row in rows}) > 1)
    ranks: dict[str | None, list[int]] = {}
    for rank, row in enumerate(rows):
        ranks.setdefault(row.get(name), []).append(rank)
    # A value that few ranks have comes first: it is the wrong one, more likely than not.
    (odd, few), *others = sorted(ranks.items(), key=lambda item: (len(item[1]), -item[1][0]))
    join, first = {BY: ("", ""), AFTER: ("after ", "after ")}.get(name, ("with ", f"with {name} "))
    rest = ", ".join(f"{_ranks(who)} {join}{_shown(value, odd)}" for value, who in others)
    return (
        f"{'ring' if name == BY else rows[0][BY]}: {_ranks(few)} call{'s' * (len(few) == 1)} "
        f"{first}{_shown(odd, others[0][0])}, {rest}; the same on all ranks is allowed"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _shown(value: str | None, other: str | None) -> str:
    """A value; where it is long, the part in which it leaves another one."""
    if value is None:
        return "none"
    if len(value) <= SHOWN:
        return value
    pairs = enumerate(zip(value, other or "", strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(value), len(other or "")))
    start = max(0, min(same - SHOWN // 4, len(value) - SHOWN))
    end = start + SHOWN
    return f"{'...' * (start > 0)}{value[start:end]}{'...' * (end < len(value))}"
