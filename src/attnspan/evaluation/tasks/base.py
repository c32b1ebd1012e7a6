"""What a task makes: prompts of exact tokens, and the places in them where something is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
Span = tuple[int, int]
Setting = tuple[tuple[str, int | float], ...]


class DoesNotFit(ValueError):
    """A task needs more tokens than the length that was asked for."""


@dataclass(frozen=True)
class Probe:
    """A place where a model chooses: which of the candidates comes next?

    The model has been given all tokens before it, earlier right answers included.

    Attributes:
        at: the place of the answer's first token in the example.
        candidates: token ids of each; one of them is right.
        right: which.
        evidence: the places, from start to stop, where the example holds the answer before `at`.
        setting: what was asked for, `(("depth", 0.5),)` say; results go by it.

    Raises:
        ValueError: a candidate is empty or occurs twice, so that nothing could tell them apart.
    """

    at: int
    candidates: tuple[Ids, ...]
    right: int
    evidence: tuple[Span, ...]
    setting: Setting = ()

    def __post_init__(self) -> None:
        if not all(self.candidates) or len(set(self.candidates)) < len(self.candidates):
            raise ValueError(
                "the tokenizer gives two answers of a choice the same tokens; one that can write "
                "numbers and words of Latin letters is needed"
            )

    @property
    def answer(self) -> Ids:
        return self.candidates[self.right]

    @property
    def chance(self) -> float:
        return 1 / len(self.candidates)

    @property
    def distance(self) -> int:
        """Tokens from where the answer was last seen to where it is asked for."""
        return self.at - max(start for start, _ in self.evidence)


@dataclass(frozen=True)
class Example:
    """Tokens with the right answers in them, and the probes in the order of their places.

    Attributes:
        ids: BOS first, where there is one.
    """

    ids: Ids
    probes: tuple[Probe, ...]


class Task(Protocol):
    """A frozen dataclass that makes examples; the scorer does the rest."""

    @property
    def name(self) -> str: ...

    def examples(self, writer: Writer, length: int, count: int, seed: int) -> Iterator[Example]:
        """`count` examples of each setting that fits, each of at most `length` tokens.

        The same arguments give the same examples.

        Raises:
            DoesNotFit: no setting fits the length.
        """
        ...


class Writer:
    """Token ids of pieces of text, each the same wherever it stands.

    A piece is tokenised as what follows a letter, so that a space before a word stays one and no
    space is made up. Lengths of pieces then add up, and an answer has the tokens that it has in
    the text. A tokenizer that would join characters across pieces gives slightly other tokens.

    Args:
        bos: the id that an example begins with; None: no such token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos: int | None) -> None:
        self._tokenizer = tokenizer
        self.start: Ids = () if bos is None else (bos,)
        self._known: dict[str, Ids] = {}
        self._anchor = self._encode("a")

    def ids(self, piece: str) -> Ids:
        if piece not in self._known:
            self._known[piece] = self._piece(piece)
        return self._known[piece]

    def _piece(self, piece: str) -> Ids:
        if not piece[:1].isalpha():  # a letter would join the anchor
            both = self._encode("a" + piece)
            if both[: len(self._anchor)] == self._anchor:
                return both[len(self._anchor) :]
        return self._encode(piece)

    def _encode(self, text: str) -> Ids:
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class Draft:
    """Pieces one after the other; each says where it lies.

    Args:
        start: the ids that it begins with.
    """

    def __init__(self, writer: Writer, start: Ids) -> None:
        self._writer, self.ids = writer, list(start)

    def add(self, *pieces: str) -> list[Span]:
        spans = []
        for piece in pieces:
            start = len(self.ids)
            self.ids += self._writer.ids(piece)
            spans.append((start, len(self.ids)))
        return spans


def size(writer: Writer, pieces: Sequence[str]) -> int:
    return sum(len(writer.ids(piece)) for piece in pieces)


def choice(
    writer: Writer,
    random: Random,
    at: int,
    right: str,
    wrong: Sequence[str],
    evidence: Sequence[Span],
    **setting: int | float,
) -> Probe:
    """A probe whose right answer stands anywhere among the wrong ones.

    So a model that finds all equally likely, and takes the first, is at chance.
    """
    texts = [*wrong]
    place = random.randrange(len(texts) + 1)
    texts.insert(place, right)
    return Probe(at, tuple(map(writer.ids, texts)), place, tuple(evidence), tuple(setting.items()))


def settings_that_fit(task: str, length: int, needed: dict[float, int]) -> list[float]:
    """Which settings' tokens fit `length`.

    Raises:
        DoesNotFit: none does.
    """
    fitting = [setting for setting, tokens in needed.items() if tokens <= length]
    if not fitting:
        raise DoesNotFit(
            f"length is {length}; {task} needs at least {min(needed.values())} tokens here"
        )
    return fitting
