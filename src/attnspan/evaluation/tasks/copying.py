"""Repeat-copy: random tokens come twice, so far apart; how many of the second are foretold?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from attnspan.evaluation.tasks.base import Example, Ids, Probe, Writer, settings_that_fit
from attnspan.evaluation.tasks.draw import Drawer
from attnspan.evaluation.texts import english_heldout

TEXT = 60_000
"""Characters of English that go around the blocks."""


@dataclass(frozen=True)
class Copy:
    """A block of random tokens, some English, and the block again, which ends the prompt.

    The tokens are drawn evenly from the most frequent ones of English, and a model chooses among
    these, so chance is one over their number whatever it prefers. Copies by induction were studied
    by Olsson et al. (https://arxiv.org/abs/2209.11895).

    Attributes:
        distances: tokens from a token to its copy; those that the length has no room for are left
            out.
        block: tokens of a block.
        cue: tokens of the second block that are given before the first that counts.
        alphabet: how many different tokens are drawn from, at most.
    """

    distances: tuple[int, ...] = (64, 128, 256, 512, 768)
    block: int = 32
    cue: int = 4
    alphabet: int = 64
    name: str = "copy"

    def examples(self, writer: Writer, length: int, count: int, seed: int) -> Iterator[Example]:
        around = writer.ids(english_heldout()[:TEXT])
        common = [token for token, _ in Counter(around).most_common(self.alphabet)]
        candidates = tuple((token,) for token in sorted(common))
        least = len(writer.start) + self.block
        needed = {float(distance): least + distance for distance in self.distances}
        for fitting in settings_that_fit(self.name, length, needed):
            distance = int(fitting)
            for i in range(count):
                draw = Drawer(self.name, seed, length, distance, i)
                before = self._piece(draw, around, length - least - distance)
                gap = self._piece(draw, around, distance - self.block)
                block = self._block(draw, common, before + gap)
                first = len(writer.start) + len(before)
                probes = tuple(
                    Probe(
                        first + distance + place,
                        candidates,
                        candidates.index((block[place],)),
                        ((first + place, first + place + 1),),
                        (("distance", distance),),
                    )
                    for place in range(self.cue, self.block)
                )
                ids = (*writer.start, *before, *block, *gap, *block)
                yield Example(ids, probes)

    def _piece(self, draw: Drawer, around: Ids, size: int) -> Ids:
        while len(around) < size:
            around += around
        start = draw.random.randrange(len(around) - size + 1)
        return around[start : start + size]

    def _block(self, draw: Drawer, common: list[int], text: Ids) -> Ids:
        """Tokens whose runs of `cue` come once, so that the place to copy from is no guess."""
        taken = {text[i : i + self.cue] for i in range(len(text))}
        while True:
            block = tuple(draw.random.choices(common, k=self.block))
            runs = [block[i : i + self.cue] for i in range(self.block - self.cue + 1)]
            if len({*runs}) == len(runs) and taken.isdisjoint(runs):
                return block
