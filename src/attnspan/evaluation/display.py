"""What people see: a live bar while it lasts, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from attnspan.evaluation import loop

PATIENCE = 2.0
"""Seconds of work before a bar appears."""

WIDE = 160
"""Columns that the whole table needs; a narrower terminal gets it in two parts."""

PIPED = 1000
"""Columns of what is no terminal: a table there takes as many as it needs."""


class Bar:
    """A live bar on a terminal's standard error, for work over `PATIENCE`; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._began = time.monotonic()
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Says what is going on while nothing can be counted."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(what):
            yield

    def show(self, at: loop.Progress) -> None:
        """Takes in how far a task is."""
        if not self._console.is_terminal:
            return
        if self._progress is None:
            if time.monotonic() - self._began < PATIENCE:
                return
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[figures]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,  # each refresh takes time from the model
            )
            self._progress.start()
        if at.task not in self._tasks:
            self._tasks[at.task] = self._progress.add_task(at.task, total=at.total, figures="")
        self._progress.update(self._tasks[at.task], completed=at.done, figures=_figures(at))


def _figures(at: loop.Progress) -> str:
    if at.perplexity is None:
        return f"{at.done:,} of {at.total:,} {at.unit}"
    return (
        f"{at.done:,} tokens, perplexity {at.perplexity:.4g}, cache {size(at.cache_bytes or 0)}, "
        f"{at.tokens_per_second:,.0f} tokens/s"
    )


def show(result: dict[str, Any], file: TextIO) -> None:
    """Prints the rows of `stream` or `compare` as a table, then their notes and continuations."""
    console = Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = PIPED
    details, meta = result["meta"]["details"], result["meta"]
    cells = [_cells(*both) for both in zip(result["rows"], details, strict=True)]
    device = f"{meta['device']}, {meta['threads']} threads"
    console.print(f"{meta['model']['name']} on {printable(meta['text'])} ({device})")
    # `stream` has no ratio to show: a column of nothing is left out.
    headers = [header for header in cells[0] if any(row[header] != "-" for row in cells)]
    names, first, second = headers[:2], headers[2:7], headers[7:]
    whole = console.width >= WIDE
    for chosen in [headers] if whole else [names + first, names + second]:
        table = Table(box=box.SIMPLE, pad_edge=False)
        for header in chosen:
            named = header in names
            table.add_column(header, justify="left" if named else "right", overflow="fold")
        for row in cells:
            table.add_row(*(Text(row[header]) for header in chosen))
        console.print(table, soft_wrap=False)
    for detail in details:
        name = f"{detail['policy']}, {detail['storage']}"
        for note in detail["notes"]:
            console.print(f"* {name}: {note}")
        if detail["continuation"] is not None:
            console.print(f"\n{name} goes on with:\n{printable(detail['continuation'])}")


def _cells(row: dict[str, Any], detail: dict[str, Any]) -> dict[str, str]:
    quarter, fresh = detail["last_quarter"], detail["recompute"]

    def both(name: str) -> str:
        if row[name] is None:
            return "-"
        return f"{row[name]:.4f} ({quarter[name]:.4f})"

    ratio = "-"
    if fresh is not None:
        error = fresh["standard_error"]
        ratio = f"{fresh['ratio']:.4f}" + (f" ± {error:.4f}" if error is not None else "")
    return {
        "policy": row["policy"],
        "storage": row["storage"],
        "tokens": f"{row['tokens']:,}" + (" *" if detail["notes"] else ""),
        "nll, nats/token\n(last quarter)": both("nll"),
        "perplexity\n(last quarter)": both("perplexity"),
        "bits/byte\n(last quarter)": both("bits_per_byte"),
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "cache, peak": size(row["cache_bytes_peak"]),
        "tokens held": f"{row['tokens_held']:,}",
        "perplexity ratio\nto recompute": ratio,
    }


def size(count: int) -> str:
    """Bytes as people read them.

    >>> size(700), size(66 * 1024), size(5 * 2**20), size(3 * 2**30)
    ('700 B', '66.0 KiB', '5.00 MiB', '3.00 GiB')
    """
    for unit, digits, scale in (("GiB", 2, 2**30), ("MiB", 2, 2**20), ("KiB", 1, 2**10)):
        if count >= scale:
            return f"{count / scale:.{digits}f} {unit}"
    return f"{count} B"


def printable(text: str) -> str:
    """Without control characters, by which a text could steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
