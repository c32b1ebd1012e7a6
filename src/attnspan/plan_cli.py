"""`attnspan plan` and `article`: what a context costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from attnspan import options


@click.command()
@click.argument("model", required=False)
@click.option(
    "--context", metavar="TOKENS", help="Exact, or with K for 1,024 tokens and M for 1,048,576."
)
@click.option("--policy", metavar="SPEC", help="What the cache keeps; by default all it can see.")
@click.option(
    "--pattern",
    metavar="PATTERN",
    help="Instead of a policy what all layers see, such as 'Strided(2048, 64)'.",
)
@click.option("--storage", default="dense", help="dense, int8 or int4.")
@click.option("--batch", type=options.Count(1), default=1, help="Sequences.")
@click.option(
    "--devices", type=options.Count(1), default=1, metavar="D", help="That share the context."
)
@click.option("--memory", metavar="SIZE", help="Of a device, such as 80GiB; by default its own.")
@click.option(
    "--device",
    default="h100",
    help="h100, h200, h100-500w, a100, cpu, `calibrated` (what `attnspan bench --calibrate` "
    "measured here), or a file of rates.",
)
@click.option("--link", help="Between devices: ib (the default), nvlink, eth, or a file.")
@click.option("--weights", default="bf16", help="bf16, int8 or int4.")
@click.option(
    "--engine",
    default="theory",
    help="Whose allocation is counted: theory, attnspan, transformers, vllm or llama.cpp.",
)
@click.option(
    "--chunk", type=options.Count(1), metavar="N", help="Prefill in steps of so many tokens."
)
@click.option("--compare", is_flag=True, help="Beside it full, windows, H2O, strided, and others.")
@click.option(
    "--budget",
    type=options.Count(16),
    metavar="W",
    help="Tokens of each in --compare; by default the model's window, or 4096.",
)
@click.option(
    "--fit",
    is_flag=True,
    help="The longest context that fits; with --context the least change that makes it fit.",
)
@click.option("--explain", is_flag=True, help="Each formula with its numbers.")
@click.option("--list", "listed", is_flag=True, help="The models that are known by name.")
@options.json_file
def plan(
    model: str | None,
    context: str | None,
    memory: str | None,
    compare: bool,
    budget: int | None,
    fit: bool,
    explain: bool,
    listed: bool,
    json: str | None,
    **how: Any,
) -> None:
    """What a context costs: memory, operations and time, before anything is loaded.

    MODEL is a name (--list), or the path of a config.json or its folder.
    """
    if listed:
        if model is not None:
            raise ValueError(f"MODEL is {model} with --list; without it it is allowed")
        _list(json)
        return
    if model is None:
        raise ValueError(
            "MODEL is missing; a name from `attnspan plan --list`, or a path, is allowed"
        )
    if _opaque(model, json):
        return
    if budget is not None and not compare:
        raise ValueError(f"--budget is {budget} without --compare; with it it is allowed")
    from attnspan.planner.plan import plan as make

    if fit:
        if compare or explain:
            raise ValueError("--fit has no --compare and no --explain; they are allowed without it")
        _fit(model, context, memory, json, **how)
        return
    if context is None:
        raise ValueError("--context is missing; a number of tokens, or --fit, is allowed")
    from attnspan.planner.quantities import tokens
    from attnspan.planner.report import table

    made = make(model, tokens(context), memory=memory, **how)
    rows = made.compare(budget) if compare else ()
    lines = made.explain() if explain else ()
    figures = {"plan": made.as_dict()}
    if compare:
        figures["compare"] = {"rows": [asdict(row) for row in rows]}
    if explain:
        figures["explain"] = {"lines": [asdict(line) for line in lines]}

    def show() -> None:
        click.echo(made)
        if compare:
            click.echo(f"\n{table(rows)}")
        if explain:
            click.echo("\n" + "\n".join(str(line) for line in lines))

    options.give(figures, json, show)


def _list(json: str | None) -> None:
    from attnspan.planner.presets import MODELS, OPAQUE, model
    from attnspan.planner.quantities import scaled

    specs = [model(name) for name in MODELS]
    rows = [
        {
            "name": each.name,
            "parameters": each.parameters,
            "layers": each.layers,
            "sliding_layers": len(each.sliding_layers),
            "kv_bytes_per_token": each.kv_bytes(),
            "trained_length": each.trained_length,
            "source": each.source,
        }
        for each in specs
    ]
    opaque = [
        {"name": each.name, "trained_length": each.context, "source": each.source}
        for each in OPAQUE.values()
    ]

    def show() -> None:
        click.echo(
            f"{'':18} {'weights':>9} {'layers':>6} {'sliding':>7} {'KV B/token':>10} trained"
        )
        for row in rows:
            length = row["trained_length"]
            click.echo(
                f"{row['name']:18} {scaled(row['parameters']):>9} {row['layers']:6} "
                f"{row['sliding_layers']:7} {row['kv_bytes_per_token']:10,} "
                + (f"{length:,}" if length else "?")
            )
        click.echo("Of these the context length alone is public:")
        for row in opaque:
            click.echo(f"{row['name']:54} {row['trained_length']:,}")

    options.give({"models": rows, "opaque": opaque}, json, show)


def _opaque(name: str, json: str | None) -> bool:
    """Whether nothing but its context is public, which is then told."""
    from attnspan.planner.presets import OPAQUE

    known = OPAQUE.get(name.lower())
    if known is None:
        return False
    rest = "Its layers, heads and weights are not public, so nothing else can be planned."
    figures = {"name": known.name, "context": known.context, "source": known.source, "rest": rest}

    def show() -> None:
        click.echo(f"{known.name}: a context of {known.context:,} tokens ({known.source}).\n{rest}")

    options.give({"opaque": figures}, json, show)
    return True


def _fit(model: str, context: str | None, memory: str | None, json: str | None, **how: Any) -> None:
    from attnspan.planner.fit import cheapest, longest, table
    from attnspan.planner.quantities import tokens

    if context is None:
        found = longest(model, memory=memory, **how)
        figures = {
            "context": found.context,
            "plan": None if found.plan is None else found.plan.as_dict(),
            "one_more": None if found.beyond is None else found.beyond.total,
            "one_token": found.least.total,
        }

        def show() -> None:
            click.echo(f"{found}\n")
            click.echo(found.plan or found.least)

        options.give({"longest": figures}, json, show)
        return
    candidates = cheapest(model, tokens(context), memory=memory, **how)
    rows = [
        {
            "change": each.change,
            "loses": each.loses,
            "fits": each.fits,
            "refused": each.why or None,
            "plan": None if each.plan is None else each.plan.as_dict(),
        }
        for each in candidates
    ]
    options.give({"cheapest": {"candidates": rows}}, json, lambda: click.echo(table(candidates)))


@click.command()
@click.option("--markdown", is_flag=True, help="As a table for GitHub.")
@options.json_file
def article(markdown: bool, json: str | None) -> None:
    """The claims of an article on long contexts, each beside the right value and the reason."""
    from attnspan.planner import article as claims

    def show() -> None:
        click.echo(claims.markdown() if markdown else claims.text())

    options.give(claims.as_dict(), json, show)
