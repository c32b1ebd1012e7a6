"""`attnspan explore`: a page that shows attention, caches and rings at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from attnspan import options

PORT = 8517


@click.command()
@click.option(
    "--port",
    type=options.Count(0),
    help=f"On 127.0.0.1; 0 takes one that is free.  [default: {PORT}]",
)
@click.option("--export", metavar="FILE", help="Write the page as one file that works offline.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@click.option(
    "--recording",
    "recordings",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Show this recording too; may be given again.",
)
@click.option(
    "--record",
    metavar="FILE",
    help="Run the bundled model over --text and write what its caches did, for --recording.",
)
@click.option(
    "--text", default="python", metavar="FILE", help="To record: python, english or a UTF-8 file."
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="SPEC",
    help="To record; `SPEC int8` for another storage; may be given again. By default six.",
)
@click.option("--limit", type=options.Count(2), help="Record at most so many tokens.")
@click.option("--layer", type=options.Count(0), help="Whose slots are recorded.")
@click.option("--head", type=options.Count(0), help="KV head whose slots are recorded.")
def explore(
    port: int | None,
    export: str | None,
    no_browser: bool,
    recordings: tuple[Path, ...],
    record: str | None,
    **how: Any,
) -> None:
    """See attention, caches and rings at work, on a local page or as one file.

    The page is served on 127.0.0.1 alone, until an interrupt (Ctrl-C).
    """
    if record is not None and export is not None:
        raise ValueError("--record and --export are given together; one of the two is allowed")
    if record is not None:
        _record(record, **how)
        return
    given = [
        name
        for name, value in how.items()
        if value not in (None, ()) and (name, value) != ("text", "python")
    ]
    if given:
        name = {"policies": "policy"}.get(given[0], given[0])
        raise ValueError(f"--{name} is given without --record; with it it is allowed")
    from attnspan.explorer.recording import gather

    held = gather(recordings)
    if export is not None:
        if port is not None:
            raise ValueError("--port and --export are given together; one of the two is allowed")
        from attnspan.evaluation.files import check_file
        from attnspan.explorer.export import export as write

        check_file(export)
        size = write(export, held)
        click.echo(f"{export}: {size:,} bytes; open it in a browser, online or not.")
        return
    port = PORT if port is None else port
    if port > 65_535:
        raise ValueError(f"--port is {port}; 0 to 65535 is allowed")
    from attnspan.explorer.server import serve

    serve(port, held, browser=not no_browser, say=click.echo)


def _record(
    file: str,
    *,
    text: str,
    policies: tuple[str, ...],
    limit: int | None,
    layer: int | None,
    head: int | None,
) -> None:
    import json

    from attnspan.evaluation.display import Bar
    from attnspan.evaluation.files import check_file, write_file
    from attnspan.explorer import record as recorder

    check_file(file)
    most = recorder.LIMIT if limit is None else limit
    if most > recorder.LIMIT:
        raise ValueError(f"--limit is {most}; up to {recorder.LIMIT} tokens are allowed")
    kept = [recorder.kept(spec) for spec in policies or recorder.KEPT]
    data, title = _text(text, most)
    with Bar() as bar:
        with bar.waiting("loading the model"):
            from attnspan.models.loading import load

            model, tokenizer = load("bundled", "cpu")
        made = recorder.record(
            model,
            tokenizer,
            recorder.cut(data, most),
            kept,
            title=title,
            layer=recorder.LAYER if layer is None else layer,
            head=recorder.HEAD if head is None else head,
            limit=most,
            report=bar.show,
        )
    whole = json.dumps(made, allow_nan=False, separators=(",", ":")) + "\n"
    write_file(file, whole.encode())
    click.echo(f"{file}: {made['tokens']:,} tokens, {len(kept)} runs, {len(whole):,} bytes.")


def _text(name: str, most: int) -> tuple[bytes, str]:
    from attnspan.explorer.record import TEXTS, shipped_text

    if name in TEXTS:
        return shipped_text(name), TEXTS[name]
    try:
        with open(name, "rb") as file:
            return file.read(most + 4), Path(name).name
    except OSError as error:
        raise ValueError(
            f"text {name}: {error.strerror}; {', '.join(TEXTS)} or a UTF-8 file is allowed"
        ) from None
