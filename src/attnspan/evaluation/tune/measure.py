"""What choices lose and hold, measured: passages side by side through a cache, each value once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from attnspan.cache import Dense
from attnspan.evaluation.loop import CHUNK
from attnspan.evaluation.score import token_nll
from attnspan.evaluation.tune.search import FIRST
from attnspan.evaluation.tune.space import Choice
from attnspan.evaluation.tune.state import State
from attnspan.models import Cache
from attnspan.planner.engines import cache_bytes
from attnspan.planner.spec import ModelSpec
from attnspan.policies import KeepAll

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL = Choice(KeepAll(), Dense())
"""The full cache, in the model's dtype: what others are held against."""

# Tokens that go through the model side by side.
_CPU_TOKENS, _CUDA_TOKENS = 8192, 65_536


class Ledger:
    """Losses on the passages of one part of a text.

    Args:
        model: attached.
        spec: of the model.
        passages: ids, each of the same length.
        part: what the state calls them.
        state: holds what was measured, and is given what is.
        told: is called with passages that are done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ModelSpec,
        passages: Sequence[Sequence[int]],
        part: str,
        state: State,
        told: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.model, self.spec, self.passages = model, spec, passages
        self.part, self.state, self.told = part, state, told
        self.length = len(passages[0])
        self._sizes: dict[Choice, tuple[int, ...]] = {}

    @property
    def scored(self) -> range:
        """The positions whose tokens are scored."""
        return range(max(1, self.length // 2), self.length)

    def losses(self, choice: Choice, count: int) -> list[float]:
        """Nats a token more than the full cache, passage by passage."""
        own, full = self.nlls(choice, count), self.nlls(FULL, count)
        return [a - b for a, b in zip(own, full, strict=True)]

    def nlls(self, choice: Choice, count: int) -> list[float]:
        """The mean nll of each of the first `count` passages, in nats a token.

        Passages go through in the same company whatever was measured before, so a value never
        depends on what was asked for earlier.
        """
        name = str(choice)
        found: list[float] = list(self.state.get(self.part, name) or ())
        while len(found) < count:
            start = len(found)
            stop = min(FIRST if not start else 2 * start, start + self._rows, len(self.passages))
            found += self._run(choice, self.passages[start:stop])
            self.state.put(self.part, name, found)
            self.told(stop - start)
        return found[:count]

    @property
    def _rows(self) -> int:
        tokens = _CUDA_TOKENS if self.model.device.type == "cuda" else _CPU_TOKENS
        return max(1, tokens // self.length)

    def _run(self, choice: Choice, passages: Sequence[Sequence[int]]) -> list[float]:
        ids = torch.tensor([list(passage) for passage in passages], device=self.model.device)
        cache, first = Cache(self.model, choice.policy, choice.storage), self.scored.start
        nlls: list[list[float]] = [[] for _ in passages]
        for start in range(0, self.length, CHUNK):
            stop = min(start + CHUNK, self.length)
            # Logits after the token before the first scored one, up to that before the last.
            wanted = stop - max(start, first - 1)
            with torch.inference_mode():
                output = self.model(
                    input_ids=ids[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=max(1, wanted),  # 0 would be all
                )
            for row in range(len(passages) if wanted > 0 else 0):
                targets = ids[row, stop - wanted + 1 : stop + 1]
                nlls[row] += token_nll(output.logits[row, -wanted:][: len(targets)], targets)
        held, planned = cache.nbytes, len(passages) * sum(self.bytes(choice))
        if held != planned:
            raise RuntimeError(
                f"{choice} holds {held} bytes after {self.length} tokens of {len(passages)} "
                f"passages, where {planned} are counted on"
            )
        means = [math.fsum(row) / len(row) for row in nlls]
        if not all(map(math.isfinite, means)):
            raise ArithmeticError(f"the nll under {choice} is not finite: the model is broken")
        return means

    def bytes(self, choice: Choice) -> tuple[int, ...]:
        """What each layer allocates for a passage."""
        if choice not in self._sizes:
            found = allocated(self.spec, choice, self.length, self.model.dtype)
            self._sizes[choice] = found
        return self._sizes[choice]


def allocated(spec: ModelSpec, choice: Choice, tokens: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Bytes of each layer after so many tokens of one sequence, as `Cache` allocates them."""
    found = cache_bytes(
        spec,
        tokens,
        policy=choice.policy,
        storage=str(choice.storage),
        itemsize=dtype.itemsize,
        engine="attnspan",
    )
    return tuple(layer.bytes for layer in found.layers)
