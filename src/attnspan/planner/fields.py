"""The fields of a model's config, each checked when it is read."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnspan.planner.families import Family, Switch

MOST_LAYERS = 4096
MOST = 2**30  # of any other figure; no published one is near it


@dataclass(frozen=True)
class Fields:
    """What a config says, and for what it leaves out its family's defaults."""

    kind: str
    family: Family
    values: Mapping[str, Any]
    source: str

    def wrong(self, key: str, allowed: str) -> ValueError:
        return ValueError(f"{self.source}: {key} is {shown(self.values.get(key))}; {allowed}")

    def count(self, key: str, least: int = 1, most: int = MOST) -> int:
        value = self.values.get(key)
        # True is an int to Python.
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most} is allowed")
        return value

    def optional(self, key: str) -> int | None:
        if self.values.get(key) is None:
            return None
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
            raise self.wrong(key, f"null or a whole number from 1 to {MOST} is allowed")
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false is allowed")
        return bool(value)

    def switch(self, part: Switch) -> bool:
        return self.flag(part) if isinstance(part, str) else part

    def listed(self, key: str, below: int) -> list[int] | None:
        """Whole numbers from 0 to `below - 1`; None: there is no list."""
        value = self.values.get(key)
        if value is not None and not (
            isinstance(value, list | tuple)
            and all(type(each) is int and 0 <= each < below for each in value)
        ):
            raise self.wrong(key, f"null or a list of whole numbers below {below} is allowed")
        return None if value is None else list(value)


def shown(value: Any) -> str:
    """Short enough for a sentence, on one line."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return reprlib.repr(value)
