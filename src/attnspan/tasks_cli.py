"""`attnspan tasks`: what each policy keeps of what a model can do."""

from __future__ import annotations

import sys

import click

from attnspan import options


@click.command(
    epilog="NAMES are nll, passkey, copy, streameval, needle, multi-key, multi-value, multi-query, "
    "variable-tracking, common-words and frequent-words."
)
@click.option("--policies", required=True, metavar='"SPEC, SPEC, ..."', help="What caches keep.")
@click.option(
    "--model", default="bundled", help="`bundled`, or a folder with a model in safetensors."
)
@click.option(
    "--tasks", "names", metavar="NAMES", help="Tasks, with commas between; by default all."
)
@click.option(
    "--length",
    type=options.Count(1),
    help="Tokens of a prompt; by default the trained length, at most 1,024 on a CPU and 4,096 on a "
    "GPU.",
)
@click.option("--examples", type=options.Count(2), default=40, help="Prompts of each setting.")
@click.option(
    "--storage",
    default="dense",
    help="dense, int8, int4, or several with commas: each policy in each.",
)
@click.option("--seed", type=options.Count(0), default=0, help="Of the prompts.")
@options.json_file
@options.device
def tasks(
    policies: str,
    model: str,
    names: str | None,
    length: int | None,
    examples: int,
    storage: str,
    seed: int,
    json: str | None,
    device: str | None,
) -> None:
    """Score policies on generated tasks, where the whole cache is better than chance."""
    from attnspan.evaluation.display import Bar
    from attnspan.policies import parse_list

    kept = parse_list(policies)
    with Bar() as bar:
        with bar.waiting("loading the model"):
            from attnspan.cache import parse_storage
            from attnspan.evaluation.tasks import TASKS
            from attnspan.evaluation.tasks.runner import judge, named
            from attnspan.models.loading import load

            chosen = list(TASKS.values()) if names is None else named(names)
            held = [parse_storage(name) for name in storage.split(",")]
            loaded, tokenizer = load(model, device)
        result = judge(
            loaded,
            tokenizer,
            chosen,
            [(each, one) for each in kept for one in held],
            model_name=model,
            length=length,
            examples=examples,
            seed=seed,
            report=bar.show,
        )

    def show() -> None:
        from attnspan.evaluation.tasks.table import show as table

        table(result, sys.stdout)

    options.give(result, json, show)
