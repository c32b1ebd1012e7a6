"""`attnspan tune`: the smallest cache that keeps a model's quality, or the best in a memory."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from attnspan import options


@click.command(
    epilog="NAMES are nll (the text itself), passkey, copy, streameval, needle, multi-key, "
    "multi-value, multi-query, variable-tracking, common-words and frequent-words."
)
@click.argument("model")
@click.option("--text", required=True, metavar="FILE", help="A UTF-8 file; `-`: standard input.")
@click.option(
    "--max-loss",
    metavar="LOSS",
    help="Find the smallest cache that loses no more: 2% or 0.02 of perplexity, nll and accuracy.",
)
@click.option(
    "--memory", metavar="SIZE", help="Find the best cache of no more bytes: 1MiB, 500KB, ..."
)
@click.option(
    "--task", "names", metavar="NAMES", default="nll", help="What counts, with commas between."
)
@click.option(
    "--length",
    type=options.Count(1),
    help="Tokens of a passage, whose second half is scored; by default the trained length, at most "
    "1,024 on a CPU and 4,096 on a GPU.",
)
@click.option(
    "--passages", type=options.Count(4), default=32, help="To choose on, and to test on, at most."
)
@click.option(
    "--examples", type=options.Count(2), default=40, help="Prompts of each setting of a task."
)
@click.option(
    "--families",
    metavar="NAMES",
    help="Policies to try, of sinks, window, heavy, compressive and snap; by default all.",
)
@click.option("--storage", default="dense,int8,int4", help="Storages to try, with commas between.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write every measurement there, and go on from it if it is there.",
)
@options.json_file
@options.device
@options.dtype
def tune(
    model: str,
    text: str,
    max_loss: str | None,
    memory: str | None,
    names: str,
    length: int | None,
    passages: int,
    examples: int,
    families: str | None,
    storage: str,
    state: Path | None,
    json: str | None,
    device: str | None,
    dtype: str | None,
) -> None:
    """Find the cache for MODEL that keeps its quality on a text in the fewest bytes.

    MODEL is `bundled`, or a folder with a model in safetensors; without --dtype it runs in the
    dtype that it is stored in. Policies, storages and budgets by layer are chosen on the first half
    of the text, and what is chosen is tested on the second.
    """
    from attnspan.planner import quantities

    allowed = None if max_loss is None else share(max_loss)
    most = None if memory is None else quantities.size(memory)
    if (allowed is None) == (most is None):
        given = "neither is given" if most is None else "both are given"
        raise ValueError(f"--memory and --max-loss: {given}; one of the two is allowed")
    with ExitStack() as stack:
        from attnspan.evaluation.display import Bar

        try:
            file = sys.stdin.buffer if text == "-" else stack.enter_context(open(text, "rb"))
        except OSError as error:
            raise ValueError(f"text {text}: {error.strerror}") from None
        bar = stack.enter_context(Bar())
        with bar.waiting("loading the model"):
            from attnspan.cache import parse_storage
            from attnspan.evaluation import tune as tuning
            from attnspan.evaluation.tasks.runner import named
            from attnspan.models.loading import load

            tasks = named(names)
            held = [parse_storage(each) for each in storage.split(",")]
            kinds = tuple(tuning.FAMILIES)
            if families is not None:
                kinds = tuple(each.strip() for each in families.split(","))
            loaded, tokenizer = load(model, device, dtype=options.parse_dtype(dtype) or "auto")
        result = tuning.tune(
            loaded,
            tokenizer,
            file,
            max_loss=allowed,
            memory=most,
            tasks=tasks,
            length=length,
            passages=passages,
            examples=examples,
            families=kinds,
            storages=held,
            state=state,
            model_name=model,
            name="standard input" if text == "-" else text,
            report=bar.show,
            announce=_announce,
        )
    if result["chosen"] is not None:
        _say_how(result, model, text, device, loaded)

    def show() -> None:
        from attnspan.evaluation.tune.table import show as table

        table(result, sys.stdout)

    options.give(result, json, show)
    if result["chosen"] is None:
        click.get_current_context().exit(1)


def share(text: str) -> float:
    """A share of one: `2%` or `0.02`.

    Raises:
        ValueError: it is none between 0 and 1.

    >>> share("2%"), share(" 0.02 "), share("0.5 %")
    (0.02, 0.02, 0.005)
    """
    number, percent = text.strip(), False
    if number.endswith("%"):
        number, percent = number[:-1], True
    try:
        found = float(number) / (100 if percent else 1)
    except ValueError:
        found = 0.0
    if not 0 < found < 1:
        raise ValueError(
            f"max-loss is {text!r}; a share above 0 and below 1, such as 2% or 0.02, is allowed"
        )
    return found


def _announce(sentence: str) -> None:
    if sys.stderr.isatty():
        click.echo(sentence, err=True)


def _say_how(result: dict[str, Any], model: str, text: str, device: str | None, loaded: Any):
    """Adds the command and the Python that use what was chosen."""
    from attnspan.evaluation.tune import table

    chosen, kind = result["chosen"], str(loaded.dtype).removeprefix("torch.")
    cache = chosen["policy"], chosen["storage"], model
    chosen["command"] = table.command(*cache, text, kind, device)
    chosen["python"] = table.python(*cache, kind, device)
