"""What a trained variant can do: loss by position, tasks by distance, and how far it sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from attnspan.evaluation import reach
from attnspan.evaluation.tasks import TASKS, Writer
from attnspan.evaluation.tasks.base import DoesNotFit
from attnspan.evaluation.tasks.intervals import clustered
from attnspan.evaluation.tasks.scorer import batches, play
from training.batches import Text
from training.tokenizer import BOS

QUARTERS = 4
TASK_NAMES = ("copy", "passkey", "needle")

# Tokens of one forward without gradients.
_TOKENS = 65_536


@torch.no_grad()
def bits(model: LlamaForCausalLM, text: Text, rows: int, length: int) -> Tensor:
    """`(rows, QUARTERS)` bits a byte of evenly spaced rows, by quarter of the positions."""
    found = []
    for part in text.spread(min(rows, len(text) // length), length).split(_TOKENS // length):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits
        nll = F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="none")
        found.append(nll.view(len(part), QUARTERS, -1).mean(-1) / math.log(2))
    return torch.cat(found).cpu()


class Whole:
    """A session for the tasks' scorer whose every answer is a fresh forward over all tokens."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model
        self._ids: Tensor | None = None

    def feed(self, ids: Tensor, last: int) -> Tensor:
        self._ids = ids if self._ids is None else torch.cat([self._ids, ids], 1)
        rows = max(1, _TOKENS // self._ids.shape[1])
        with torch.inference_mode():
            return torch.cat(
                [
                    self._model(
                        input_ids=part.to(self._model.device),
                        use_cache=False,
                        logits_to_keep=last,
                    ).logits
                    for part in self._ids.split(rows)
                ]
            )

    def undo(self, columns: int) -> None:
        assert self._ids is not None
        self._ids = self._ids[:, :-columns]


def tasks(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    examples: int,
    names: Sequence[str] = TASK_NAMES,
) -> list[dict[str, Any]]:
    """Accuracy of each task's settings that fit, with its interval."""
    rows = []
    for name in names:
        right: dict[Any, list[int]] = {}
        asked: dict[Any, list[int]] = {}
        chance: dict[Any, float] = {}
        try:
            made = TASKS[name].examples(Writer(tokenizer, BOS), length, examples, 0)
            for batch in batches(made, 64):
                for example, outcomes in zip(batch, play(Whole(model), batch), strict=True):
                    (setting,) = {probe.setting for probe in example.probes}
                    right.setdefault(setting, []).append(sum(o.right for o in outcomes))
                    asked.setdefault(setting, []).append(len(outcomes))
                    chance[setting] = example.probes[0].chance
        except DoesNotFit:
            continue
        rows += [
            {
                "task": name,
                "setting": dict(setting),
                "chance": chance[setting],
                **clustered(right[setting], asked[setting]).as_dict(),
            }
            for setting in right
        ]
    return rows


def score(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, Text],
    *,
    length: int,
    rows: int,
    examples: int,
    sequences: int,
) -> dict[str, Any]:
    """All figures of a model that runs as its variant says.

    Args:
        texts: held out.
        rows: of each text, for the loss.
        examples: of each setting of the tasks.
        sequences: of the first text, for the reach; 0: it isn't measured.
    """
    found: dict[str, Any] = {}
    for name, text in texts.items():
        values = bits(model, text, rows, length)
        found[name] = {
            "bits_per_byte": round(values.mean().item(), 5),
            "by_quarter": [round(x, 5) for x in values.mean(0).tolist()],
            "rows": [round(x, 5) for x in values.mean(1).tolist()],
        }
    found["tasks"] = tasks(model, tokenizer, length, examples)
    if sequences:
        ids = next(iter(texts.values())).spread(sequences, length)[:, :-1]
        try:
            found["reach"] = reach.measure(model, ids).as_dict()
        except ArithmeticError as error:
            found["reach"] = {"failed": str(error)}
    return found
