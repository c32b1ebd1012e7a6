"""`attnspan doctor`: how far a model sees, and what may be dropped."""

from __future__ import annotations

import json as jsons
import sys
from contextlib import ExitStack
from pathlib import Path

import click

from attnspan import options


@click.command()
@click.argument("model")
@click.option(
    "--text",
    metavar="FILE",
    help="A UTF-8 file; `-` is standard input. By default the Python and the English that come "
    "with attnspan.",
)
@click.option(
    "--limit",
    type=options.Count(1),
    default=8192,
    help="Score at most so many tokens of each: half to choose by, half to hold it against.",
)
@click.option(
    "--length",
    type=options.Count(1),
    help="The largest window tried; by default the trained length, at most 1,024 on a CPU and "
    "4,096 on a GPU.",
)
@options.json_file
@click.option("--plot", metavar="FILE", help="Draw it all (.png, .svg, .pdf).")
@options.device
def doctor(
    model: str,
    text: str | None,
    limit: int,
    length: int | None,
    json: str | None,
    plot: str | None,
    device: str | None,
) -> None:
    """Measure how far MODEL sees, whether it needs sinks, and which policy keeps its quality.

    MODEL is `bundled`, or a folder with a model in safetensors.
    """
    from attnspan.evaluation.files import check_file, write_file
    from attnspan.evaluation.plot import check_plot

    kind = ""
    if plot is not None:
        check_file(plot)
        kind = check_plot(plot)
    with ExitStack() as stack:
        texts = None
        if text == "-":
            texts = [("standard input", sys.stdin.buffer)]
        elif text is not None:
            try:
                texts = [(text, stack.enter_context(open(text, "rb")))]
            except OSError as error:
                raise ValueError(f"text {text}: {error.strerror}") from None
        from attnspan.evaluation.display import Bar

        bar = stack.enter_context(Bar())
        with bar.waiting("loading the model"):
            from attnspan.evaluation.doctor import examine
            from attnspan.models import bundled
            from attnspan.models.loading import load

            loaded, tokenizer = load(model, device)
            folder = bundled.path() if model == "bundled" else Path(model)
        result = examine(
            loaded,
            tokenizer,
            texts,
            model_name=model,
            limit=limit,
            length=length,
            config=jsons.loads((folder / "config.json").read_text(encoding="utf-8")),
            report=bar.show,
        )

    def show() -> None:
        from attnspan.evaluation.doctor_text import text as report

        click.echo(report(result), nl=False)

    try:
        if plot is not None:
            from attnspan.evaluation.doctor_plot import plot as draw

            write_file(plot, draw(result, kind))
    finally:  # minutes of work are told even if a file can't be written any more
        options.give(result, json, show)
