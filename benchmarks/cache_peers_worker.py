"""One library's caches over inputs that all libraries get: run by cache_peers.py in an environment
of its own.

It needs torch, transformers and the one library. `python cache_peers_worker.py LIBRARY INPUTS`
prints the versions, and then each row as it is measured, a line of JSON each.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

Ids = Sequence[int]
LAST = 80


class Session(Protocol):
    """A model over one batch of rows of one length, with its cache."""

    def context(self, ids: Tensor) -> None:
        """Takes in a prompt `(rows, n)` as the library is made to."""
        ...

    def feed(self, ids: Tensor) -> Tensor:
        """Takes in `(rows, n)` more tokens; the logits after each, `(rows, n, vocabulary)`."""
        ...

    def tried(self, ids: Tensor) -> Tensor:
        """What `feed` gives, after which the cache is as it was."""
        ...

    def held(self) -> Sequence[Any]:
        """The objects whose tensors stay from one call to the next."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Row:
    """One way to call one library.

    Attributes:
        name: as its own documentation writes it.
        kind: "whole" keeps every token; "cut" cuts the prompt once and then grows; "bounded" holds
            no more than its budget at any time.
        opened: a session whose `tried` takes up to so many tokens.
        steps: what its results depend on how calls cut the input, so that tokens after the prompt
            go in one at a time; it says why.
    """

    name: str
    kind: str
    opened: Callable[[int], Session]
    steps: str = ""


class Plain:
    """A transformers model with one of its own caches, perhaps under hooks.

    Args:
        cache: an empty one.
        pressed: what is entered for the prompt alone.
        always: what is entered for all of the session; `tried` puts its `state` back.
        also: gives what is held elsewhere.
        stepped: tokens after the prompt go in one at a time.
        closed_up: positions go on from the tokens held, not from those seen.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        *,
        pressed: Callable[[], Any] | None = None,
        always: Callable[[], Any] | None = None,
        state: Any = None,
        also: Callable[[], Any] = tuple,
        stepped: bool = False,
        closed_up: bool = False,
    ) -> None:
        self.model, self.cache, self.pressed, self.stepped = model, cache, pressed, stepped
        self.state, self.also, self.closed_up, self.seen = state, also, closed_up, 0
        self.stack = ExitStack()
        if always is not None:
            self.stack.enter_context(always())

    def context(self, ids: Tensor) -> None:
        with ExitStack() as stack:
            if self.pressed is not None:
                stack.enter_context(self.pressed())
            self._forward(ids, logits_to_keep=1)

    def feed(self, ids: Tensor) -> Tensor:
        if not self.stepped:
            return self._forward(ids)
        return torch.cat([self._forward(one) for one in ids.split(1, 1)], 1)

    def _forward(self, ids: Tensor, **options: Any) -> Tensor:
        width = ids.shape[1]
        start = self.cache.get_seq_length() if self.closed_up else self.seen
        places = torch.arange(start, start + width)[None].expand(len(ids), -1)
        self.seen += width
        return self.model(
            input_ids=ids, past_key_values=self.cache, position_ids=places, **options
        ).logits

    def tried(self, ids: Tensor) -> Tensor:
        cache, seen = self.cache, self.seen
        state = None if self.state is None else copy.deepcopy(vars(self.state))
        self.cache = _twin(cache)
        found = self.feed(ids)
        self.cache, self.seen = cache, seen
        if state is not None:
            vars(self.state).update(state)
        return found

    def held(self) -> Sequence[Any]:
        return (self.cache, self.state, self.also())

    def close(self) -> None:
        self.stack.close()


def _twin(cache: Any) -> Any:
    """A cache that can go on without changing the other one."""
    if any(isinstance(layer, StaticLayer) for layer in cache.layers):
        return copy.deepcopy(cache)
    # The others' layers put new tensors in the places of old ones.
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def nbytes(roots: Sequence[Any]) -> int:
    """Bytes of all memory that tensors in these objects hold, each piece once.

    Memory counts whole, also where a tensor is a view of a part. A module's parameters don't count.
    """
    seen: set[int] = set()
    memory: dict[int, int] = {}
    todo = list(roots)
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, nn.Module | type | str | int | float):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            if hasattr(thing, "__tensor_flatten__"):
                todo += [getattr(thing, name) for name in thing.__tensor_flatten__()[0]]
            else:
                storage = thing.untyped_storage()
                memory[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, list | tuple | set | frozenset):
            todo += thing
        else:
            todo += list(getattr(thing, "__dict__", {}).values())
            slots = (s for c in type(thing).__mro__ for s in getattr(c, "__slots__", ()))
            todo += [getattr(thing, name) for name in slots if hasattr(thing, name)]
    return sum(memory.values())


def batched(items: Sequence[Any], rows: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), rows):
        yield items[first : first + rows]


def nats(logits: Tensor, wanted: Tensor) -> Tensor:
    """`(rows, n)` in float64."""
    found = logits.double()
    chosen = found.gather(2, wanted[..., None])[..., 0]
    return found.logsumexp(2) - chosen


def passages(row: Row, ids: Sequence[Ids], context: int, first: int, rows: int) -> list[float]:
    """Each passage's mean nll of its tokens from `first` on, after a prompt of `context`."""
    means: list[float] = []
    for batch in batched(ids, rows):
        tokens, found = torch.tensor(batch), []
        with closing(row.opened(0)) as session:
            session.context(tokens[:, :context])
            for start in range(context, tokens.shape[1] - 1, 512):
                stop = min(start + 512, tokens.shape[1] - 1)
                logits = session.feed(tokens[:, start:stop])
                skip = max(0, first - 1 - start)
                found.append(nats(logits, tokens[:, start + 1 : stop + 1])[:, skip:])
        means += torch.cat(found, 1).mean(1).tolist()
    return means


