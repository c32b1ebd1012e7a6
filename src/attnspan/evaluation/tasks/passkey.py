"""Passkey: one number hidden in a text without meaning, by depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnspan.evaluation.tasks.base import Example, Writer, choice
from attnspan.evaluation.tasks.draw import Drawer
from attnspan.evaluation.tasks.haystack import hide

HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)


@dataclass(frozen=True)
class Passkey:
    """The prompt of Mohtashami and Jaggi, Landmark attention (https://arxiv.org/abs/2305.16300).

    Keys have five digits, where theirs go from 1 to 50,000. The wrong answers stand nowhere in the
    prompt, so a model that has lost the key is at chance.

    Attributes:
        depths: shares of the noise before the key.
        choices: answers to choose from.
    """

    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    choices: int = 10
    name: str = "passkey"

    def examples(self, writer: Writer, length: int, count: int, seed: int) -> Iterator[Example]:
        for depth in self.depths:
            for i in range(count):
                draw = Drawer(self.name, seed, length, depth, i)
                key = " " + draw.number(5)
                wrong = [" " + draw.number(5) for _ in range(self.choices - 1)]
                needle = ["\nThe pass key is", key, ". Remember it.", key, " is the pass key.\n"]
                tail = ["\nWhat is the pass key? The pass key is", key]
                text = hide(writer, length, [HEAD], [(depth, needle)], tail)
                at, _ = text.tail[1]
                evidence = (text.needles[0][1], text.needles[0][3])
                probe = choice(writer, draw.random, at, key, wrong, evidence, depth=depth)
                yield Example(text.ids, (probe,))
