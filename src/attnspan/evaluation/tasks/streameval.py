"""StreamEval: lines go by, and every so many of them a question asks for one of the last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnspan.evaluation.tasks.base import Draft, Example, Writer, choice, settings_that_fit
from attnspan.evaluation.tasks.draw import Drawer

HEAD = "Below is a record of lines I want you to remember."
HOLDS = " REGISTER_CONTENT is <"


@dataclass(frozen=True)
class StreamEval:
    """After StreamingLLM's StreamEval (https://arxiv.org/abs/2309.17453, section 4.3).

    There, a question comes every 10 lines and its answer always lies 20 lines back, so a model
    could learn the distance instead of the line. Here, a question comes every `back` lines, about
    any one of these, and the wrong answers are what the others hold: whoever goes by the distance
    alone is at chance.

    Attributes:
        backs: lines between questions, a setting each; those without room for a question are left
            out.
    """

    backs: tuple[int, ...] = (5, 10, 20)
    name: str = "streameval"

    def examples(self, writer: Writer, length: int, count: int, seed: int) -> Iterator[Example]:
        shortest = {float(back): self._example(writer, back, 0, "sizes") for back in self.backs}
        needed = {back: len(example.ids) for back, example in shortest.items()}
        for back in settings_that_fit(self.name, length, needed):
            for i in range(count):
                yield self._example(writer, int(back), length, seed, length, i)

    def _example(self, writer: Writer, back: int, length: int, *key: object) -> Example:
        """As many questions as fit, one at least."""
        draw = Drawer(self.name, back, *key)
        draft = Draft(writer, writer.start)
        draft.add(HEAD)
        number = draw.random.randrange(100, 500)
        probes, ids = [], ()
        while True:
            lines = {}
            for _ in range(back):
                value = draw.number(5)
                spans = draft.add(f"\nline {number}:", HOLDS, value, ">")
                lines[number] = value, spans[2]
                number += 1
            asked = draw.random.choice([*lines])
            value, evidence = lines[asked]
            question = f"\nWhat is the REGISTER_CONTENT in line {asked}?"
            spans = draft.add(question, f"\nline {asked}:", HOLDS, value, ">")
            if ids and len(draft.ids) > length:
                return Example(ids, tuple(probes))
            wrong = [held for line, (held, _) in lines.items() if line != asked]
            at, _ = spans[3]
            probe = choice(writer, draw.random, at, value, wrong, [evidence], back=back)
            probes.append(probe)
            ids = tuple(draft.ids)
            if len(ids) >= length:
                return Example(ids, tuple(probes))
