"""Ask a model what comes next at the probes of an example, through a cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from attnspan.evaluation.loop import CHUNK
from attnspan.evaluation.tasks.base import Example, Probe
from attnspan.models import Cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Outcome:
    """What a model did at a probe.

    Attributes:
        right: whether the right candidate is the likeliest of them.
        exact: whether the right answer's tokens are each the likeliest of the whole vocabulary,
            which is to say that greedy decoding would have written it.
    """

    right: bool
    exact: bool


class Session(Protocol):
    """What a scorer needs of a model with a cache: rows of tokens, fed and taken back."""

    def feed(self, ids: Tensor, last: int) -> Tensor:
        """Takes in `(rows, n)` tokens; logits after the last `last` of them, `(rows, last, V)`."""
        ...

    def undo(self, columns: int) -> None:
        """Takes back the last columns fed, which came in one call."""
        ...


class CacheSession:
    """A session of a model that is attached, through its cache."""

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        self._model, self._cache = model, cache

    def feed(self, ids: Tensor, last: int) -> Tensor:
        found, width = [], ids.shape[1]
        for start in range(0, width, CHUNK):
            stop = min(width, start + CHUNK)
            wanted = stop - max(start, width - last)
            with torch.inference_mode():
                output = self._model(
                    input_ids=ids[:, start:stop].to(self._model.device),
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=max(1, wanted),  # 0 would be all
                )
            if wanted > 0:
                found.append(output.logits[:, -wanted:])
        return torch.cat(found, 1)

    def undo(self, columns: int) -> None:
        self._cache.crop(-columns)


def rollback(examples: Iterable[Example]) -> int:
    """How many tokens a cache must be able to take back for these examples."""
    return max((_tried(probe) for example in examples for probe in example.probes), default=0)


def _tried(probe: Probe) -> int:
    """Tokens that must be fed to score a probe's candidates: all but the last of each."""
    return max(map(len, probe.candidates)) - 1


def batches(examples: Iterable[Example], rows: int) -> Iterator[list[Example]]:
    """Up to `rows` examples each, whose probes lie at the same places, in their order."""

    def shape(example: Example) -> object:
        return len(example.ids), [(p.at, len(p.candidates)) for p in example.probes]

    batch: list[Example] = []
    for example in examples:
        if batch and (len(batch) == rows or shape(example) != shape(batch[0])):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def play(session: Session, batch: Sequence[Example]) -> list[list[Outcome]]:
    """The outcome of each probe of each example, through an empty session.

    The right answer goes in after each probe, whatever the model chose. Candidates of several
    tokens are fed and taken back, one after the other.

    Args:
        batch: of one shape, as `batches` gives them.

    Raises:
        ArithmeticError: the model's output is not finite.
    """
    ids = torch.tensor([example.ids for example in batch])
    probes = list(zip(*(example.probes for example in batch), strict=True))
    found: list[list[Outcome]] = [[] for _ in batch]
    done = number = 0
    while number < len(probes):
        # Probes of one token each need no more than the logits at their places: all in one call.
        stop = number + 1
        if _alone(probes[number]):
            while stop < len(probes) and _alone(probes[stop]):
                stop += 1
        first, end = probes[number][0].at, probes[stop - 1][0].at
        logits = session.feed(ids[:, done:end], end - first + 1)
        done = end
        for together in probes[number:stop]:
            before = logits[:, together[0].at - first]
            for outcomes, outcome in zip(found, _judge(session, together, before), strict=True):
                outcomes.append(outcome)
        number = stop
    return found


def _alone(probes: Sequence[Probe]) -> bool:
    return not any(map(_tried, probes))


def _judge(session: Session, probes: Sequence[Probe], before: Tensor) -> list[Outcome]:
    """Probes at one place of all rows, by the logits before it, `(rows, V)`."""
    rows, count = len(probes), len(probes[0].candidates)
    if _alone(probes):
        return _judge_tokens(probes, before)
    scores = torch.zeros(rows, count, dtype=torch.float64)
    exact = torch.zeros(rows, dtype=torch.bool)
    for c in range(count):
        answers = [probe.candidates[c] for probe in probes]
        logits = before[:, None]
        if width := max(map(len, answers)) - 1:
            # A shorter one is filled up: what comes after its tokens can't change what is read.
            fed = [[*answer[:-1], *answer[:1] * (width + 1 - len(answer))] for answer in answers]
            after = session.feed(torch.tensor(fed), width)
            session.undo(width)
            logits = torch.cat([logits, after.to(logits.device)], 1)
        for row, (answer, probe) in enumerate(zip(answers, probes, strict=True)):
            own = logits[row, : len(answer)].float()
            wanted = torch.tensor(answer, device=own.device)
            chosen = own.gather(1, wanted[:, None])[:, 0]
            scores[row, c] = (chosen - own.logsumexp(-1)).double().sum()
            if c == probe.right:
                exact[row] = bool((own.argmax(-1) == wanted).all())
    return _outcomes(probes, scores, exact)


def _judge_tokens(probes: Sequence[Probe], before: Tensor) -> list[Outcome]:
    """The same where each candidate is one token."""
    logits = before.float()
    tokens = torch.tensor([[token for (token,) in probe.candidates] for probe in probes])
    answers = torch.tensor([probe.answer[0] for probe in probes])
    scores = logits.gather(1, tokens.to(logits.device)) - logits.logsumexp(-1, keepdim=True)
    return _outcomes(probes, scores.cpu(), logits.argmax(-1).cpu() == answers)


def _outcomes(probes: Sequence[Probe], scores: Tensor, exact: Tensor) -> list[Outcome]:
    if not scores.isfinite().all():
        raise ArithmeticError("the likelihood of an answer is not finite: the model is broken")
    best = scores.argmax(1).tolist()
    return [Outcome(best[row] == probe.right, bool(exact[row])) for row, probe in enumerate(probes)]
