"""What `attnspan tune` prints: the front, what was tested, what was chosen and how to use it."""

from __future__ import annotations

import shlex
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnspan.evaluation.display import PIPED, size
from attnspan.evaluation.tune.knapsack import Option, pareto

_STORAGES = {"dense": "Dense", "int8": "Int8", "int4": "Int4"}


def command(
    policy: str, storage: str, model: str, text: str, dtype: str, device: str | None
) -> str:
    """The `attnspan stream` that uses it, for a shell."""
    words = ["attnspan", "stream", "--model", model, "--text", text, "--policy", policy]
    words += ["--storage", storage, "--dtype", dtype]
    return shlex.join(words if device is None else [*words, "--device", device])


def python(policy: str, storage: str, model: str, dtype: str, device: str | None) -> str:
    """A script that uses it."""
    place = "" if device is None else f", {device!r}"
    return "\n".join(
        [
            "import torch",
            "",
            "import attnspan as span",
            "from attnspan.models.loading import load",
            "from attnspan.policies import parse",
            "",
            f"model, tokenizer = load({model!r}{place}, dtype=torch.{dtype})",
            f"policy = parse({policy!r})",
            "with span.attach(model):",
            f"    cache = span.Cache(model, policy, span.{_STORAGES[storage]}())",
            '    inputs = tokenizer("def ", return_tensors="pt").to(model.device)',
            "    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=32)",
            "print(tokenizer.decode(out[0], skip_special_tokens=True))",
        ]
    )


def on_front(candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no other of as few bytes lost less than, by rising bytes, on all passages."""
    most = max(each["passages"] for each in candidates)
    candidates = [each for each in candidates if each["passages"] == most]
    return [
        each.value
        for each in pareto(Option(c["bytes"], c["perplexity"]["ratio"], c) for c in candidates)
    ]


def show(result: dict[str, Any], file: TextIO) -> None:
    """Prints a report of `tune`."""
    console = Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = PIPED
    meta, full = result["meta"], result["full"]
    first, last = meta["scored"]
    console.print(
        f"{meta['model']['name']} on {meta['text']}: positions {first:,} to {last:,} of passages "
        f"of {meta['length']:,} tokens, {meta['passages'][0]} to choose on and "
        f"{meta['passages'][1]} to test on. The full cache in {meta['model']['dtype']} takes "
        f"{size(full['bytes'])}."
    )
    console.print(
        f"\nBytes against loss on the {meta['passages'][0]} passages that chose: the Pareto front."
    )
    table = Table("cache", "fewer", "perplexity", "nll", box=box.SIMPLE)
    table.add_column("policy", overflow="fold")
    for each in on_front(result["candidates"]):
        table.add_row(
            size(each["bytes"]),
            f"{full['bytes'] / each['bytes']:.1f}x",
            _loss(each["perplexity"]),
            _loss(each["nll"]),
            Text(f"{each['policy']}, {each['storage']}"),
        )
    console.print(table)
    if result["tested"]:
        console.print("Held-out passages, in the order that was fixed before:")
        table = Table("cache", box=box.SIMPLE)
        for name in meta["counts"]:
            table.add_column(name)
        table.add_column("holds")
        table.add_column("policy", overflow="fold")
        for each in result["tested"]:
            held = each["held_out"]
            told = {True: "yes", False: "no", None: "not asked"}.get(each.get("holds"), "")
            table.add_row(
                size(each["bytes"]),
                *("" if held is None else _loss(held[name]) for name in meta["counts"]),
                told if meta["memory"] is None else "",
                Text(f"{each['policy']}, {each['storage']}"),
            )
        console.print(table)
    for each in result["left_out"]:
        what = each.get("storage") or each["task"]
        setting = each.get("setting")
        where = f" {setting}" if setting else ""
        console.print(f"Left out: {what}{where}: {each['why']}")
    _chosen(result, console)


def _chosen(result: dict[str, Any], console: Console) -> None:
    meta, chosen = result["meta"], result["chosen"]
    if chosen is None:
        console.print(
            f"Nothing meets a loss of {100 * meta['max_loss']:g} %: "
            + (
                "what held on the passages that chose didn't on the others."
                if result["tested"]
                else "no cache that was tried does on the passages that chose."
            )
        )
        return
    losses = ", ".join(f"{name} {_loss(pair)}" for name, pair in chosen["held_out"].items())
    console.print(
        f"Chosen: {chosen['policy']} in {chosen['storage']}, {size(chosen['bytes'])}, "
        f"{chosen['times_fewer']:.2f} times fewer bytes than the full cache's tokens; on passages "
        f"that the choice didn't see: {losses}."
    )
    if chosen["bytes_far"] != chosen["bytes"]:
        console.print(f"It grows with the stream: {size(chosen['bytes_far'])} after 1M tokens.")
    console.print("\nFrom a shell:\n")
    console.print(chosen["command"])
    console.print("\nFrom Python:\n")
    console.print(chosen["python"])


def _loss(pair: dict[str, float]) -> str:
    """A ratio as a loss in per cent, with its interval."""
    low, high = (100 * (pair[end] - 1) for end in ("low", "high"))
    if high > 1e4:
        return f"{100 * (pair['ratio'] - 1):+.2f} % (any)"
    return f"{100 * (pair['ratio'] - 1):+.2f} % ({low:+.2f} to {high:+.2f})"
