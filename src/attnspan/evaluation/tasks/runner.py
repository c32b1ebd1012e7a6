"""Score policies on tasks: the whole cache first, then the others where it can do the task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnspan.cache import Dense, Storage
from attnspan.evaluation import report as reports
from attnspan.evaluation.loop import Progress, first_token, trained_length
from attnspan.evaluation.shrink import frequency_nll
from attnspan.evaluation.tasks import TASKS, DoesNotFit, StreamingNll, Task, Writer
from attnspan.evaluation.tasks.base import Setting
from attnspan.evaluation.tasks.intervals import Rate, clustered, mean
from attnspan.evaluation.tasks.scorer import CacheSession, batches, play, rollback
from attnspan.models import Cache, attach
from attnspan.policies import KeepAll, PerLayer, Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = 40
"""Of each setting."""

LONGEST = {"cpu": 1024, "cuda": 4096}
"""Tokens of a prompt by default, where the trained length is no less."""

# Tokens, and prompts, that go through the model side by side.
_CPU_TOKENS, _CUDA_TOKENS, _PROMPTS = 8192, 65_536, 32


@dataclass(frozen=True)
class Result:
    """How one policy does in one setting of a task.

    Attributes:
        setting: `(("depth", 0.5),)` say.
        chance: the accuracy of a guess; of nll, that of the tokens' frequencies.
        rate: accuracy, or nats a token, and its 95 % interval over prompts.
        values: of each prompt, its share of right answers or its nll, in the order of the prompts,
            which are the same for all policies: so they can be paired.
        asked: answers asked for, of all prompts together; of nll, tokens scored.
        exact: the share that greedy decoding would have written; None for nll.
        distance: the least and the most tokens from where an answer was last seen to its question.
        less: whether less is better.
    """

    setting: Setting
    chance: float
    rate: Rate
    values: tuple[float, ...]
    asked: int
    exact: float | None
    distance: tuple[int, int] | None
    less: bool

    @property
    def can(self) -> bool:
        """Whether the whole interval is better than chance."""
        return self.rate.high < self.chance if self.less else self.rate.low > self.chance


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | StreamingNll,
    policy: Policy | PerLayer,
    storage: Storage | None = None,
    *,
    length: int,
    examples: int = EXAMPLES,
    seed: int = 0,
    settings: Collection[Setting] | None = None,
) -> list[Result]:
    """One task through a cache under `policy`, in memory that is the cache's of a few prompts.

    A prompt goes in by chunks, and only the candidates' tokens by themselves.

    Args:
        model: in eval mode, not attached.
        storage: how keys and values are held; None: as the model computes them.
        length: tokens of a prompt, its answers included.
        examples: prompts of each setting.
        seed: of what is drawn at random.
        settings: only these; None: all that fit the length.

    Raises:
        DoesNotFit: the task needs a greater length.
        ValueError: the model or the policy can't be used.
        ArithmeticError: the model's output is not finite.
    """
    bos = first_token(model, tokenizer)
    if isinstance(task, StreamingNll):
        passages = task.passages(tokenizer, bos, length, examples, seed)
        with attach(model):
            found = task.measure(model, Cache(model, policy, storage), passages)
        frequencies = frequency_nll(passages)
        results = [
            Result(
                (("from", start), ("to", stop - 1)),
                sum(frequencies) / len(passages),
                mean(values),
                tuple(values),
                (stop - start) * len(passages),
                None,
                None,
                less=True,
            )
            for (start, stop), values in zip(task.spans(length), found, strict=True)
        ]
        return [r for r in results if settings is None or r.setting in settings]
    tokens = _CUDA_TOKENS if model.device.type == "cuda" else _CPU_TOKENS
    rows = max(1, min(_PROMPTS, tokens // length))
    tallies: dict[Setting, _Tally] = {}
    cache: Cache | None = None
    made = task.examples(Writer(tokenizer, bos), length, examples, seed)
    if settings is not None:
        made = (e for e in made if any(probe.setting in settings for probe in e.probes))
    with attach(model):
        for batch in batches(made, rows):
            if cache is None or rollback(batch) > cache.rollback:
                cache = Cache(model, policy, storage, rollback=rollback(batch))
            cache.reset()
            for example, outcomes in zip(
                batch, play(CacheSession(model, cache), batch), strict=True
            ):
                for setting in dict.fromkeys(probe.setting for probe in example.probes):
                    if settings is None or setting in settings:
                        pairs = zip(example.probes, outcomes, strict=True)
                        asked = [(p, o) for p, o in pairs if p.setting == setting]
                        tallies.setdefault(setting, _Tally()).add(asked)
    return [tally.result(setting) for setting, tally in tallies.items()]


class _Tally:
    """Outcomes of one setting, prompt by prompt."""

    def __init__(self) -> None:
        self.right: list[int] = []
        self.asked: list[int] = []
        self.exact = 0
        self.chance = 0.0
        self.distances: list[int] = []

    def add(self, asked: Sequence[tuple[Any, Any]]) -> None:
        self.right.append(sum(outcome.right for _, outcome in asked))
        self.asked.append(len(asked))
        self.exact += sum(outcome.exact for _, outcome in asked)
        self.chance += sum(probe.chance for probe, _ in asked)
        self.distances += [probe.distance for probe, _ in asked]

    def result(self, setting: Setting) -> Result:
        asked = sum(self.asked)
        return Result(
            setting,
            self.chance / asked,
            clustered(self.right, self.asked),
            tuple(r / n for r, n in zip(self.right, self.asked, strict=True)),
            asked,
            self.exact / asked,
            (min(self.distances), max(self.distances)),
            less=False,
        )


def lost(result: Result, whole: Result) -> Rate:
    """What a policy loses against the whole cache, prompt by prompt: points of accuracy, or nats.

    Two standard errors on either side; where no prompt differs the interval is a point, which says
    no more than that.
    """
    sign = -1 if whole.less else 1
    pairs = zip(whole.values, result.values, strict=True)
    return mean([sign * (full - own) for full, own in pairs])


def named(names: str) -> list[Task | StreamingNll]:
    """Tasks from names with commas.

    Raises:
        ValueError: one isn't known.

    >>> [task.name for task in named("copy, passkey")]
    ['copy', 'passkey']
    """
    found = {}
    for name in map(str.strip, names.split(",")):
        if name not in TASKS:
            raise ValueError(f"task {name!r} is not known; allowed are {', '.join(TASKS)}")
        found[name] = TASKS[name]
    return list(found.values())


def check_length(model: PreTrainedModel, length: int | None) -> int:
    """`length`, or the default one.

    Raises:
        ValueError: it is more than the model was trained for, so the whole cache would be no
            measure of the others.
    """
    trained = trained_length(model)
    if length is None:
        longest = LONGEST["cuda" if model.device.type == "cuda" else "cpu"]
        return longest if trained is None else min(trained, longest)
    if trained is not None and length > trained:
        raise ValueError(
            f"length is {length}; at most {trained} is allowed, the positions that the model was "
            "trained for, since the whole cache is what policies are held against"
        )
    return length


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task | StreamingNll],
    kept: Sequence[tuple[Policy | PerLayer, Storage]],
    *,
    model_name: str = "model",
    length: int | None = None,
    examples: int = EXAMPLES,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Everything that `attnspan tasks` reports, as JSON.

    The cache that keeps all, in the model's dtype, goes first. Settings in which it is not surely
    better than chance (the lower end of its interval) are left out: no policy runs there.

    Args:
        model: in eval mode, not attached.
        kept: policies and storages; that which keeps all in the model's dtype need not be among
            them.
        length: tokens of a prompt, at most the trained length; None is that, at most `LONGEST`.

    Returns:
        `meta`; `rows`, one a setting: its results begin with the whole cache's, and end there
        where `used` is false; `left_out`: what no policy was judged by, and why.

    Raises:
        ValueError: a count, the length, the model or a policy can't be used.
        ArithmeticError: the model's output is not finite.
    """
    for name, value, least in (("examples", examples, 2), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; a whole number of at least {least} is allowed")
    tokens = check_length(model, length)
    everything = KeepAll(), Dense()
    others = [pair for pair in dict.fromkeys(kept) if pair != everything]
    for policy, storage in others:
        Cache(model, policy, storage)  # what can't be done is refused before the work
    rows, left_out = [], []
    total, done = len(tasks) * (1 + len(others)), 0

    def tell(what: str, steps: int) -> None:
        nonlocal done
        if report is not None:
            report(Progress("tasks", done, total, unit=f"runs ({what})"))
        done += steps

    for task in tasks:
        options: dict[str, Any] = {"length": tokens, "examples": examples, "seed": seed}
        tell(f"{task.name}, {everything[0]}", 1)
        try:
            whole = score(model, tokenizer, task, *everything, **options)
        except DoesNotFit as error:
            left_out.append({"task": task.name, "setting": None, "why": str(error)})
            done += len(others)
            continue
        used = [result.setting for result in whole if result.can]
        results: list[tuple[tuple[Policy | PerLayer, Storage], list[Result]]] = []
        for pair in others:
            tell(f"{task.name}, {pair[0]}", 1)
            if used:
                found = score(model, tokenizer, task, *pair, settings=used, **options)
                results.append((pair, found))
        for result in whole:
            row = _row(task.name, result)
            row["results"] = [_figures(everything, result, None)]
            for pair, found in results:
                row["results"] += [
                    _figures(pair, own, lost(own, result))
                    for own in found
                    if own.setting == result.setting
                ]
            rows.append(row)
            if not result.can:
                why = _why(result)
                left_out.append({"task": task.name, "setting": row["setting"], "why": why})
    tell("done", 0)
    meta = reports.meta(
        "tasks", model, model_name, "generated", length=tokens, examples=examples, seed=seed
    )
    return {"meta": meta, "rows": rows, "left_out": left_out}


def _row(task: str, result: Result) -> dict[str, Any]:
    return {
        "task": task,
        "setting": dict(result.setting),
        "measure": "nll" if result.less else "accuracy",
        "chance": result.chance,
        "asked": result.asked,
        "distance": result.distance,
        "used": result.can,
    }


def _figures(
    pair: tuple[Policy | PerLayer, Storage], result: Result, against: Rate | None
) -> dict[str, Any]:
    return {
        "policy": str(pair[0]),
        "storage": str(pair[1]),
        **result.rate.as_dict(),
        "exact": result.exact,
        "lost": None if against is None else against.as_dict(),
        "prompts": list(result.values),
    }


def _why(result: Result) -> str:
    rate = result.rate
    if result.less:
        return (
            f"with the whole cache {rate.value:.3f} nats a token ({rate.low:.3f} to "
            f"{rate.high:.3f}), not surely less than the {result.chance:.3f} of the tokens' "
            "frequencies"
        )
    return (
        f"with the whole cache {rate.value:.3f} ({rate.low:.3f} to {rate.high:.3f}), not surely "
        f"above chance, {result.chance:.3f}"
    )
