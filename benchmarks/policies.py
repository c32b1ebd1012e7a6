"""Which policies are worth their bytes: the bundled model's nll and tasks at 1,024 tokens.

Every policy runs at a few budgets on the same prompts. A point is on the front of a measure where
no other with as few bytes does as well. Retrieval heads are found first, on other text.
TOVA and keys of low norm, which are on none, are in the results and no longer in the package.
Writes benchmarks/results/policies.json, a quarter of an hour of one core; --report prints the
tables of docs/policies.md from it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, write

from attnspan.cache import Dense
from attnspan.evaluation import heads
from attnspan.evaluation.heads import Heads
from attnspan.evaluation.loop import first_token
from attnspan.evaluation.tasks import (
    CommonWords,
    Copy,
    FrequentWords,
    Needle,
    Passkey,
    StreamingNll,
)
from attnspan.evaluation.tasks.base import Setting
from attnspan.evaluation.tasks.intervals import Rate, mean
from attnspan.evaluation.tasks.runner import Result, score
from attnspan.models import Cache, attach
from attnspan.models.loading import load
from attnspan.planner.configs import from_config
from attnspan.planner.engines import cache_bytes
from attnspan.policies import (
    Compressive,
    HeavyHitter,
    KeepAll,
    PerLayer,
    Policy,
    SinkWindow,
    SnapKV,
    pyramid,
)

LENGTH = 1024
BUDGETS = (64, 128, 256)
LARGE = 512
"""A budget for those that do best below it."""
BLOCK = 16
"""Small enough that the slots of an unfinished block weigh little at the least budget."""
SINKS = 4
# What is asked, and of how many prompts in each setting. Distances and depths that lie inside a
# small window would tell policies apart from nothing.
TASKS = (
    (StreamingNll(parts=2), 8),
    (Passkey(depths=(0.0, 0.5)), 6),
    (Needle(depths=(0.0, 0.5)), 6),
    (Copy(distances=(512, 768)), 4),
    (CommonWords(), 4),
    (FrequentWords(), 8),
)
NAMES = tuple(task.name for task, _ in TASKS)
# Passages for finding heads: other seeds, and so other lines, than those of the tasks.
OTHER_SEED, OTHER = 99, 4


@dataclass(frozen=True)
class Point:
    """A policy at a budget of slots."""

    family: str
    budget: int
    policy: Policy | PerLayer


def streaming(budget: int) -> SinkWindow:
    return SinkWindow(SINKS, budget - SINKS)


def halves(budget: int) -> tuple[int, int]:
    """Slots that are picked, and a window, so that `budget` holds both and a block."""
    picked = (budget - BLOCK) // 2
    return picked, budget - BLOCK - picked + 1


def single(budget: int) -> dict[str, Policy]:
    """Policies of `budget` slots, blocks that aren't decided yet included."""
    picked, window = halves(budget)
    memory = budget // 4
    return {
        "sinks + window": streaming(budget),
        "heavy hitters": HeavyHitter(picked, window, BLOCK),
        "compressive": Compressive(budget - SINKS - memory - 3 + 1 - BLOCK, memory, 4, block=BLOCK),
        "SnapKV": SnapKV(picked, window, observed=BLOCK, block=BLOCK),
    }


def points(found: Heads, kv_heads: int) -> Iterator[Point]:
    """All that is measured."""
    retrieval = found.retrieving(kv_heads)
    layers = len(retrieval)
    for budget in BUDGETS:
        for family, policy in single(budget).items():
            yield Point(family, budget, policy)
    for family in ("sinks + window", "heavy hitters", "SnapKV"):
        yield Point(family, LARGE, single(LARGE)[family])
    for budget in BUDGETS[:2]:
        for family, last in (("pyramid", 0.5), ("pyramid, upside down", 1.5)):
            yield Point(family, budget, pyramid(streaming, budget, layers, last=last))
    for budget in (32, *BUDGETS):
        near = streaming(budget)
        yield Point("retrieval heads", budget, found.policy(kv_heads, KeepAll(), near))
        if budget in BUDGETS[:2]:
            full = tuple(KeepAll() if layer.any() else near for layer in retrieval)
            yield Point("retrieval layers", budget, PerLayer(full))
    yield Point(
        "retrieval heads, others SnapKV",
        64,
        found.policy(kv_heads, KeepAll(), single(64)["SnapKV"]),
    )
    # Bounded, for streams without end.
    for family in ("sinks + window", "SnapKV", "heavy hitters"):
        name = f"retrieval heads of {LARGE}, {family}"
        yield Point(name, 64, found.policy(kv_heads, single(LARGE)[family], streaming(64)))