def answers(row: Row, prompts: Sequence[dict[str, Any]], rows: int) -> list[list[bool]]:
    """What was right in each prompt, which all have as many tokens and questions.

    The prompt goes in, is cut, and only then the question comes. A question's `probes` are places
    in it at which one of the candidates' single tokens comes next; with `choices` one of these
    comes after it.
    """
    found: list[list[bool]] = []
    for batch in batched(prompts, rows):
        choices = [choice for prompt in batch for choice in prompt.get("choices", ())]
        with closing(row.opened(max(map(len, choices), default=0))) as session:
            session.context(torch.tensor([prompt["context"] for prompt in batch]))
            logits = session.feed(torch.tensor([prompt["question"] for prompt in batch]))
            if choices:
                found += [[right] for right in _chosen(session, batch, logits[:, -1:])]
                continue
            for prompt, own in zip(batch, logits, strict=True):
                places, candidates = prompt["probes"], torch.tensor(prompt["candidates"])
                best = candidates[own[[p - 1 for p in places]][:, candidates].argmax(1)]
                wanted = torch.tensor([prompt["question"][p] for p in places])
                found.append((best == wanted).tolist())
    return found


def _chosen(session: Session, batch: Sequence[dict[str, Any]], before: Tensor) -> list[bool]:
    scores = []
    for one in range(len(batch[0]["choices"])):
        tokens = torch.tensor([prompt["choices"][one] for prompt in batch])
        logits = torch.cat([before, session.tried(tokens[:, :-1])], 1)
        scores.append(-nats(logits, tokens).sum(1))
    best = torch.stack(scores, 1).argmax(1).tolist()
    return [number == prompt["right"] for number, prompt in zip(best, batch, strict=True)]


