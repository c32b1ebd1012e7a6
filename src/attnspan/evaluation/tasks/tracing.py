"""RULER's variable tracking: chains of assignments, and all names that hold a value."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass

from attnspan.evaluation.tasks.base import Example, Writer, choice
from attnspan.evaluation.tasks.draw import Drawer
from attnspan.evaluation.tasks.haystack import hide

HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"


@dataclass(frozen=True)
class VariableTracking:
    """RULER's VT (https://arxiv.org/abs/2404.06654, section 3 and appendix), written from there.

    RULER's default is one chain of four hops, an example solved in the prompt, and the share of
    names that a generation holds. Here, other chains give the wrong answers: the name at the same
    hop of each, so that whoever goes by the place alone is at chance. No example is solved. Names
    are asked for in the chain's order, those before given; hop 0 is the one set to the number.

    Attributes:
        chains: of which one is asked for.
        hops: assignments after the first of a chain.
    """

    chains: int = 4
    hops: int = 4
    name: str = "variable-tracking"

    def examples(self, writer: Writer, length: int, count: int, seed: int) -> Iterator[Example]:
        for i in range(count):
            yield self._example(writer, length, seed, length, i)

    def _example(self, writer: Writer, length: int, *key: object) -> Example:
        draw = Drawer(self.name, self.chains, self.hops, *key)
        size = self.hops + 1
        names = [
            [" " + draw.letters(5, string.ascii_uppercase) for _ in range(size)]
            for _ in range(self.chains)
        ]
        values = [" " + draw.number(5) for _ in range(self.chains)]
        # Whose turn it is; each chain keeps its own order.
        turns = [chain for chain in range(self.chains) for _ in range(size)]
        draw.random.shuffle(turns)
        depths = sorted(draw.random.random() for _ in turns)
        hop, needles, where = [0] * self.chains, [], {}
        for depth, chain in zip(depths, turns, strict=True):
            now = hop[chain]
            source = ["=" + values[chain]] if now == 0 else ["= VAR", names[chain][now - 1]]
            where[chain, now] = len(needles)
            pieces = ["\nVAR", names[chain][now], " " + source[0], *source[1:], "\n"]
            needles.append((depth, pieces))
            hop[chain] += 1
        asked = draw.random.randrange(self.chains)
        tail = [
            f"\nQuestion: Find all variables that are assigned the value{values[asked]} in the "
            "text above.",
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{size} variables are assigned the value{values[asked]}, they are:",
            *names[asked],
        ]
        text = hide(writer, length, [HEAD], needles, tail)
        probes = []
        for now in range(size):
            at, _ = text.tail[2 + now]
            evidence = [text.needles[where[asked, now]][1]]
            if now < self.hops:
                evidence.append(text.needles[where[asked, now + 1]][3])
            wrong = [chain[now] for i, chain in enumerate(names) if i != asked]
            right = names[asked][now]
            probes.append(choice(writer, draw.random, at, right, wrong, evidence, hop=now))
        return Example(text.ids, tuple(probes))