def bounded(policy: Policy | PerLayer) -> bool:
    each = policy.policies if isinstance(policy, PerLayer) else (policy,)
    return all(one.capacity is not None for one in each)


def look(model: Any, tokenizer: Any) -> Heads:
    """What the heads attend to on passages that no task uses."""
    bos = first_token(model, tokenizer)
    passages = StreamingNll().passages(tokenizer, bos, LENGTH, OTHER, OTHER_SEED)
    return heads.measure(model, [torch.tensor(p.ids) for p in passages], bos=bos)


def allocated(model: Any, policy: Policy | PerLayer) -> int:
    """Bytes of a cache in bf16 after all tokens: what `attnspan plan` counts."""
    spec = from_config(model.config.to_dict())
    return cache_bytes(spec, LENGTH, policy=policy, engine="attnspan").total


def check_bytes(model: Any, policy: Policy | PerLayer) -> None:
    """Holds the plan against a cache that has taken in as many tokens.

    Raises:
        AssertionError: they differ.
    """
    spec, itemsize = from_config(model.config.to_dict()), model.dtype.itemsize
    cache = Cache(model, policy, Dense())
    with attach(model), torch.inference_mode():
        model(torch.arange(LENGTH)[None] % 256, past_key_values=cache, logits_to_keep=1)
    planned = cache_bytes(spec, LENGTH, policy=policy, itemsize=itemsize, engine="attnspan")
    assert planned.total == cache.nbytes, f"{policy}: {planned.total} planned, {cache.nbytes} held"


def measured(
    model: Any, tokenizer: Any, policy: Policy | PerLayer, whole: dict[str, list[Result]] | None
) -> dict[str, list[Result]]:
    """Each task's results; where `whole` has the whole cache's, of the settings that it can do."""
    found = {}
    for task, examples in TASKS:
        settings: list[Setting] | None = None
        if whole is not None:
            settings = [result.setting for result in whole[task.name]]
        results = score(
            model,
            tokenizer,
            task,
            policy,
            length=LENGTH,
            examples=examples,
            settings=settings,
        )
        if whole is None:
            results = [result for result in results if result.can]
        found[task.name] = results[1:] if task.name == "nll" and whole is None else results
    return found


def values(results: Sequence[Result]) -> list[float]:
    """Of each prompt in each setting, its share of right answers, or its nll."""
    return [value for result in results for value in result.values]


def figures(results: dict[str, list[Result]], whole: dict[str, list[Result]]) -> dict[str, Any]:
    row = {}
    for name in NAMES:
        own, full = values(results[name]), values(whole[name])
        sign = 1 if name == "nll" else -1
        row[name] = {
            "value": math.fsum(own) / len(own),
            "lost": mean([sign * (a - b) for a, b in zip(own, full, strict=True)]).as_dict(),
            "prompts": own,
        }
    return row


def better(a: dict[str, Any], b: dict[str, Any], name: str) -> Rate:
    """By how much `a` does better than `b`, prompt by prompt."""
    sign = -1 if name == "nll" else 1
    pairs = zip(a[name]["prompts"], b[name]["prompts"], strict=True)
    return mean([sign * (x - y) for x, y in pairs])


