"""A model and the passages that it is examined on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from attnspan.evaluation.loop import first_token, trained_length
from attnspan.evaluation.shrink import Passage, read
from attnspan.models.anatomy import Anatomy, anatomy_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = {"cpu": 1024, "cuda": 4096}
"""The largest window tried by default, and the tokens of a reach: a machine does it in minutes."""

LEAST_LENGTH = 64

LEAST_SCORED = 512
"""Tokens that must be scored of each text: half of them make four blocks of an interval."""


@dataclass(frozen=True)
class Case:
    """A model and the passages that it is examined on."""

    model: PreTrainedModel
    anatomy: Anatomy
    passages: tuple[Passage, ...]
    bos: int | None
    length: int
    trained: int | None

    @property
    def windows(self) -> list[int | None]:
        return [layer.sliding_window for layer in self.anatomy.layers]

    @property
    def full(self) -> int:
        """Tokens at which bytes are given: the trained length, where the config says it."""
        return self.trained or self.length

    def pieces(self, length: int) -> Tensor:
        """The start and the end of each passage, BOS first where there is one."""
        rows = []
        for passage in self.passages:
            ids = passage.ids
            rows.append(ids[:length])
            if len(ids) >= 2 * length:
                start = (self.bos,) if self.bos is not None else ()
                rows.append((*start, *ids[len(ids) - length + len(start) :]))
        return torch.tensor(rows, device=self.model.device)


def shipped_texts() -> list[tuple[str, BinaryIO]]:
    """The held-out texts that come with attnspan."""
    from attnspan.evaluation.texts import english_heldout, python_heldout

    return [
        ("held-out Python", io.BytesIO(python_heldout().encode())),
        ("held-out English", io.BytesIO(english_heldout().encode())),
    ]


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, BinaryIO]] | None,
    limit: int,
    length: int | None,
) -> tuple[Case, list[str]]:
    """Texts as they will be scored, and what is left out of the doctor's report for their sake.

    As `doctor.examine` has it.

    Raises:
        ValueError: an argument is wrong, the model can't be done exactly, or a text is too short.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < LEAST_SCORED:
        raise ValueError(
            f"limit is {limit!r}; a whole number of at least {LEAST_SCORED} is allowed"
        )
    anatomy = anatomy_of(model)
    trained, bos = trained_length(model), first_token(model, tokenizer)
    usual = LONGEST["cpu" if model.device.type == "cpu" else "cuda"]
    most = length if length is not None else min(usual, trained or usual)
    if isinstance(most, bool) or not isinstance(most, int) or most < LEAST_LENGTH:
        raise ValueError(
            f"length is {most!r}; a whole number of at least {LEAST_LENGTH} is allowed, and models "
            "trained for as many tokens"
        )
    if trained is not None and most > trained:
        raise ValueError(
            f"length is {most:,}; the model was trained for {trained:,} tokens, and up to as many "
            "are allowed"
        )
    skipped = []
    if trained is not None and most < trained and length is None:
        skipped.append(
            f"windows above {most:,}: the model was trained for {trained:,} tokens (--length gives "
            "another limit)"
        )
    read_texts = [
        (name, read(file, tokenizer, name, bos, most + limit))
        for name, file in (shipped_texts() if texts is None else texts)
    ]
    name, shortest = min(((name, len(ids)) for name, ids in read_texts), key=lambda each: each[1])
    if shortest < LEAST_LENGTH + LEAST_SCORED:
        raise ValueError(
            f"text {name}: it has {shortest:,} tokens; {LEAST_LENGTH + LEAST_SCORED} or more are "
            "needed"
        )
    kept = most
    # As many scored tokens as the largest window has, or all that are asked for.
    while kept // 2 >= LEAST_LENGTH and shortest - kept < max(min(limit, kept), LEAST_SCORED):
        kept //= 2
    if kept < most:
        skipped.append(
            f"windows above {kept:,}: text {name} has {shortest:,} tokens, too few for {most:,}"
        )
    passages = tuple(
        Passage(name, ids[: kept + limit], kept, bos is not None) for name, ids in read_texts
    )
    return Case(model, anatomy, passages, bos, kept, trained), skipped
