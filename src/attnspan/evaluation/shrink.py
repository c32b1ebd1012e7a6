"""What a smaller cache costs a model, token by token, beside the best that it can do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from attnspan.evaluation.intervals import Paired, bounded_exp, paired
from attnspan.evaluation.loop import CHUNK, Stream, run
from attnspan.evaluation.score import token_nll
from attnspan.evaluation.text import TextReader
from attnspan.models import Cache, attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attnspan.policies import PerLayer, Policy

STRIDE = 4
"""The best takes steps of a quarter of the length: each token has three quarters of it before it
at least."""

# Tokens in one batch of fresh forwards.
_CPU_TOKENS, _CUDA_TOKENS = 4096, 32_768


@dataclass(frozen=True)
class Passage:
    """Tokens of a text that are fed, of which those from `length` on are scored.

    Attributes:
        name: of the text.
        ids: BOS first, where there is one.
        length: tokens that go before the first scored one.
        bos: whether `ids[0]` is BOS.
    """

    name: str
    ids: tuple[int, ...]
    length: int
    bos: bool

    @property
    def scored(self) -> int:
        return len(self.ids) - self.length


class PassageSource:
    """A passage as a source of a stream; what its tokens stand for isn't asked."""

    place = None

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids, self._at = ids, 0

    def read(self, count: int) -> tuple[list[int], list[int]]:
        ids = list(self._ids[self._at : self._at + count])
        self._at += len(ids)
        return ids, [0] * len(ids)


def read(
    file: BinaryIO, tokenizer: PreTrainedTokenizerBase, name: str, bos: int | None, most: int
) -> tuple[int, ...]:
    """Up to `most` ids of a text, BOS first where there is one."""
    start = () if bos is None else (bos,)
    return (*start, *TextReader(file, tokenizer, name).read(most - len(start))[0])


def streamed(
    model: PreTrainedModel,
    policy: Policy | PerLayer,
    passages: Sequence[Passage],
    told: Callable[[], None] | None = None,
) -> list[list[float]]:
    """The nll of each passage's scored tokens, in nats, through a cache under `policy`.

    `model` is attached.
    """
    cache, found = Cache(model, policy), []
    for passage in passages:
        stream = Stream(
            model,
            cache,
            PassageSource(passage.ids),
            first=None,
            watch=range(passage.length, len(passage.ids)),
        )
        run(stream, None if told is None else lambda _: told())
        found.append(stream.watched)
        cache.reset()
    return found


def steps(passages: Sequence[Passage]) -> int:
    """How often `streamed` calls `told`."""
    return sum(math.ceil((len(passage.ids) - 1) / CHUNK) for passage in passages)


