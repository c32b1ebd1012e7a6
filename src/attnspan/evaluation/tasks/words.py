"""RULER's aggregation: the common words of a list, and the frequent words of a coded text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from attnspan.evaluation.tasks.base import DoesNotFit, Draft, Example, Span, Writer, choice
from attnspan.evaluation.tasks.draw import Drawer

COMMON_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CODED_HEAD = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words."
)
CODED_TAIL = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
DOTS = " ...."


@dataclass(frozen=True)
class CommonWords:
    """RULER's CWE (https://arxiv.org/abs/2404.06654, section 3 and appendix), written from there.

    RULER's words are real ones, an example is solved in the prompt, and a generation may name the
    words in any order. Here they are made up, no example is solved, and the words are asked for in
    an order drawn at random, the right ones before given; wrong answers are uncommon words of the
    list.

    Attributes:
        common: words that come often, all of them asked for.
        repeats: how often a common word comes, and an uncommon one; the first that leaves room for
            the wrong answers is taken. RULER has 30 and 3, and 3 and 1 in its solved example.
        choices: answers to choose from.
    """

    common: int = 10
    repeats: tuple[tuple[int, int], ...] = ((30, 3), (10, 1), (3, 1))
    choices: int = 10
    name: str = "common-words"

    def examples(self, writer: Writer, length: int, count: int, seed: int) -> Iterator[Example]:
        for i in range(count):
            yield self._example(writer, length, seed, length, i)

    def _example(self, writer: Writer, length: int, *key: object) -> Example:
        least = 0
        for often, seldom in self.repeats:
            uncommon, found = self.choices - 1, None
            while True:
                example = self._with(writer, often, seldom, uncommon, *key)
                least = len(example.ids)
                if least > length:
                    break
                found = example
                # An entry of the list has about so many tokens; the rest is found one by one.
                entry = least / (self.common * often + uncommon * seldom)
                uncommon += max(1, math.floor(0.5 * (length - least) / (entry * seldom)))
            if found is not None:
                return found
        raise DoesNotFit(f"length is {length}; {self.name} needs at least {least} tokens here")

    def _with(
        self, writer: Writer, often: int, seldom: int, uncommon: int, *key: object
    ) -> Example:
        draw = Drawer(self.name, self.common, *key)
        common = [" " + draw.word() for _ in range(self.common)]
        rest = [" " + draw.word() for _ in range(uncommon)]
        entries = common * often + rest * seldom
        draw.random.shuffle(entries)
        draft = Draft(writer, writer.start)
        draft.add(COMMON_HEAD)
        where: dict[str, list[Span]] = {}
        for number, word in enumerate(entries, 1):
            spans = draft.add(f" {number}." if number > 1 else "1.", word)
            where.setdefault(word, []).append(spans[1])
        draft.add(f"\nQuestion: What are the {self.common} most common words in the above list?")
        draft.add(f" Answer: The top {self.common} words that appear most often in the list are:")
        probes = []
        for number, word in enumerate(draw.random.sample(common, self.common), 1):
            at, _ = draft.add(f" {number}.", word)[1]
            wrong = draw.random.sample(rest, self.choices - 1)
            probe = choice(writer, draw.random, at, word, wrong, where[word], often=often)
            probes.append(probe)
        return Example(tuple(draft.ids), tuple(probes))


@cache
def _zeta(alpha: float) -> float:
    return math.fsum(k**-alpha for k in range(1, 100_000))


@dataclass(frozen=True)
class FrequentWords:
    """RULER's FWE (https://arxiv.org/abs/2404.06654, section 3 and appendix), written from there.

    The k-th most frequent word comes `words / (k^alpha zeta(alpha))` times, and the most frequent
    is dots, to be ignored. RULER takes a generation that names the three next in any order; here
    they are asked for by frequency, the right ones before given, and wrong answers are words that
    come less often than any of the three. A short text has few of those: chance says how few.

    Attributes:
        alpha: of the zeta distribution; 2 is RULER's.
        asked: words asked for.
        choices: answers to choose from, at most.
    """

    alpha: float = 2.0
    asked: int = 3
    choices: int = 10
    name: str = "frequent-words"

    def examples(self, writer: Writer, length: int, count: int, seed: int) -> Iterator[Example]:
        for i in range(count):
            words, example = length, None
            while example is None or len(example.ids) > length:
                if example is not None:
                    words -= max(1, (len(example.ids) - length) // len(writer.ids(DOTS)) // 2)
                counts = self.counts(words)
                if counts is None:
                    raise DoesNotFit(f"length is {length}; {self.name} needs more tokens than that")
                example = self._with(writer, counts, seed, length, i)
            yield example

    def counts(self, words: int) -> list[int] | None:
        """How often each word comes, most frequent first; None where two can't be told apart.

        The dots take what rounding leaves over.

        >>> FrequentWords().counts(100)
        [72, 15, 6, 3, 2, 1, 1]
        """
        counts, k = [], 1
        while (often := math.floor(words / (k**self.alpha * _zeta(self.alpha)))) > 0:
            counts.append(often)
            k += 1
        if len(counts) < self.asked + 3 or counts[self.asked] <= counts[self.asked + 1]:
            return None
        counts[0] += words - sum(counts)
        return counts

    def _with(self, writer: Writer, counts: list[int], *key: object) -> Example:
        draw = Drawer(self.name, self.alpha, self.asked, *key)
        words = [DOTS, *(" " + draw.letters(6) for _ in counts[1:])]
        text = [word for word, often in zip(words, counts, strict=True) for _ in range(often)]
        draw.random.shuffle(text)
        draft = Draft(writer, writer.start)
        draft.add(CODED_HEAD)
        where: dict[str, list[Span]] = {}
        for word in text:
            where.setdefault(word, []).append(draft.add(word)[0])
        draft.add(*CODED_TAIL)
        probes = []
        rare = words[self.asked + 1 :]
        for rank, word in enumerate(words[1 : self.asked + 1], 1):
            wrong = draw.random.sample(rare, min(len(rare), self.choices - 1))
            at, _ = draft.add(word)[0]
            probe = choice(writer, draw.random, at, word, wrong, where[word], rank=rank)
            probes.append(probe)
        return Example(tuple(draft.ids), tuple(probes))
