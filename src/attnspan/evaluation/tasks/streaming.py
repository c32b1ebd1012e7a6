"""Streaming nll by position: what each token of a text costs, the cache filling behind it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from attnspan.evaluation.loop import Stream, run
from attnspan.evaluation.shrink import Passage, PassageSource, read
from attnspan.evaluation.tasks.base import DoesNotFit
from attnspan.evaluation.tasks.draw import Drawer
from attnspan.evaluation.texts import english_heldout, python_heldout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attnspan.models import Cache


@dataclass(frozen=True)
class StreamingNll:
    """Nats a token of the Python and the English that come with attnspan, by position.

    It is no choice: less is better, and what stands for chance is the nll of knowing just how often
    each of a passage's tokens comes in it.

    Attributes:
        parts: equal runs of positions that figures are given for.
    """

    parts: int = 4
    name: str = "nll"

    def passages(
        self,
        tokenizer: PreTrainedTokenizerBase,
        bos: int | None,
        length: int,
        count: int,
        seed: int,
    ) -> list[Passage]:
        """`count` passages of `length` tokens from random lines, of one text and the other.

        Raises:
            DoesNotFit: the length is less than two tokens a part, or more than a text has.
        """
        if length < 2 * self.parts:
            raise DoesNotFit(f"length is {length}; {self.name} needs at least {2 * self.parts}")
        lines = {
            "English": english_heldout().splitlines(keepends=True),
            "Python": python_heldout().splitlines(keepends=True),
        }
        found = []
        for i in range(count):
            name = ("English", "Python")[i % 2]
            draw = Drawer(self.name, seed, length, i)
            # The last tenth of the text is room to go on in.
            first = draw.random.randrange(len(lines[name]) * 9 // 10)
            text = io.BytesIO("".join(lines[name][first:]).encode())
            ids = read(text, tokenizer, name, bos, length)
            if len(ids) < length:
                raise DoesNotFit(f"length is {length}; the {name} from line {first} on has less")
            found.append(Passage(name, ids, 1, bos is not None))
        return found

    def spans(self, length: int) -> list[tuple[int, int]]:
        """The positions of each part, first and after the last; position 0 is not foretold.

        >>> StreamingNll().spans(1024)
        [(1, 256), (256, 512), (512, 768), (768, 1024)]
        """
        edges = [1, *(length * part // self.parts for part in range(1, self.parts + 1))]
        return list(pairwise(edges))

    def measure(
        self, model: PreTrainedModel, cache: Cache, passages: Sequence[Passage]
    ) -> list[list[float]]:
        """Of each part, the mean nll of each passage. `model` is attached, the cache its own."""
        found: list[list[float]] = [[] for _ in range(self.parts)]
        for passage in passages:
            length = len(passage.ids)
            source = PassageSource(passage.ids)
            stream = Stream(model, cache, source, first=None, watch=range(1, length))
            run(stream)
            for part, (start, stop) in enumerate(self.spans(length)):
                nlls = stream.watched[start - 1 : stop - 1]
                found[part].append(math.fsum(nlls) / len(nlls))
            cache.reset()
        return found