def best(
    model: PreTrainedModel,
    passages: Sequence[Passage],
    told: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """The nll of each passage's scored tokens in fresh forwards of `length` tokens.

    Each token has BOS, where there is one, and between three quarters and all of the length before
    it, at the positions that the model was trained with. `model` is not attached.
    """
    found = []
    for passage in passages:
        ids, length = passage.ids, passage.length
        stride = max(1, length // STRIDE)
        budget = _CUDA_TOKENS if model.device.type == "cuda" else _CPU_TOKENS
        rows = max(1, budget // length)
        # The last piece ends with the last token; the one before it then scores fewer.
        stops = [*range(length + stride, len(ids), stride), len(ids)]
        nlls: list[float] = []
        for first in range(0, len(stops), rows):
            batch = stops[first : first + rows]
            contexts = [
                (ids[0], *ids[stop - length : stop - 1])
                if passage.bos
                else ids[stop - 1 - length : stop - 1]
                for stop in batch
            ]
            with torch.inference_mode():
                output = model(
                    input_ids=torch.tensor(contexts, device=model.device),
                    use_cache=False,
                    logits_to_keep=stride,
                )
            for stop, logits in zip(batch, output.logits, strict=True):
                wanted = torch.tensor(ids[length + len(nlls) : stop], device=model.device)
                nlls += token_nll(logits[-len(wanted) :], wanted)
            if told is not None:
                told(len(batch))
        _check(nlls)
        found.append(nlls)
    return found


def best_steps(passages: Sequence[Passage]) -> int:
    """The counts that `best` tells, added up."""
    return sum(math.ceil(p.scored / max(1, p.length // STRIDE)) for p in passages)


def _check(nlls: Sequence[float]) -> None:
    if not all(map(math.isfinite, nlls)):
        raise ArithmeticError("the nll of a fresh forward is not finite: the model is broken")


def perplexity(nlls: Sequence[float]) -> float:
    return bounded_exp(math.fsum(nlls) / len(nlls))


def frequency_nll(passages: Sequence[Passage]) -> list[float]:
    """For each passage the nll of knowing just how often each of its scored tokens comes.

    It is the least that any guess without context can reach on them, in nats a token.
    """
    found = []
    for passage in passages:
        scored = passage.ids[passage.length :]
        counts: dict[int, int] = {}
        for token in scored:
            counts[token] = counts.get(token, 0) + 1
        shares = [count / len(scored) for count in counts.values()]
        found.append(-math.fsum(share * math.log(share) for share in shares))
    return found


class Ledger:
    """Measures policies on passages, each once, and holds what came out.

    Args:
        model: not attached.
        passages: the same for all policies.
        told: is called with each step taken.
        reference: the nll of each passage's scored tokens that others are held against; None
            measures what `best` gives.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        passages: Sequence[Passage],
        told: Callable[[int], None] = lambda count: None,
        reference: list[list[float]] | None = None,
    ) -> None:
        self.model, self.passages, self.told = model, tuple(passages), told
        self.best = best(model, self.passages, told) if reference is None else reference
        self._found: dict[Any, list[list[float]]] = {}

    def nlls(self, policy: Policy | PerLayer) -> list[list[float]]:
        if policy not in self._found:
            with attach(self.model):
                self._found[policy] = streamed(
                    self.model, policy, self.passages, lambda: self.told(1)
                )
        return self._found[policy]

    def halves(self) -> tuple[Ledger, Ledger]:
        """The first half of each passage's scored tokens, and the second, with what is measured.

        The first feeds no more tokens than those up to its own last, the second all of them.
        """
        middle = [passage.scored // 2 for passage in self.passages]
        early, late = [], []
        for passage, half in zip(self.passages, middle, strict=True):
            stop = passage.length + half
            early.append(replace(passage, ids=passage.ids[:stop]))
            late.append(replace(passage, length=stop))

        def parts(nlls: list[list[float]]) -> tuple[list[list[float]], list[list[float]]]:
            each = list(zip(nlls, middle, strict=True))
            return [a[:half] for a, half in each], [a[half:] for a, half in each]

        best_parts = parts(self.best)
        first = Ledger(self.model, early, reference=best_parts[0])
        second = Ledger(self.model, late, reference=best_parts[1])
        for policy, nlls in self._found.items():
            first._found[policy], second._found[policy] = parts(nlls)
        return first, second

    def against_best(self, policy: Policy | PerLayer) -> list[Paired]:
        """For each passage, the policy's perplexity over the best."""
        return [paired(a, b) for a, b in zip(self.nlls(policy), self.best, strict=True)]

    def against(self, policy: Policy | PerLayer, base: Policy | PerLayer) -> list[Paired]:
        pairs = zip(self.nlls(policy), self.nlls(base), strict=True)
        return [paired(a, b) for a, b in pairs]

    def row(self, policy: Policy | PerLayer) -> dict[str, Any]:
        """A policy's figures on each passage, as JSON."""
        return {
            "policy": str(policy),
            "texts": [
                {
                    "text": passage.name,
                    "perplexity": perplexity(nlls),
                    "over_best": against.as_dict(),
                }
                for passage, nlls, against in zip(
                    self.passages, self.nlls(policy), self.against_best(policy), strict=True
                )
            ],
        }
