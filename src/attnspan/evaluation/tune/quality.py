"""What a demand is held against: perplexity, nll and accuracies, in parts of the full cache's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnspan.evaluation.intervals import Paired, bounded_exp, by_passage, ratio
from attnspan.evaluation.tasks import DoesNotFit, StreamingNll, Task
from attnspan.evaluation.tasks.base import Setting
from attnspan.evaluation.tasks.intervals import Z, wilson
from attnspan.evaluation.tasks.runner import Result, score
from attnspan.evaluation.tune.measure import FULL, Ledger
from attnspan.evaluation.tune.space import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Quality:
    """Losses of choices on one part: of a text, and of generated prompts that are its own.

    A loss is given as a ratio: 1.02 is a loss of 2 %. Of the text it is both perplexity over the
    full cache's and nll over the full cache's; of a task the accuracy that is lost, in parts of the
    full cache's, on 1.

    Attributes:
        ledger: of the part's passages.
        nll: whether the text counts.
        tasks: that count besides.
        score: a task's results under a choice.
        used: for each task the settings that the full cache can do; None: not asked yet.
    """

    ledger: Ledger
    nll: bool
    tasks: Sequence[Task]
    score: Callable[[Task, Choice], list[Result]]
    used: dict[str, list[Setting]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """What `of` gives, in its order."""
        text = ["perplexity", "nll"] if self.nll else []
        return text + [task.name for task in self.tasks if self.used[task.name]]

    def text(self, choice: Choice, count: int | None = None) -> tuple[Paired, Paired]:
        """Perplexity and nll over the full cache's."""
        count = len(self.ledger.passages) if count is None else count
        own, full = self.ledger.nlls(choice, count), self.ledger.nlls(FULL, count)
        # In the text's order: the intervals take neighbours together.
        order = spread(len(self.ledger.passages))[:count]
        own, full = ([each[i] for i in ranks(order)] for each in (own, full))
        gaps = [a - b for a, b in zip(own, full, strict=True)]
        return by_passage(gaps), ratio(own, full)

    def of(self, choice: Choice) -> tuple[Paired, ...]:
        """All that counts, on the whole part."""
        found: list[Paired] = list(self.text(choice)) if self.nll else []
        found += (
            _lost(self._values(task, choice), self._values(task, FULL))
            for task in self.tasks
            if self.used[task.name]
        )
        return tuple(found)

    def check(self, max_loss: float, examples: int) -> None:
        """Refuses a loss that so few prompts can't tell from none.

        Raises:
            ValueError: a task's prompts are too few; the sentence says how many would do.
        """
        for task in self.tasks:
            if not self.used[task.name]:
                continue
            right = math.fsum(map(math.fsum, self._values(task, FULL)))
            if wilson(0, right).high > max_loss:
                enough = math.ceil(Z * Z * (1 / max_loss - 1) * examples / right)
                raise ValueError(
                    f"examples is {examples}: {task.name} has {right:.0f} right answers under the "
                    f"full cache, too few to tell a loss of {max_loss:.3%} from none; about "
                    f"{enough} or more, or a larger max_loss, are allowed"
                )

    def find_used(self) -> list[dict[str, Any]]:
        """Asks the full cache what it can do; what it can't, and why."""
        left_out = []
        for task in self.tasks:
            results = self._results(task, FULL)
            self.used[task.name] = []
            if isinstance(results, str):
                left_out.append({"task": task.name, "setting": None, "why": results})
                continue
            for each in results:
                setting: Setting = tuple(map(tuple, each["setting"]))
                if each["can"]:
                    self.used[task.name].append(setting)
                else:
                    why = (
                        f"with the full cache {each['value']:.3f}, not surely above chance, "
                        f"{each['chance']:.3f}"
                    )
                    left_out.append({"task": task.name, "setting": dict(setting), "why": why})
        return left_out

    def _values(self, task: Task, choice: Choice) -> list[tuple[float, ...]]:
        """Of each prompt, its share of right answers in each setting.

        A prompt may be asked about several settings; where each setting has prompts of its own,
        those of the same number go together, which costs nothing: they are as independent.
        """
        results = [
            each["values"]
            for each in self._results(task, choice)
            if tuple(map(tuple, each["setting"])) in self.used[task.name]
        ]
        return list(zip(*results, strict=True))

    def _results(self, task: Task, choice: Choice) -> Any:
        """A list of results as JSON; of the full cache perhaps why there are none."""
        part, name = self.ledger.part, f"{task!r}: {choice}"
        found = self.ledger.state.get(part, name)
        if found is None:
            try:
                found = [
                    {
                        "setting": [list(pair) for pair in each.setting],
                        "can": each.can,
                        "value": each.rate.value,
                        "chance": each.chance,
                        "values": list(each.values),
                    }
                    for each in self.score(task, choice)
                ]
            except DoesNotFit as error:
                found = str(error)
            self.ledger.state.put(part, name, found)
        return found


def _lost(own: Sequence[Sequence[float]], full: Sequence[Sequence[float]]) -> Paired:
    """The accuracy that is lost, on 1, of prompts with one or more settings each.

    The upper end is that of the prompts' differences, or that of Wilson's interval of the answers
    which the full cache gets right and the choice doesn't, whichever is higher: where no prompt
    or hardly one differs, differences alone would say that nothing can be lost.
    """
    kinds = (own, full)
    means = [[math.fsum(values) / len(values) for values in kind] for kind in kinds]
    right = math.fsum(map(math.fsum, full))
    if not right:  # as of another part's prompts: nothing tells a loss
        return Paired(1.0, 0.0, bounded_exp(math.inf))
    kept = ratio(*means)
    lost = math.fsum(
        max(0.0, b - a)
        for ours, theirs in zip(*kinds, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    most = max(2 - kept.low, 1 + wilson(lost / right, right).high)
    return Paired(2 - kept.ratio, 2 - kept.high, most)


def spread(count: int) -> list[int]:
    """The numbers below `count`, of which the first few are spread over all of them.

    >>> spread(8)
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    digits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda i: int(f"{i:0{digits}b}"[::-1], 2))


def ranks(order: Sequence[int]) -> list[int]:
    """Where in `order` its numbers stand, from the least to the largest.

    >>> ranks([0, 4, 2])
    [0, 2, 1]
    """
    return sorted(range(len(order)), key=order.__getitem__)


def scorer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    examples: int,
    seed: int,
) -> Callable[[Task, Choice], list[Result]]:
    """Scores tasks on prompts of `seed`. The model is not attached."""

    def run(task: Task, choice: Choice) -> list[Result]:
        return score(
            model,
            tokenizer,
            task,
            choice.policy,
            choice.storage,
            length=length,
            examples=examples,
            seed=seed,
        )

    return run


def split_tasks(tasks: Sequence[Task | StreamingNll]) -> tuple[bool, list[Task]]:
    """Whether the text's nll counts, and the tasks that are generated."""
    generated = [task for task in tasks if not isinstance(task, StreamingNll)]
    return len(generated) < len(tasks), generated
