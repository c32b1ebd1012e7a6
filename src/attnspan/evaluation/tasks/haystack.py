"""A text without meaning in which needles are hidden, to a length that is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnspan.evaluation.tasks.base import DoesNotFit, Draft, Ids, Span, Writer, size

NOISE = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
"""Of Landmark attention's passkey (https://arxiv.org/abs/2305.16300), also RULER's noise."""


@dataclass(frozen=True)
class Hidden:
    """The tokens, and where each piece of each needle and of the tail lies."""

    ids: Ids
    needles: tuple[tuple[Span, ...], ...]
    tail: tuple[Span, ...]


def needed(
    writer: Writer, head: Sequence[str], needles: Sequence[Sequence[str]], tail: Sequence[str]
) -> int:
    """Tokens without any noise."""
    pieces = [*head, *(piece for needle in needles for piece in needle), *tail]
    return len(writer.start) + size(writer, pieces)


def hide(
    writer: Writer,
    length: int,
    head: Sequence[str],
    needles: Sequence[tuple[float, Sequence[str]]],
    tail: Sequence[str],
) -> Hidden:
    """Head, noise with the needles in it, tail: `length` tokens.

    Args:
        needles: each a depth, the share of the noise's sentences that goes before it, and its
            pieces. Needles of one depth stay in their order.

    Raises:
        DoesNotFit: there is no room even without noise.
    """
    least = needed(writer, head, [pieces for _, pieces in needles], tail)
    room = length - least
    if room < 0:
        raise DoesNotFit(f"length is {length}; the prompt has {least} tokens without any noise")
    noise: list[Ids] = []
    while room > 0:
        # Backwards, so that the sentence that is cut to fit is the first, which loses its start.
        sentence = writer.ids(NOISE[-1 - len(noise) % len(NOISE)])
        noise.append(sentence[-room:])
        room -= len(noise[-1])
    noise.reverse()
    places = [round(depth * len(noise)) for depth, _ in needles]
    order = sorted(range(len(needles)), key=places.__getitem__)  # stable
    draft, spans, done = Draft(writer, writer.start), {}, 0
    draft.add(*head)
    for number in order:
        for sentence in noise[done : places[number]]:
            draft.ids += sentence
        done = places[number]
        spans[number] = tuple(draft.add(*needles[number][1]))
    for sentence in noise[done:]:
        draft.ids += sentence
    ends = draft.add(*tail)
    return Hidden(tuple(draft.ids), tuple(spans[i] for i in range(len(needles))), tuple(ends))
