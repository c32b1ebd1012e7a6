"""The command line: parse, call, print. Everything heavy loads inside the command that needs it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from attnspan import options
from attnspan.doctor_cli import doctor
from attnspan.explore_cli import explore
from attnspan.figure_cli import figure
from attnspan.plan_cli import article, plan
from attnspan.ring_cli import ring
from attnspan.tasks_cli import tasks
from attnspan.tune_cli import tune
from attnspan.verify_cli import verify

if TYPE_CHECKING:
    from attnspan.evaluation.display import Bar


def _show_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from attnspan import __version__

        click.echo(f"attnspan {__version__}")
        context.exit()


@click.group(
    invoke_without_command=True,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version", is_flag=True, is_eager=True, callback=_show_version, help="Show the version."
)
@click.pass_context
def app(context: click.Context, version: bool) -> None:
    """Attention over long contexts: plan it, stream it in bounded memory, see what it costs."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


app.add_command(plan)
app.add_command(article)
app.add_command(ring)
app.add_command(verify)
app.add_command(doctor)
app.add_command(tasks)
app.add_command(explore)
app.add_command(figure)
app.add_command(tune)

# A budget of 512 tokens each: two of them hold up to a block of 64 beside what they choose.
DEMO = (
    "keep-all, window:512, sinks:4+window:508, heavy:224+window:225, "
    "compressive:window=314,memory=128,rate=4"
)
SPEC = (
    "SPEC is keep-all, window:1024, sinks:4+window:1020, heavy:512+window:512, "
    "compressive:window=512,memory=256,rate=4, or another of docs/policies.md."
)

_model = click.option(
    "--model", default="bundled", help="`bundled`, or a folder with a model in safetensors."
)
_rope = click.option(
    "--rope",
    metavar="SPEC",
    help="Interpolate the model's positions, so that it reads F times as far: linear:F, ntk:F, "
    "yarn:F.",
)
_text_file = click.option(
    "--text", required=True, metavar="FILE", help="A UTF-8 file; `-` is standard input."
)
_limit = click.option("--limit", type=options.Count(1), help="Score at most so many tokens.")
_plot = click.option(
    "--plot", metavar="FILE", help="Draw perplexity and memory (.png, .svg, .pdf)."
)
_generate = click.option(
    "--generate",
    type=options.Count(0),
    default=0,
    help="Go on with so many tokens after the text.",
)
_chunk = click.option(
    "--chunk", type=options.Count(1), default=256, help="Tokens that go through the model at once."
)
_folder = click.Path(path_type=Path)


@app.command(epilog=SPEC)
@_text_file
@click.option("--policy", required=True, metavar="SPEC", help="What the cache keeps.")
@_model
@_rope
@click.option("--storage", default="dense", help="dense, int8 or int4.")
@_limit
@click.option("--save", type=_folder, metavar="DIR", help="Keep a snapshot of the stream there.")
@click.option(
    "--save-every", type=options.Count(1), default=16_384, help="Tokens between two snapshots."
)
@click.option(
    "--resume",
    type=_folder,
    metavar="DIR",
    help="Go on from the snapshot there, with the same options and the same text (standard input "
    "must bring it again from its start).",
)
@_generate
@options.json_file
@_plot
@_chunk
@click.option("--seed", type=options.Count(0), default=0, help="Of the continuation.")
@options.device
@options.dtype
@click.option(
    "--graphs",
    is_flag=True,
    help="Replay steps of one token (--chunk 1, --generate) from a CUDA graph.",
)
def stream(
    text: str,
    policy: str,
    model: str,
    rope: str | None,
    storage: str,
    limit: int | None,
    save: Path | None,
    save_every: int,
    resume: Path | None,
    generate: int,
    json: str | None,
    plot: str | None,
    chunk: int,
    seed: int,
    device: str | None,
    dtype: str | None,
    graphs: bool,
) -> None:
    """Stream a text through a model whose cache is bounded by a policy, and score every token."""
    from attnspan.policies import parse

    kept = parse(policy)
    kind = _format(plot)
    _folders(save, resume)
    with _text(text) as file, _bar() as bar:
        with bar.waiting("loading the model"):
            from attnspan.cache import parse_storage
            from attnspan.evaluation.stream import stream_text
            from attnspan.models.loading import load
            from attnspan.models.stretch import parse_stretch

            held = parse_storage(storage)
            stretch = None if rope is None else parse_stretch(rope)
            loaded, tokenizer = load(model, device, options.parse_dtype(dtype), stretch)
        result = stream_text(
            loaded,
            tokenizer,
            file,
            kept,
            held,
            model_name=model if stretch is None else f"{model}, {stretch}",
            name=_text_name(text),
            limit=limit,
            chunk=chunk,
            seed=seed,
            generate=generate,
            graphs=graphs,
            save_to=save,
            save_every=save_every,
            resume_from=resume,
            report=bar.show,
        )
    result["meta"]["rope"] = None if stretch is None else str(stretch)
    _write(result, json, plot, kind)


