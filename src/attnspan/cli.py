"""The command line: parse, call, print. Everything heavy loads inside the command that needs it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from attnspan.ring_cli import ring

if TYPE_CHECKING:
    from attnspan.evaluation.display import Bar

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Stream long text through a language model in bounded memory, and see what it costs.",
)
app.add_typer(ring, name="ring")


def _show_version(asked: bool) -> None:
    if asked:
        from attnspan import __version__

        typer.echo(f"attnspan {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


# A budget of 512 tokens each: two of them hold up to a block of 64 beside what they choose.
DEMO = (
    "keep-all, window:512, sinks:4+window:508, heavy:224+window:225, "
    "compressive:window=314,memory=128,rate=4"
)


def _count(least: int, help: str) -> Any:
    """An option for a whole number of at least `least`."""

    def parse(text: str | int) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise typer.BadParameter(
                f"{text} is given; a whole number of at least {least} is allowed"
            )
        return number

    return typer.Option(parser=parse, metavar="N", help=help)


Model = Annotated[str, typer.Option(help="`bundled`, or a folder with a model in safetensors.")]
Text = Annotated[str, typer.Option(help="A UTF-8 file; `-` is standard input.", metavar="FILE")]
Limit = Annotated[int | None, _count(1, "Score at most so many tokens.")]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the figures; `-`: print them.")
]
Plot = Annotated[
    str | None, typer.Option(metavar="FILE", help="Draw perplexity and memory (.png, .svg, .pdf).")
]
Generate = Annotated[int, _count(0, "Go on with so many tokens after the text.")]
Chunk = Annotated[int, _count(1, "Tokens that go through the model at once.")]
Device = Annotated[
    str | None, typer.Option(help="`cpu`, `cuda`, ...; by default CUDA where there is a device.")
]


@app.command()
def stream(
    text: Text,
    policy: Annotated[str, typer.Option(metavar="SPEC", help="What the cache keeps.")],
    model: Model = "bundled",
    storage: Annotated[str, typer.Option(help="dense, int8 or int4.")] = "dense",
    limit: Limit = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep a snapshot of the stream there.")
    ] = None,
    save_every: Annotated[int, _count(1, "Tokens between two snapshots.")] = 16_384,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Go on from the snapshot there, with the same options and the same text "
            "(standard input must bring it again from its start).",
        ),
    ] = None,
    generate: Generate = 0,
    json: Json = None,
    plot: Plot = None,
    chunk: Chunk = 256,
    seed: Annotated[int, _count(0, "Of the continuation.")] = 0,
    device: Device = None,
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs",
            help="Replay steps of one token (--chunk 1, --generate) from a CUDA graph.",
        ),
    ] = False,
) -> None:
    """Stream a text through a model whose cache is bounded by a policy, and score every token.

    SPEC is keep-all, window:1024, sinks:4+window:1020, heavy:512+window:512 or
    compressive:window=512,memory=256,rate=4.
    """
    from attnspan.policies import parse

    kept = parse(policy)
    kind = _outputs(json, plot)
    _folders(save, resume)
    with _text(text) as file, _bar() as bar:
        with bar.waiting("loading the model"):
            from attnspan.cache import parse_storage
            from attnspan.evaluation.stream import stream_text
            from attnspan.models.loading import load

            held = parse_storage(storage)
            loaded, tokenizer = load(model, device)
        result = stream_text(
            loaded,
            tokenizer,
            file,
            kept,
            held,
            model_name=model,
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
    _write(result, json, plot, kind)


@app.command()
def compare(
    text: Text,
    policies: Annotated[
        str, typer.Option(metavar='"SPEC, SPEC, ..."', help="What the caches keep.")
    ],
    model: Model = "bundled",
    storage: Annotated[
        str, typer.Option(help="dense, int8, int4, or several with commas: each policy in each.")
    ] = "dense",
    limit: Limit = None,
    generate: Generate = 0,
    json: Json = None,
    plot: Plot = None,
    chunk: Chunk = 256,
    device: Device = None,
) -> None:
    """Stream a text under several policies, and hold each against a fresh forward.

    SPEC is keep-all, window:1024, sinks:4+window:1020, heavy:512+window:512 or
    compressive:window=512,memory=256,rate=4.
    """
    from attnspan.policies import parse_list

    kept = parse_list(policies)
    kind = _outputs(json, plot)
    with _text(text) as file, _bar() as bar:
        with bar.waiting("loading the model"):
            from attnspan.cache import parse_storage
            from attnspan.evaluation.compare import compare as compare_text
            from attnspan.models.loading import load

            held = [parse_storage(name) for name in storage.split(",")]
            loaded, tokenizer = load(model, device)
        result = compare_text(
            loaded,
            tokenizer,
            file,
            [(each, one) for each in kept for one in held],
            model_name=model,
            name=_text_name(text),
            limit=limit,
            chunk=chunk,
            generate=generate,
            report=bar.show,
        )
    _write(result, json, plot, kind)


@app.command()
def bench(
    n: Annotated[int, _count(1, "Tokens of the comparison.")] = 16_384,
    runs: Annotated[int, _count(1, "Runs of each case; medians are given.")] = 5,
    json: Json = None,
    calibrate: Annotated[
        bool, typer.Option(help="Store this machine's rates for the planner instead.")
    ] = False,
) -> None:
    """Time attention on this CPU: patterns, implementations and torch's own, side by side."""
    from attnspan import bench as benchmark
    from attnspan.evaluation.files import check_file, to_json, write_file

    if calibrate and json is not None:
        raise ValueError(
            f"--json is {json}; with --calibrate, which prints no table, none is allowed"
        )
    if json is not None and json != "-":
        check_file(json)
    about = benchmark.machine()
    if calibrate:
        with _bar() as bar, bar.waiting("measuring"):
            path = benchmark.calibrate()
        typer.echo(f"The rates of {about['device']} are in {path}.")
        return
    with _bar() as bar, bar.waiting("measuring"):
        rows = benchmark.prefill(n, runs=runs) + benchmark.decode(runs=runs)
    text = to_json({"meta": about, "rows": benchmark.as_json(rows)})
    if json == "-":
        sys.stdout.write(text)
        return
    if json is not None:
        write_file(json, text.encode())
    typer.echo(f"{about['device']}, {about['threads']} threads, torch {about['torch']}")
    typer.echo(f"C++ kernels: {about['native']}")
    typer.echo(benchmark.table(rows))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where demo.json and demo.png go.")] = (
        Path("demo")
    ),
    limit: Annotated[int, _count(2, "Bytes of text.")] = 100_000,
) -> None:
    """Compare the policies on Python source that the bundled model never saw, and go on with it."""
    from attnspan.policies import parse_list

    out.mkdir(parents=True, exist_ok=True)
    json, plot = str(out / "demo.json"), str(out / "demo.png")
    kind = _outputs(json, plot)
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
    typer.echo(f"\n{json} and {plot} hold the figures and the plot.")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; its exit code: 0, 2 for bad input, 1 for a failure.

    Bad input is one sentence on standard error. A failure that is no one's input shows where it
    happened, as Python does.
    """
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # its encoding may lack a character
    try:
        code = app(arguments, standalone_mode=False)
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
    except Exception as error:
        # A usage error of typer; where its class lives depends on typer's version.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # type: ignore[attr-defined]
        # Without a command there is none: the help was shown.
        return _end(message, 2) if message else 2
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


def _outputs(json: str | None, plot: str | None) -> str:
    """Refuses names that can't be written, before the work; the plot's format."""
    from attnspan.evaluation.files import check_file
    from attnspan.evaluation.plot import check_plot

    for path in (json, plot):
        if path is not None and path != "-":
            check_file(path)
    return check_plot(plot) if plot is not None else ""


def _folders(*folders: Path | None) -> None:
    for folder in folders:
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"snapshot {folder}: it is a file; the name of a folder is allowed")


def _write(result: dict[str, Any], json: str | None, plot: str | None, kind: str) -> None:
    """Files first: they are whole even if nobody reads our output to its end."""
    from attnspan.evaluation.display import show
    from attnspan.evaluation.files import to_json, write_file

    text = to_json(result)
    if json is not None and json != "-":
        write_file(json, text.encode())
    if plot is not None:
        from attnspan.evaluation.plot import plot as draw

        write_file(plot, draw(result, kind))
    if json == "-":
        sys.stdout.write(text)
    else:
        show(result, sys.stdout)
