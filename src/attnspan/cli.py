"""The command line: parse, call, print. Everything heavy loads inside the command that needs it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from attnspan.evaluation.stream import Progress

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Stream long text through a language model in bounded memory, and see what it costs.",
)

FORMS = (
    "keep-all, window:1024, sinks:4+window:1020, heavy:512+window:512[,block=64] or "
    "compressive:window=512,memory=256,rate=4"
)

Model = Annotated[str, typer.Option(help="`bundled`, or a folder with a model in safetensors.")]
Text = Annotated[str, typer.Option(help="A UTF-8 file; `-` is standard input.", metavar="FILE")]
Limit = Annotated[int | None, typer.Option(min=1, help="Score at most so many tokens.")]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the figures; `-`: print them.")
]
Plot = Annotated[
    str | None, typer.Option(metavar="FILE", help="Draw perplexity and memory (.png, .svg, .pdf).")
]
Generate = Annotated[int, typer.Option(min=0, help="Go on with so many tokens after the text.")]
Chunk = Annotated[int, typer.Option(min=1, help="Tokens that go through the model at once.")]
Device = Annotated[
    str | None, typer.Option(help="`cpu`, `cuda`, ...; by default CUDA where there is a device.")
]


@app.command()
def stream(
    text: Text,
    policy: Annotated[str, typer.Option(metavar="SPEC", help=f"What the cache keeps: {FORMS}.")],
    model: Model = "bundled",
    storage: Annotated[str, typer.Option(help="dense, int8 or int4.")] = "dense",
    limit: Limit = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep a snapshot of the stream there.")
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Tokens between two snapshots.")] = 16_384,
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
    seed: Annotated[int, typer.Option(min=0, help="Of the continuation.")] = 0,
    device: Device = None,
) -> None:
    """Stream a text through a model whose cache is bounded by a policy, and score every token."""
    from attnspan.policies import parse

    kept = parse(policy)
    kind = _outputs(json, plot)
    _snapshot_folder(save, resume)
    with _text(text) as file, _Bar() as bar:
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
        str, typer.Option(metavar='"SPEC, SPEC, ..."', help=f"What the caches keep: {FORMS}.")
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
    """Stream a text under several policies, and hold each against a fresh forward."""
    from attnspan.policies import parse_list

    kept = parse_list(policies)
    kind = _outputs(json, plot)
    with _text(text) as file, _Bar() as bar:
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
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where demo.json and demo.png go.")] = (
        Path("demo")
    ),
    limit: Annotated[int, typer.Option(min=2, metavar="BYTES", help="Bytes of text.")] = 100_000,
) -> None:
    """Compare every policy on Python source that the bundled model never saw, and go on with it."""
    from attnspan.policies import parse_list

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {str(out)!r}, which is no folder")
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        kind = _outputs(str(out / "demo.json"), str(out / "demo.png"))
        with _Bar() as bar:
            with bar.waiting("loading the model"):
                from attnspan.cache import Dense, Int8
                from attnspan.evaluation.compare import compare as compare_text
                from attnspan.evaluation.texts import python_heldout
                from attnspan.models.loading import load

                loaded, tokenizer = load("bundled")
            *kept, last = parse_list(DEMO)
            result = compare_text(
                loaded,
                tokenizer,
                io.BytesIO(python_heldout().encode()[:limit]),
                [*((each, Dense()) for each in kept), (last, Dense()), (last, Int8())],
                model_name="bundled",
                name="held-out Python standard library",
                generate=160,
                report=bar.show,
            )
        _write(result, str(out / "demo.json"), str(out / "demo.png"), kind)
    except BaseException:
        if made and not any(out.iterdir()):
            out.rmdir()
        raise