def fronts(rows: list[dict[str, Any]], chance: dict[str, float]) -> None:
    """Says in each row on which fronts it is, and on which of them surely.

    A point is on one where it does better than every other of as few bytes, and than chance;
    surely, where none of these differences may be zero (two standard errors). "bounded" leaves out
    what grows with the stream.
    """
    for kind, among in (("all", rows), ("bounded", [row for row in rows if row["bounded"]])):
        for row in among:
            row.setdefault("fronts", {})[kind] = on = {}
            rivals = [r for r in among if r is not row and r["bytes"] <= row["bytes"]]
            for name in NAMES:
                gains = [better(row, rival, name) for rival in rivals]
                if name != "nll":
                    gains.append(mean([x - chance[name] for x in row[name]["prompts"]]))
                if all(gain.value > 0 for gain in gains):
                    on[name] = all(gain.low > 0 for gain in gains)


def cells(row: dict[str, Any]) -> list[str]:
    """Bytes in KiB, and each measure: marked on a front, bold where it surely is on one."""
    found = [f"{row['bytes'] / 1024:.0f}"]
    for name in NAMES:
        lost = row[name]["lost"]
        off = f"{lost['value']:+.3f} ± {lost['high'] - lost['value']:.3f}"
        text = off if name == "nll" else f"{row[name]['value']:.2f}"
        marks = [on.get(name) for on in row.get("fronts", {}).values()]
        text = f"**{text}**" if True in marks else text
        found.append(f"{text} *" if False in marks and True not in marks else text)
    return found


def report(result: dict[str, Any]) -> str:
    lines = [
        f"| | slots | KiB | nll lost | {' | '.join(NAMES[1:])} |",
        "|---" * (3 + len(NAMES)) + "|",
    ]
    for row in sorted(result["rows"], key=lambda row: row["bytes"]):
        family = row["family"] if row["bounded"] else f"{row['family']} (grows)"
        lines.append(f"| {family} | {row['budget']} | {' | '.join(cells(row))} |")
    lines += ["", "| | surely on a front | on one by its figure |", "|---|---|---|"]
    for family in dict.fromkeys(row["family"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["family"] == family]
        on: dict[bool, list[str]] = {True: [], False: []}
        for name in NAMES:
            marks = [f.get(name) for row in own for f in row["fronts"].values()]
            if any(mark is not None for mark in marks):
                on[True in marks].append(name)
        lines.append(f"| {family} | {', '.join(on[True]) or '-'} | {', '.join(on[False]) or '-'} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--only", help="families that begin so; nothing is written")
    options = parser.parse_args(arguments)
    if options.report:
        print(report(json.loads((RESULTS / "policies.json").read_text())))
        return
    torch.set_num_threads(1)
    model, tokenizer = load("bundled")
    found, kv_heads = look(model, tokenizer), model.config.num_key_value_heads
    started = time.process_time()
    whole = measured(model, tokenizer, KeepAll(), None)
    chance = {
        name: sum(r.chance * len(r.values) for r in results) / len(values(results))
        for name, results in whole.items()
    }
    everything = Point("keep all", LENGTH, KeepAll())
    chosen = [p for p in points(found, kv_heads) if p.family.startswith(options.only or "")]
    rows = []
    for point in (everything, *chosen):
        check_bytes(model, point.policy)
        results = whole if point is everything else measured(model, tokenizer, point.policy, whole)
        rows.append(
            {
                "family": point.family,
                "budget": point.budget,
                "policy": str(point.policy),
                "bounded": bounded(point.policy),
                "bytes": allocated(model, point.policy),
                **figures(results, whole),
            }
        )
        print(point.family, point.budget, *cells(rows[-1]), sep=" | ", flush=True)
    fronts(rows, chance)
    result = {
        "length": LENGTH,
        "examples": {task.name: count for task, count in TASKS},
        "settings": {n: [dict(r.setting) for r in results] for n, results in whole.items()},
        "chance": chance,
        "retrieval_heads": found.retrieving(kv_heads).nonzero().tolist(),
        "processor_seconds": round(time.process_time() - started),
        "rows": rows,
    }
    if options.only is None:
        write(Path("policies.json"), result)
        print(report(result))


if __name__ == "__main__":
    main()