def memory(row: Row, ids: Ids, context: int) -> dict[str, int]:
    """Bytes of one row after the prompt, at the end, and the most of both and of the last tokens.

    The last tokens go in one at a time: enough of them that a cache which decides every so many
    tokens does so.
    """
    tokens = torch.tensor([ids])
    steady = max(context, len(ids) - LAST)
    with closing(row.opened(0)) as session:
        session.context(tokens[:, :context])
        sizes = [nbytes(session.held())]
        for start in range(context, steady, 512):
            session.feed(tokens[:, start : min(start + 512, steady)])
        for one in tokens[:, steady:].split(1, 1):
            session.feed(one)
            sizes.append(nbytes(session.held()))
    return {"after_context": sizes[0], "most": max(sizes), "end": sizes[-1]}


def speed(row: Row, ids: Ids, context: int, steps: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of one row: the prompt, cutting included, and then one token at a time.

    Medians of wall time, and of this process's processor time, which other processes disturb less;
    the load is the machine's over the last minute.
    """
    tokens = torch.tensor([ids])
    found: dict[str, list[float]] = {}
    for number in range(repeats + 1):
        with closing(row.opened(0)) as session:
            times = [_clocks()]
            session.context(tokens[:, :context])
            times.append(_clocks())
            for place in range(context, context + steps):
                session.feed(tokens[:, place : place + 1])
            times.append(_clocks())
        if not number:  # the first compiles and warms up
            continue
        for what, count, began, ended in zip(
            ("prompt", "decode"), (context, steps), times, times[1:], strict=False
        ):
            for clock, a, b in zip(("wall", "processor"), began, ended, strict=True):
                found.setdefault(f"{what}_{clock}", []).append(count / (b - a))
    middle = {name: round(statistics.median(rates), 1) for name, rates in found.items()}
    spread = [round(rate(found["decode_wall"]), 1) for rate in (min, max)]
    return {**middle, "decode_wall_spread": spread, "load": os.getloadavg()[0]}


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def measure(library: str, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every row of one library, at every setting; a row that fails has its own error instead."""
    rows_of = importlib.import_module(f"cache_peers_{library}").rows
    for setting in given["settings"]:
        torch.set_num_threads(setting.get("threads", given["threads"]))
        for row in rows_of(given["model"], setting):
            entry: dict[str, Any] = {
                "library": library,
                "setting": setting["name"],
                "budget": setting["budget"],
                "row": row.name,
                "kind": row.kind,
                "steps": row.steps,
            }
            # What keeps everything has no budget.
            again = row.kind == "whole" and not setting["whole"]
            key = [entry[name] for name in ("library", "setting", "budget", "row")]
            if again or key in given["known"] or given["only"] not in row.name:
                continue
            began = time.perf_counter()
            try:
                with torch.inference_mode():
                    entry |= _figures(row, setting, given)
            except Exception as error:  # a peer's own error is a result
                entry["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            yield {**entry, "seconds": round(time.perf_counter() - began, 1)}


def _figures(row: Row, setting: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    context, size = setting["context"], setting["rows"]
    if "passages" in setting:
        ids = given[setting["passages"]]
        found["nll"] = passages(row, ids, context, setting["first"], size)
        # A bounded cache has long settled by then.
        last = context + 512 if row.kind == "bounded" else -1
        found["bytes"] = memory(row, ids[0][:last], context)
    for task in setting.get("tasks", ()):
        found[task] = answers(row, given[task], size)
    if setting.get("tasks"):
        prompt = given[setting["tasks"][0]][0]
        ids = [*prompt["context"], *prompt["question"]]
        found["bytes"] = memory(row, ids, len(prompt["context"]))
    if "steps" in setting:
        ids = given[setting["speed"]][0]
        found["speed"] = speed(row, ids, context, setting["steps"], setting["repeats"])
    return found


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "kvpress", "optimum-quanto", "hqq", "attnspan"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(arguments: Sequence[str]) -> None:
    library, inputs = arguments
    given = json.loads(Path(inputs).read_text())
    # transformers 5.24 renames the argument that all versions take.
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated")
    print(json.dumps(versions()), flush=True)
    for row in measure(library, given):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
