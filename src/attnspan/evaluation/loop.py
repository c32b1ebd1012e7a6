"""Stream a text through a model and its cache, chunk by chunk, and score every token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from attnspan.evaluation.score import Score, token_nll
from attnspan.evaluation.text import Place
from attnspan.models import StepGraph

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attnspan.models import Cache

CHUNK = 256
"""Tokens that go through the model at once."""

TEMPERATURE = 0.8
"""Of continuations: below 1, so that a small model keeps to what it is surer of."""


class Source(Protocol):
    """Where tokens come from: a `TextReader`, or tokens that were read before."""

    @property
    def place(self) -> Place | None: ...

    def read(self, count: int) -> tuple[list[int], list[int]]: ...


@dataclass(frozen=True)
class Progress:
    """What a live bar shows; None where it isn't known."""

    task: str
    done: int
    total: int | None
    perplexity: float | None = None
    cache_bytes: int | None = None
    tokens_per_second: float | None = None
    unit: str = "forwards"  # what is counted where there is no perplexity


class Stream:
    """The tokens of a source through a model, inside `attach(model)`, each scored.

    A step costs the same host time however many tokens went before.

    Args:
        model: attached, in eval mode.
        cache: of that model.
        source: of the text's tokens.
        first: the id that is fed first and not scored: BOS. None takes the source's first token.
        limit: how many tokens are scored at most; None is all.
        chunk: tokens a step.
        seed: of the random numbers that `generate` draws.
        watch: token numbers, ascending, counted from 1, whose nll is kept in `watched`.
        graphs: whether steps of one token are replayed from a CUDA graph, as `models.StepGraph`
            says; where that can't be, the first such step raises its sentence. Longer steps, and
            the few tokens before one can be captured, go through the model.

    Attributes:
        score: the sums so far.
        pending: the last token scored, which is fed first in the next step.
        boundary: the source's place at the start of the step last taken.
        seconds: spent in steps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        source: Source,
        *,
        first: int | None,
        limit: int | None = None,
        chunk: int = CHUNK,
        seed: int = 0,
        watch: Sequence[int] = (),
        graphs: bool = False,
    ) -> None:
        for name, value in (("limit", limit), ("chunk", chunk)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; a whole number of at least 1 is allowed")
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed!r}; a whole number from 0 to 2^63 - 1 is allowed")
        self.model, self.cache, self.source = model, cache, source
        self.limit, self.chunk = limit, chunk
        self.pending = source.read(1)[0][0] if first is None else first
        self.boundary = source.place
        self.score = Score()
        self.seconds = 0.0
        self.random = torch.Generator().manual_seed(seed)
        self.watched: list[float] = []
        self.graphs = graphs
        self._step: StepGraph | None = None
        self._watch = watch
        self._vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]

    def take(self) -> tuple[list[int], list[int]]:
        """The next step's tokens and their bytes of text: fewer than `chunk` only at the end."""
        self.boundary = self.source.place
        left = None if self.limit is None else self.limit - self.score.tokens
        return self.source.read(self.chunk if left is None else max(0, min(self.chunk, left)))

    def feed(self, ids: Sequence[int], widths: Sequence[int]) -> None:
        """Scores a step's tokens and takes the pending one and all but the last into the cache."""
        logits = self._forward([self.pending, *ids[:-1]])
        nlls = token_nll(logits, torch.tensor(ids, device=logits.device))
        before = self.score.tokens
        self.score.add(nlls, widths, self.cache.nbytes, self.cache.tokens_held)
        self.pending = ids[-1]
        while len(self.watched) < len(self._watch):
            number = self._watch[len(self.watched)]
            if number > self.score.tokens:
                break
            self.watched.append(nlls[number - before - 1])

    def generate(self, count: int, stop: frozenset[int] = frozenset()) -> list[int]:
        """Up to `count` tokens drawn after the text, until one of `stop`.

        They go into the cache, so a stream that has generated can't go on with its text.
        """
        drawn: list[int] = []
        while len(drawn) < count:
            logits = self._forward([self.pending])[-1].double().cpu()
            chances = (logits / TEMPERATURE).softmax(-1)
            self.pending = int(torch.multinomial(chances, 1, generator=self.random))
            if self.pending in stop:
                break
            drawn.append(self.pending)
        return drawn

    def _forward(self, ids: list[int]) -> Tensor:
        """Logits after each of `ids`, `(n, vocabulary)`."""
        if max(ids) >= self._vocabulary:
            raise ValueError(
                f"the tokenizer gave id {max(ids)}; the model has {self._vocabulary} embeddings "
                "only, so they don't belong together"
            )
        if self.graphs and len(ids) == 1 and self.cache.tokens_seen >= self.cache.steps_from:
            if self._step is None:
                self._step = StepGraph(self.model, self.cache)
            return self._step(ids[0])
        with torch.inference_mode():
            input_ids = torch.tensor([ids], device=self.model.device)
            output = self.model(input_ids=input_ids, past_key_values=self.cache, use_cache=True)
        return output.logits[0]


def run(
    stream: Stream,
    report: Callable[[Progress], None] | None = None,
    save: Callable[[Stream], None] | None = None,
    save_every: int = 1,
    task: str = "stream",
) -> None:
    """Steps until the end of the text or the limit.

    `save` is called only between steps of a whole chunk, so that a stream that goes on from there
    takes the same steps as one that never stopped: every `save_every` tokens, and at the end,
    before the last step if that is a shorter one.
    """
    saved, base = None, stream.score.tokens
    while True:
        began = time.perf_counter()
        ids, widths = stream.take()
        stream.seconds += time.perf_counter() - began
        tokens, short = stream.score.tokens, len(ids) < stream.chunk
        if save is not None and tokens != saved and (short or tokens - base >= save_every):
            save(stream)
            saved = base = tokens
        began = time.perf_counter()
        if ids:
            stream.feed(ids, widths)
        stream.seconds += time.perf_counter() - began
        if report is not None and stream.score.tokens:
            report(
                Progress(
                    task,
                    stream.score.tokens,
                    stream.limit,
                    stream.score.total.perplexity,
                    stream.cache.nbytes,
                    stream.score.tokens / stream.seconds,
                )
            )
        if short:
            return


def first_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """BOS, of the tokenizer or else of the model's config, if there is one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        bos = getattr(model.config.get_text_config(), "bos_token_id", None)
    return bos if isinstance(bos, int) else None


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a text: EOS, of the generation config and the tokenizer."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return frozenset(end for end in [*ends, tokenizer.eos_token_id] if end is not None)


def trained_length(model: PreTrainedModel) -> int | None:
    """The positions that the model was trained for, if its config says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def sensible_limit(model: PreTrainedModel, cache: Cache, limit: int | None) -> int | None:
    """`limit`, but a cache that keeps everything ends at the model's trained length."""
    trained = trained_length(model)
    if trained is None or not unbounded(cache):
        return limit
    return trained if limit is None else min(limit, trained)


def unbounded(cache: Cache) -> bool:
    """Whether some layer keeps every token."""
    return any(policy.capacity is None for policy in cache.policies)


def continuation(stream: Stream, tokenizer: PreTrainedTokenizerBase, count: int) -> str | None:
    """Text of up to `count` tokens that the model goes on with; None where there is no room.

    A cache that keeps everything has room up to the model's trained length.
    """
    trained = trained_length(stream.model)
    if trained is not None and unbounded(stream.cache):
        count = min(count, trained - stream.cache.tokens_seen)
    if count < 1:
        return None
    drawn = stream.generate(count, stop_tokens(stream.model, tokenizer))
    return str(tokenizer.decode(drawn, skip_special_tokens=True))
