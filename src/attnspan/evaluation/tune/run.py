"""Tune: choose on one part of a text, test on the other, and say what was found."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from attnspan import __version__
from attnspan.cache import Dense, Storage
from attnspan.evaluation import heads as heads_of
from attnspan.evaluation import report as reports
from attnspan.evaluation.case import LEAST_LENGTH
from attnspan.evaluation.choice import Candidate, front, in_order
from attnspan.evaluation.curve import FAR
from attnspan.evaluation.intervals import Paired
from attnspan.evaluation.loop import Progress, first_token
from attnspan.evaluation.shrink import read
from attnspan.evaluation.tasks import StreamingNll, Task
from attnspan.evaluation.tasks.runner import EXAMPLES, check_length
from attnspan.evaluation.tune import search as searching
from attnspan.evaluation.tune.measure import FULL, Ledger, allocated
from attnspan.evaluation.tune.quality import Quality, scorer, split_tasks, spread
from attnspan.evaluation.tune.search import Demand, Found, Point
from attnspan.evaluation.tune.space import FAMILIES, STORAGES, Choice, Space
from attnspan.evaluation.tune.state import State
from attnspan.models import attach
from attnspan.models.anatomy import anatomy_of
from attnspan.models.cache import model_fingerprint
from attnspan.planner.configs import from_config
from attnspan.planner.engines import cache_bytes
from attnspan.policies import KeepAll

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PASSAGES = 32
"""Of each part, at most: as many as Student's intervals have degrees for."""

LEAST_PASSAGES = 4

MOST_TOKENS = 1 << 22
"""Of a text: what comes after them is not read."""

