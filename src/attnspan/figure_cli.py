"""`attnspan figure`: the explorer's figures as files for papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from attnspan import options


def _listed(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from attnspan.explorer.figures import FIGURES

        for name, about in FIGURES.items():
            click.echo(f"{name:9} {about}")
        context.exit()


@click.group(invoke_without_command=True)
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_listed,
    help="The figures, and what each shows.",
)
@click.pass_context
def figure(context: click.Context) -> None:
    """Draw a figure of the explorer for a paper: SVG, PDF or PNG, by the file's ending.

    Its numbers are the planner's; nothing is loaded or run.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


def _drawn(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every figure."""
    command = click.option(
        "--width", type=float, default=7.0, metavar="INCHES", help="Of the figure; a column is 3.4."
    )(command)
    return click.option("--out", required=True, metavar="FILE", help="Ends in .svg, .pdf or .png.")(
        command
    )


_preset = click.option(
    "--preset",
    default="mistral-7b",
    metavar="MODEL",
    help="A name of `attnspan plan --list`, or the path of a config.json.",
)
_context = click.option(
    "--context",
    default="128K",
    metavar="TOKENS",
    help="Exact, or with K for 1,024 tokens and M for 1,048,576.",
)
_storage = click.option("--storage", default="dense", help="dense, int8 or int4.")
_batch = click.option("--batch", type=options.Count(1), default=1, help="Sequences.")
_device = click.option(
    "--device", default="h100", help="h100, h200, h100-500w, a100, cpu, or a file of rates."
)


@figure.command()
@_preset
@_context
@click.option(
    "--window",
    type=options.Count(1),
    help="Tokens; by default the model's where every layer slides, else 4096.",
)
@_storage
@_batch
@_device
@click.option("--log", is_flag=True, help="Logarithmic axes.")
@_drawn
def memory(
    preset: str,
    context: str,
    window: int | None,
    storage: str,
    batch: int,
    device: str,
    log: bool,
    out: str,
    width: float,
) -> None:
    """Cache, prefill and a decoded token against context: full attention and a window."""
    from attnspan.explorer.figures import memory as find
    from attnspan.planner.quantities import tokens

    def made() -> Any:
        how = {"window": window, "storage": storage, "batch": batch, "device": device, "log": log}
        return find(preset, tokens(context), **how)

    _write(made, out, width)


@figure.command()
@click.argument("pattern")
@click.option("--tokens", type=options.Count(1), default=32, help="Queries and keys.")
@_drawn
def pattern(pattern: str, tokens: int, out: str, width: float) -> None:
    """Which query sees which key, under a PATTERN such as 'SlidingWindow(8) | Sinks(2)'."""
    from attnspan.explorer.figures import matrix

    _write(lambda: matrix(pattern, tokens), out, width)


@figure.command()
@click.argument("policy", metavar="SPEC")
@click.option("--tokens", type=options.Count(1), default=32, help="That go by.")
@_drawn
def policy(policy: str, tokens: int, out: str, width: float) -> None:
    """Which tokens a policy keeps, token by token, in one KV head.

    SPEC is as in `attnspan stream --policy`. Where it decides by attention, that is made up.
    """
    from attnspan.explorer.kept import kept

    _write(lambda: kept(policy, tokens), out, width)


@figure.command()
@click.option("--preset", metavar="MODEL", help="As in `attnspan plan`; or --window and --layers.")
@click.option("--window", type=options.Count(1), help="Of every layer, instead of the model's.")
@click.option("--layers", type=options.Count(1), help="Only so many.")
@click.option(
    "--measured", metavar="FILE", help="What `attnspan doctor --json` wrote: drawn beside it."
)
@_drawn
def reach(
    preset: str | None,
    window: int | None,
    layers: int | None,
    measured: str | None,
    out: str,
    width: float,
) -> None:
    """How far back layers reach: the bound after each, and what the doctor measured."""
    from attnspan.explorer.figures import reach as find

    _write(lambda: find(preset, window=window, layers=layers, measured=measured), out, width)


@figure.command()
@click.option(
    "--pattern", default="Causal()", metavar="PATTERN", help="What every query of a layer sees."
)
@_context
@click.option("--devices", type=options.Count(2), default=8, metavar="D", help="Of the ring.")
@click.option(
    "--layout", metavar="LIST", help="contiguous, zigzag, striped; by default all that can be."
)
@click.option("--preset", default="llama-3.1-8b", metavar="MODEL", help="Whose heads it has.")
@click.option("--link", default="ib", help="Between devices: ib, nvlink, eth, or a file.")
@_device
@_drawn
def ring(
    pattern: str,
    context: str,
    devices: int,
    layout: str | None,
    preset: str,
    link: str,
    device: str,
    out: str,
    width: float,
) -> None:
    """What each rank of a ring computes and receives, and its rounds, under each layout."""
    from attnspan.explorer.figures import ring as find
    from attnspan.planner.quantities import tokens

    def made() -> Any:
        layouts = None if layout is None else [name.strip() for name in layout.split(",")]
        return find(
            pattern,
            tokens(context),
            devices,
            model=preset,
            layouts=layouts,
            link=link,
            device=device,
        )

    _write(made, out, width)


@figure.command()
@_preset
@_context
@click.option("--policy", metavar="SPEC", help="What the cache keeps; by default all it can see.")
@_storage
@_batch
@click.option(
    "--engine",
    default="theory",
    help="Whose allocation is counted: theory, attnspan, transformers, vllm or llama.cpp.",
)
@_drawn
def stack(preset: str, context: str, out: str, width: float, **how: Any) -> None:
    """What each optimisation takes off the cache, one after the other."""
    from attnspan.explorer.figures import stack as find
    from attnspan.planner.quantities import tokens

    _write(lambda: find(preset, tokens(context), **how), out, width)


def _write(find: Callable[[], Any], out: str, width: float) -> None:
    from attnspan.evaluation.files import check_file, write_file
    from attnspan.evaluation.plot import check_plot

    check_file(out)
    kind = check_plot(out)
    if not 2 <= width <= 40:
        raise ValueError(f"width is {width:g}; 2 to 40 inches are allowed")
    found = find()
    from attnspan.explorer.drawing import draw, save

    write_file(out, save(draw(found, width=width), kind))
    click.echo(out)
