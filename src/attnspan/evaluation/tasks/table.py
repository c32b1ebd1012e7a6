"""What `attnspan tasks` prints: a table, and what was left out of it."""

from __future__ import annotations

from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnspan.evaluation.display import PIPED


def show(result: dict[str, Any], file: TextIO) -> None:
    console = Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = PIPED
    meta = result["meta"]
    console.print(
        f"{meta['model']['name']} on generated tasks of {meta['length']:,} tokens, "
        f"{meta['examples']} prompts a setting ({meta['device']}, {meta['threads']} threads)"
    )
    used = [row for row in result["rows"] if row["used"]]
    if used:
        console.print(_table(used), soft_wrap=False)
        console.print(
            "Share of right answers, chosen by likelihood, and its 95 % interval; nll: nats a "
            "token, less is better. * worse than the whole cache, prompt by prompt, by more than "
            "two standard errors."
        )
    if result["left_out"]:
        console.print("\nNo policy is judged by these:")
    for left in result["left_out"]:
        console.print(f"{name(left)}: {left['why']}")


def name(row: dict[str, Any]) -> str:
    """A task and its setting.

    >>> name({"task": "passkey", "setting": {"depth": 0.5}})
    'passkey, depth 0.5'
    """
    setting = " ".join(f"{key} {value}" for key, value in (row["setting"] or {}).items())
    return f"{row['task']}, {setting}" if setting else row["task"]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for header in ("task", "distance", "chance"):
        table.add_column(header, justify="left" if header == "task" else "right")
    for found in rows[0]["results"]:
        dense = found["storage"] == "dense"
        label = found["policy"] if dense else f"{found['policy']}, {found['storage']}"
        table.add_column(Text(label), justify="right", overflow="fold")
    for row in rows:
        cells = [name(row), _distance(row["distance"]), f"{row['chance']:.3f}"]
        table.add_row(*map(Text, [*cells, *map(_cell, row["results"])]))
    return table


def _distance(distance: tuple[int, int] | None) -> str:
    if distance is None:
        return "-"
    least, most = distance
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _cell(found: dict[str, Any]) -> str:
    worse = found["lost"] is not None and found["lost"]["low"] > 0
    interval = f"({found['low']:.2f} to {found['high']:.2f})"
    return f"{found['value']:.2f} {interval}{' *' if worse else ''}"