TESTED = 6
"""Candidates that the held-out part is asked about, at most: the cheapest of those that hold."""


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: BinaryIO,
    *,
    max_loss: float | None = None,
    memory: int | None = None,
    tasks: Sequence[Task | StreamingNll] = (StreamingNll(),),
    length: int | None = None,
    passages: int = PASSAGES,
    examples: int = EXAMPLES,
    families: Collection[str] = tuple(FAMILIES),
    storages: Collection[Storage] = tuple(STORAGES.values()),
    state: str | Path | None = None,
    model_name: str = "model",
    name: str = "text",
    report: Callable[[Progress], None] | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The smallest cache that loses no more than is allowed, or the best one within a memory.

    The text is cut into passages. Those of its first half are all that the search sees. What it
    comes to is tested on passages of the second half: with `max_loss` several candidates in a fixed
    order, the safest first, up to the first that fails (see `attnspan.evaluation.choice`); with
    `memory` the one that was chosen, whatever it loses there.

    Args:
        model: in eval mode, not attached; its dtype is that of the full cache.
        tokenizer: of that model.
        file: binary, UTF-8, at the text's first byte.
        max_loss: 0.02 allows 2 %: perplexity and nll each at most 1.02 times the full cache's,
            accuracies at least 0.98 times, the interval of 95 % included; prompts too few to show
            that are refused.
        memory: bytes that a cache may allocate for one sequence of `length` tokens; either this or
            `max_loss`.
        tasks: what counts; `StreamingNll()` stands for the text.
        length: tokens of a passage and of a task's prompt, of which those from the middle on are
            scored; None is the trained length, at most `tasks.runner.LONGEST`.
        passages: of each part, at most.
        examples: prompts of each setting of a task, of each part.
        families: of policies that are tried.
        storages: that are tried; those that can't hold the model's heads are left out.
        state: a file that every measurement is written to, and gone on from if it is there.
        report: is told how far each stage is.
        announce: is told once how much there is to do, in a sentence.

    Returns:
        `meta`; `full`, the full cache; `candidates`, all that were measured as a whole, each with
        its loss and on how many passages; `tested`, on the held-out part; `chosen`, or None where
        nothing meets the demand; `alone`, what single layers lose; `left_out`.

    Raises:
        ValueError: an argument is wrong, the text too short, the state another's, or the model
            can't be done exactly; one sentence says which.
        OSError: the state can't be read or written.
        ArithmeticError: the model's output is not finite.
    """
    _check(max_loss, memory, passages, examples, families, storages)
    nll, generated = split_tasks(tasks)
    if not tasks:
        raise ValueError("tasks is empty; nll, for the text, or tasks by name are allowed")
    names = [task.name for task in tasks]
    for each in names:
        if names.count(each) > 1:
            raise ValueError(f"tasks has {each} {names.count(each)} times; once is allowed")
    tokens = check_length(model, length)
    if tokens < LEAST_LENGTH:
        raise ValueError(f"length is {tokens}; at least {LEAST_LENGTH} is allowed")
    spec = from_config(model.config.to_dict())
    bos = first_token(model, tokenizer)
    parts = _parts(file, tokenizer, name, bos, tokens, passages)
    anatomy = anatomy_of(model)
    windows = tuple(layer.sliding_window for layer in anatomy.layers)
    heads = tuple(layer.spec.num_kv_heads for layer in anatomy.layers)
    fitting, left_out = _fitting(storages, [layer.spec.head_dim for layer in anatomy.layers])
    order = tuple(each for each in FAMILIES if each in families)
    kept = State(
        None if state is None else Path(state),
        {
            "model": model_fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "attnspan": __version__,
            "torch": torch.__version__,
            "length": tokens,
            "passages": [len(part) for part in parts],
            "examples": examples if generated else None,
            # Last, since it is another one too where those differ.
            "text": hashlib.sha256(
                b"".join(array("q", ids).tobytes() for part in parts for ids in part)
            ).hexdigest(),
        },
    )

    def tell(stage: str, done: int, total: int) -> None:
        if report is not None:
            report(Progress(stage, done, total, unit="passages"))

    qualities = [
        Quality(
            Ledger(model, spec, ids, part, kept),
            nll,
            generated,
            scorer(model, tokenizer, tokens, examples, seed),
        )
        for seed, (part, ids) in enumerate(zip(("choosing", "held-out"), parts, strict=True))
    ]
    choosing, testing = qualities
    retrieving = _retrieving(model, choosing.ledger, set(heads), bos)
    space = Space(windows, heads, tokens, order, fitting, retrieving)
    _check_memory(space, choosing.ledger, memory)
    if announce is not None:
        announce(_work(space, len(parts[0]), len(parts[1]), tokens))
    left_out += choosing.find_used()
    testing.used = choosing.used
    if max_loss is not None:
        choosing.check(max_loss, examples)
    if not choosing.names:
        raise ValueError(
            "tasks: the model can do none of them with the full cache at "
            f"{tokens} tokens, so nothing tells a loss"
        )
    with attach(model):
        tell("full cache", 0, len(parts[0]))
        full = choosing.ledger.nlls(FULL, len(parts[0]))
        tell("full cache", len(parts[0]), len(parts[0]))
        nats = None
        if max_loss is not None:  # in whichever reading is the stricter one
            nats = min(math.log1p(max_loss), max_loss * math.fsum(full) / len(full))
        demand = Demand(nats, memory)
        found = searching.search(choosing.ledger, space, len(parts[0]), demand, tell)
    measured = _Measured(model, choosing, testing, tell)
    candidates = measured.candidates(found.finalists)
    chosen, tested = measured.decide(candidates, max_loss, memory)
    result: dict[str, Any] = {
        "meta": reports.meta(
            "tune",
            model,
            model_name,
            name,
            length=tokens,
            scored=[choosing.ledger.scored.start, tokens - 1],
            passages=[len(part) for part in parts],
            max_loss=max_loss,
            memory=memory,
            counts=choosing.names,
            examples=examples if generated else None,
            families=list(order),
            storages=[str(each) for each in fitting],
        ),
        "full": _full(spec, choosing, testing),
        "families": found.families,
        "alone": _alone(space, found),
        "candidates": [_figures(spec, choosing, point) for point in _listed(found)],
        "tested": tested,
        "left_out": left_out,
    }
    result["chosen"] = None if chosen is None else _chosen(result, spec, measured, chosen, tokens)
    return result


def _check(
    max_loss: float | None,
    memory: int | None,
    passages: int,
    examples: int,
    families: Collection[str],
    storages: Collection[Storage],
) -> None:
    if (max_loss is None) == (memory is None):
        given = "neither is given" if memory is None else "both are given"
        raise ValueError(f"memory and max_loss: {given}; one of the two is allowed")
    if max_loss is not None and not 0 < max_loss < 1:
        raise ValueError(f"max_loss is {max_loss!r}; a share above 0 and below 1 is allowed")
    counts = {"passages": (passages, LEAST_PASSAGES), "examples": (examples, 2)}
    if memory is not None:
        counts["memory"] = memory, 1
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; a whole number of at least {least} is allowed")
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"family {family!r} is not known; allowed are {', '.join(FAMILIES)}")
    if not families or not storages:
        raise ValueError("families and storages: one at least of each is needed")


def _parts(
    file: BinaryIO,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    bos: int | None,
    length: int,
    most: int,
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Passages of the first half of a text and of the second, up to `most` of each.

    They are spread over their half, and come in an order whose first ones are spread as well.

    Raises:
        ValueError: the text is too short for `LEAST_PASSAGES` of each.
    """
    start = () if bos is None else (bos,)
    body = length - len(start)
    ids = read(file, tokenizer, name, None, MOST_TOKENS)
    half = len(ids) // body // 2
    if half < LEAST_PASSAGES:
        raise ValueError(
            f"text {name}: it has {len(ids):,} tokens; {2 * LEAST_PASSAGES * body:,} or more are "
            f"needed, for {LEAST_PASSAGES} passages of {length:,} tokens to choose on and as many "
            "to test on (a smaller length needs fewer)"
        )
    count = min(most, half)
    places = [half * i // count for i in spread(count)]
    late = len(ids) // body - half
    return (
        [(*start, *ids[place * body : (place + 1) * body]) for place in places],
        [(*start, *ids[(late + p) * body : (late + p + 1) * body]) for p in places],
    )


def _retrieving(
    model: PreTrainedModel, ledger: Ledger, kv_heads: set[int], bos: int | None
) -> tuple[tuple[bool, ...], ...]:
    """Of each layer, which KV heads retrieve on some passages; empty where layers have unlike ones.

    The model is not attached.
    """
    if len(kv_heads) > 1:
        return ()
    found = ledger.state.get(ledger.part, "retrieving")
    if found is None:
        ids = [
            torch.tensor(passage, device=model.device)
            for passage in ledger.passages[: searching.FIRST]
        ]
        found = heads_of.measure(model, ids, bos=bos).retrieving(*kv_heads).tolist()
        ledger.state.put(ledger.part, "retrieving", found)
    return tuple(map(tuple, found))


def _fitting(
    storages: Collection[Storage], head_dims: Sequence[int]
) -> tuple[tuple[Storage, ...], list[dict[str, Any]]]:
    """Storages that can hold the model's heads, and why others can't."""
    fitting, left_out = [], []
    for storage in storages:
        try:
            for head_dim in set(head_dims):
                storage.check(head_dim)
        except ValueError as error:
            left_out.append({"storage": str(storage), "why": str(error)})
        else:
            fitting.append(storage)
    if not fitting:
        raise ValueError(left_out[0]["why"])
    return tuple(fitting), left_out


def _check_memory(space: Space, ledger: Ledger, memory: int | None) -> None:
    """Refuses a memory that no cache of those tried would fit in, before the work."""
    if memory is None:
        return
    smallest = min(
        (
            Choice(policy, storage)
            for storage in space.storages
            for family in space.families
            for budget in (*space.budgets[-1:], space.top)
            if (policy := space.member(family, budget)) is not None
        ),
        key=lambda choice: sum(ledger.bytes(choice)),
    )
    least = sum(ledger.bytes(smallest))
    if memory < least:
        raise ValueError(
            f"memory is {memory:,} bytes; the smallest cache that is tried, {smallest.policy} in "
            f"{smallest.storage}, takes {least:,} for {space.length:,} tokens, and as many or more "
            "are allowed"
        )


def _work(space: Space, choosing: int, testing: int, length: int) -> str:
    """About how much there is to do: candidates depend on what is measured."""
    first = min(searching.FIRST, choosing)
    groups, budgets = len(space.groups), len(space.few_budgets)
    split = [group for group in range(groups) if len(space.heads(group)) > 1][: searching.SPLIT]
    families = len(space.families) + min(searching.FAMILIES_KEPT, len(space.families)) * groups
    heads = sum(len(space.heads(group)) for group in split) / 2
    proxies = (families + heads + len(searching.PYRAMIDS)) * budgets
    proxies += len(space.budgets) + len(space.storages)
    changes = searching.REFINED * (2 * groups + searching.FINALISTS)
    rounds = (40 + 2 * (20 + changes)) * first + 2 * searching.FINALISTS * choosing
    total = round(proxies * first + rounds + choosing + TESTED * testing)
    return (
        f"about {total:,} passages of {length:,} tokens go through the model, "
        f"{total * length / 1e6:,.1f} million tokens"
    )


class _Measured:
    """The search's last candidates, judged on the part that they were chosen on and on the other.

    Tasks attach the model by themselves, so here it is attached only while text goes through it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        choosing: Quality,
        testing: Quality,
        tell: searching.Tell,
    ) -> None:
        self.choosing, self.testing, self.tell = choosing, testing, tell
        self._model = model
        self.held_out: dict[Choice, tuple[Paired, ...]] = {}

    def _of(self, quality: Quality, choice: Choice) -> tuple[Paired, ...]:
        with attach(self._model):
            quality.text(choice)
        return quality.of(choice)

    def candidates(self, points: Sequence[Point]) -> list[Candidate]:
        found = []
        for done, point in enumerate(points):
            if self.choosing.tasks:
                self.tell("tasks", done, len(points))
            choice = point.choice
            first = self._of(self.choosing, choice)
            found.append(Candidate(choice.policy, point.bytes, first, choice.storage))
        return found

    def decide(
        self, candidates: Sequence[Candidate], max_loss: float | None, memory: int | None
    ) -> tuple[Candidate | None, list[dict[str, Any]]]:
        """What is taken, and what the held-out part gave, as JSON."""
        if max_loss is not None:
            allowed = 1 + max_loss
            asked = front(candidates, allowed)[-TESTED:]
        else:
            assert memory is not None
            fitting = [each for each in candidates if each.bytes <= memory]
            asked = sorted(fitting, key=lambda each: (each.high, each.bytes))[:1]
            allowed = math.inf  # one was chosen, and is told of whatever it loses
        total, done = len(asked) * len(self.testing.ledger.passages), 0

        def measure(each: Candidate) -> tuple[Paired, ...]:
            nonlocal done
            self.tell("held-out part", done, total)
            found = self._of(self.testing, Choice(each.policy, each.storage))
            self.held_out[Choice(each.policy, each.storage)] = found
            done += len(self.testing.ledger.passages)
            return found

        chosen, told = in_order(asked, measure, allowed)
        self.tell("held-out part", total, total)
        for row, each in zip(told, asked, strict=True):
            row["storage"] = str(each.storage)
            row["bytes"] = row.pop("bytes_far")
            for half, part in (("first_half", "choosing"), ("second_half", "held_out")):
                row[part] = _named(self.choosing.names, row.pop(half))
            if memory is not None:
                del row["holds"]
        return chosen, told


def _named(names: Sequence[str], pairs: Sequence[Any] | None) -> dict[str, Any] | None:
    return None if pairs is None else dict(zip(names, pairs, strict=True))


def _full(spec: Any, choosing: Quality, testing: Quality) -> dict[str, Any]:
    """The full cache: bytes of its tokens alone, as allocated, and how well it foretells."""
    ledger = choosing.ledger
    whole = cache_bytes(spec, ledger.length, itemsize=ledger.model.dtype.itemsize).total
    found: dict[str, Any] = {
        "policy": str(KeepAll()),
        "storage": str(Dense()),
        "bytes": whole,
        "bytes_allocated": sum(ledger.bytes(FULL)),
    }
    for part, quality in (("choosing", choosing), ("held_out", testing)):
        known = quality.ledger.state.get(quality.ledger.part, str(FULL))
        nll = None if known is None else math.fsum(known) / len(known)
        found[f"nll_{part}"] = nll
    return found


def _alone(space: Space, found: Found) -> list[dict[str, Any]]:
    return [
        {
            "layers": list(group),
            "nats": {
                family: {str(budget): loss for budget, loss in rows[i].items()}
                for family, rows in found.alone.items()
            },
        }
        for i, group in enumerate(space.groups)
    ]


def _listed(found: Found) -> list[Point]:
    return sorted(found.points, key=lambda point: (point.bytes, point.loss))


def _figures(spec: Any, choosing: Quality, point: Point) -> dict[str, Any]:
    """A candidate as JSON, by what its own passages say."""
    perplexity, nll = choosing.text(point.choice, len(point.losses))
    return {
        "policy": str(point.choice.policy),
        "storage": str(point.choice.storage),
        "bytes": point.bytes,
        "bytes_far": sum(allocated(spec, point.choice, FAR, choosing.ledger.model.dtype)),
        "passages": len(point.losses),
        "perplexity": perplexity.as_dict(),
        "nll": nll.as_dict(),
    }


def _chosen(
    result: dict[str, Any], spec: Any, measured: _Measured, chosen: Candidate, tokens: int
) -> dict[str, Any]:
    choice = Choice(chosen.policy, chosen.storage)
    names = measured.choosing.names
    held_out = measured.held_out[choice]
    found = {
        "policy": str(chosen.policy),
        "storage": str(chosen.storage),
        "bytes": chosen.bytes,
        "bytes_far": sum(allocated(spec, choice, FAR, measured.testing.ledger.model.dtype)),
        "tokens": tokens,
        "times_fewer": result["full"]["bytes"] / chosen.bytes,
        "choosing": _named(names, [pair.as_dict() for pair in chosen.first]),
        "held_out": _named(names, [pair.as_dict() for pair in held_out]),
    }
    if "nll" not in names:
        found["held_out_text"] = _named(
            ("perplexity", "nll"), [pair.as_dict() for pair in measured.testing.text(choice)]
        )
    return found
