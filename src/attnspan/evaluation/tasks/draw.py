"""Numbers and made-up words, drawn without repeats."""

from __future__ import annotations

import string
from collections.abc import Callable
from random import Random

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


class Drawer:
    """Draws that never come twice, of one example.

    Args:
        key: what the draws depend on.

    >>> Drawer("seed", 1).number(5) == Drawer("seed", 1).number(5)
    True
    """

    def __init__(self, *key: object) -> None:
        self.random = Random("/".join(map(str, key)))
        self._drawn: set[str] = set()

    def number(self, digits: int) -> str:
        """A number of so many digits, the first of them not 0."""
        return self._new(lambda: str(self.random.randrange(10 ** (digits - 1), 10**digits)))

    def word(self) -> str:
        """Five letters that can be said: a consonant, a vowel, and so on."""
        kinds = (_CONSONANTS, _VOWELS) * 2 + (_CONSONANTS,)
        return self._new(lambda: "".join(self.random.choice(kind) for kind in kinds))

    def letters(self, count: int, kind: str = string.ascii_lowercase) -> str:
        return self._new(lambda: "".join(self.random.choices(kind, k=count)))

    def _new(self, draw: Callable[[], str]) -> str:
        while (text := draw()) in self._drawn:
            pass
        self._drawn.add(text)
        return text
