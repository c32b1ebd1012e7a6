"""RULER's needles in a haystack: single, and with many keys, values or queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnspan.evaluation.tasks.base import Example, Writer, choice
from attnspan.evaluation.tasks.draw import Drawer
from attnspan.evaluation.tasks.haystack import hide

HEAD = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the numbers afterwards.\n"
)


@dataclass(frozen=True)
class Needle:
    """RULER's NIAH (https://arxiv.org/abs/2404.06654, section 3 and appendix), written from there.

    Keys are made-up words and not pairs of real ones, and the hay is the noise that repeats, not
    essays. RULER counts how many answers a generation names in any order; here each is chosen in
    the order of the text (values) or of the question (queries), the right ones before it given.
    Where there are keys that aren't asked for, the wrong answers are their values; else they stand
    nowhere in the prompt.

    Attributes:
        name: of the task.
        keys: words that have values.
        values: numbers of each key.
        queries: keys that are asked for, at once.
        depths: shares of the noise before the needle; None: anywhere, each.
        choices: answers to choose from where wrong ones are made up.

    Raises:
        ValueError: with more than one query, no key would be left to take wrong answers from.
    """

    name: str = "needle"
    keys: int = 1
    values: int = 1
    queries: int = 1
    depths: tuple[float, ...] | None = (0.0, 0.25, 0.5, 0.75, 1.0)
    choices: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= self.keys or 1 < self.queries == self.keys:
            raise ValueError(
                f"queries is {self.queries}; fewer than the {self.keys} keys, or 1, is allowed"
            )

    def examples(self, writer: Writer, length: int, count: int, seed: int) -> Iterator[Example]:
        for depth in self.depths or (None,):
            for i in range(count):
                yield self._example(writer, length, depth, seed, length, depth, i)

    def _example(self, writer: Writer, length: int, depth: float | None, *key: object) -> Example:
        draw = Drawer(self.name, self.keys, self.values, self.queries, *key)
        words = [draw.word() for _ in range(self.keys)]
        numbers = {word: [" " + draw.number(7) for _ in range(self.values)] for word in words}
        placed = [(word, value) for word in words for value in numbers[word]]
        draw.random.shuffle(placed)
        depths = sorted(draw.random.random() if depth is None else depth for _ in placed)
        needles = [
            (share, [f"\nOne of the special magic numbers for {word} is:", value, ".\n"])
            for share, (word, value) in zip(depths, placed, strict=True)
        ]
        asked = draw.random.sample(words, self.queries)
        answers = [pair for word in asked for pair in placed if pair[0] == word]
        tail = [_question(asked, len(answers))]
        for place, (_, value) in enumerate(answers):
            tail += ["," if place else "", value]
        text = hide(writer, length, [HEAD], needles, tail)
        others = [value for word in words if word not in asked for value in numbers[word]]
        setting = {"keys": self.keys} if depth is None else {"depth": depth}
        probes = []
        for place, pair in enumerate(answers):
            wrong = others or [" " + draw.number(7) for _ in range(self.choices - 1)]
            at, _ = text.tail[2 + 2 * place]
            evidence = [text.needles[placed.index(pair)][1]]
            probe = choice(writer, draw.random, at, pair[1], wrong, evidence, **setting)
            probes.append(probe)
        return Example(text.ids, tuple(probes))


def _question(asked: list[str], answers: int) -> str:
    whose = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    if answers == 1:
        what, verb = f"the special magic number for {whose} mentioned in the provided text", "is"
        return f"\nWhat is {what}? T{what[1:]} {verb}"
    what = f"the special magic numbers for {whose} mentioned in the provided text"
    return f"\nWhat are all {what}? T{what[1:]} are"
