"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch


class Count(click.ParamType):
    """A whole number of at least `least`."""

    name = "N"

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:
            number = self.least - 1
        if number < self.least:
            self.fail(f"{value} is given; a whole number of at least {self.least} is allowed")
        return number


def _checked(_: click.Context, __: click.Parameter, file: str | None) -> str | None:
    from attnspan.evaluation.files import check_file

    if file is not None and file != "-":
        check_file(file)
    return file


json_file = click.option(
    "--json", metavar="FILE", callback=_checked, help="Write the figures; `-`: print them."
)
"""Refuses a file that can't be written before the command begins; `give` writes it."""
device = click.option("--device", help="`cpu`, `cuda`, ...; by default CUDA where there is one.")

_DTYPES = ("float32", "bfloat16", "float16")
dtype = click.option(
    "--dtype",
    type=click.Choice(_DTYPES),
    help="Of the model's weights, and so of what a cache holds dense.",
)


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name."""
    import torch

    return None if name is None else getattr(torch, name)


def give(figures: dict[str, Any], file: str | None, show: Callable[[], object]) -> None:
    """Writes figures as JSON where that was asked for, and prints them as `show` does, also where
    the file can't be written any more."""
    from attnspan.evaluation.files import to_json, write_file

    text = to_json(figures)
    if file == "-":
        click.echo(text, nl=False)
        return
    try:
        if file is not None:
            write_file(file, text.encode())
    finally:
        show()