@app.command(epilog=SPEC)
@_text_file
@click.option(
    "--policies", required=True, metavar='"SPEC, SPEC, ..."', help="What the caches keep."
)
@_model
@_rope
@click.option(
    "--storage",
    default="dense",
    help="dense, int8, int4, or several with commas: each policy in each.",
)
@_limit
@_generate
@options.json_file
@_plot
@_chunk
@options.device
def compare(
    text: str,
    policies: str,
    model: str,
    rope: str | None,
    storage: str,
    limit: int | None,
    generate: int,
    json: str | None,
    plot: str | None,
    chunk: int,
    device: str | None,
) -> None:
    """Stream a text under several policies, and hold each against a fresh forward."""
    from attnspan.policies import parse_list

    kept = parse_list(policies)
    kind = _format(plot)
    with _text(text) as file, _bar() as bar:
        with bar.waiting("loading the model"):
            from attnspan.cache import parse_storage
            from attnspan.evaluation.compare import compare as compare_text
            from attnspan.models.loading import load
            from attnspan.models.stretch import parse_stretch

            held = [parse_storage(name) for name in storage.split(",")]
            stretch = None if rope is None else parse_stretch(rope)
            loaded, tokenizer = load(model, device, stretch=stretch)
        result = compare_text(
            loaded,
            tokenizer,
            file,
            [(each, one) for each in kept for one in held],
            model_name=model if stretch is None else f"{model}, {stretch}",
            name=_text_name(text),
            limit=limit,
            chunk=chunk,
            generate=generate,
            report=bar.show,
        )
    result["meta"]["rope"] = None if stretch is None else str(stretch)
    _write(result, json, plot, kind)


@app.command()
@click.option("--n", type=options.Count(1), default=16_384, help="Tokens of the comparison.")
@click.option(
    "--runs", type=options.Count(1), default=5, help="Runs of each case; medians are given."
)
@options.json_file
@click.option(
    "--calibrate", is_flag=True, help="Store this machine's rates for the planner instead."
)
def bench(n: int, runs: int, json: str | None, calibrate: bool) -> None:
    """Time attention on this CPU: patterns, implementations and torch's own, side by side."""
    from attnspan import bench as benchmark

    if calibrate and json is not None:
        raise ValueError(
            f"--json is {json}; with --calibrate, which prints no table, none is allowed"
        )
    about = benchmark.machine()
    if calibrate:
        with _bar() as bar, bar.waiting("measuring"):
            path = benchmark.calibrate()
        click.echo(f"The rates of {about['device']} are in {path}.")
        return
    with _bar() as bar, bar.waiting("measuring"):
        rows = benchmark.prefill(n, runs=runs) + benchmark.decode(runs=runs)
    options.give(
        {"meta": about, "rows": benchmark.as_json(rows)},
        json,
        lambda: click.echo(
            f"{about['device']}, {about['threads']} threads, torch {about['torch']}\n"
            f"C++ kernels: {about['native']}\n{benchmark.table(rows)}"
        ),
    )


@app.command()
@click.option(
    "--out",
    type=_folder,
    metavar="DIR",
    default=Path("demo"),
    help="Where demo.json and demo.png go.",
)
@click.option("--limit", type=options.Count(2), default=100_000, help="Bytes of text.")
def demo(out: Path, limit: int) -> None:
    """Compare the policies on Python source that the bundled model never saw, and go on with it."""
    from attnspan.policies import parse_list

    out.mkdir(parents=True, exist_ok=True)
    json, plot = str(out / "demo.json"), str(out / "demo.png")
    kind = _format(plot)
    with _bar() as bar:
        with bar.waiting("loading the model"):
            from attnspan.cache import Dense, Int8
            from attnspan.evaluation.compare import compare as compare_text
            from attnspan.evaluation.texts import python_heldout
            from attnspan.models.loading import load

            loaded, tokenizer = load("bundled")
        text = python_heldout().encode()[:limit].decode(errors="ignore")
        policies = parse_list(DEMO)
        result = compare_text(
            loaded,
            tokenizer,
            io.BytesIO(text.encode()),
            [*((policy, Dense()) for policy in policies), (policies[2], Int8())],
            model_name="bundled",
            name="held-out Python",
            chunk=1024,  # what the cache takes at once, and the fastest on a CPU
            generate=120,
            report=bar.show,
        )
    result["meta"]["prompt"] = text[-240:]
    _write(result, json, plot, kind)
    click.echo(f"\n{json} and {plot} hold the figures and the plot.")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; its exit code: 0, 2 for bad input, 1 for a failure, 130 for an interrupt.

    Bad input is one sentence on standard error. A failure that is no one's input shows where it
    happened, as Python does.
    """
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # its encoding may lack a character
    try:
        code = app.main(arguments, "attnspan", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads our output has had enough. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ArithmeticError as error:
        return _end(str(error), 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _end(f"{where}{error.strerror}" if error.strerror else str(error), 2)
    except (ValueError, ImportError) as error:
        return _end(str(error), 2)
    except click.ClickException as error:
        return _end(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):  # the first is what click makes of the second
        return _end("interrupted", 130)
    return code if isinstance(code, int) else 0


def _end(sentence: str, code: int) -> int:
    text = "".join(c if c.isprintable() else " " for c in sentence)
    print(f"attnspan: {' '.join(text.split())}", file=sys.stderr)
    return code


def _bar() -> Bar:
    from attnspan.evaluation.display import Bar

    return Bar()


@contextmanager
def _text(path: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(path, "rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise ValueError(f"text {path}: {error.strerror}") from None
    with file:
        yield file


def _text_name(path: str) -> str:
    return "standard input" if path == "-" else path


def _format(plot: str | None) -> str:
    """The plot's format; a name that can't be written is refused before the work."""
    from attnspan.evaluation.files import check_file
    from attnspan.evaluation.plot import check_plot

    if plot is None:
        return ""
    check_file(plot)
    return check_plot(plot)


def _folders(*folders: Path | None) -> None:
    for folder in folders:
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"snapshot {folder}: it is a file; the name of a folder is allowed")


def _write(result: dict[str, Any], json: str | None, plot: str | None, kind: str) -> None:
    """Files first: they are whole even if nobody reads our output to its end. What can't be written
    is told all the same."""
    from attnspan.evaluation.display import show

    try:
        if plot is not None:
            from attnspan.evaluation.files import write_file
            from attnspan.evaluation.plot import plot as draw

            write_file(plot, draw(result, kind))
    finally:
        options.give(result, json, lambda: show(result, sys.stdout))
