"""`attnspan verify`: a plan beside real allocations."""

from __future__ import annotations

from typing import Any

import click

from attnspan import options


@click.command()
@click.argument("model", default="bundled")
@click.option(
    "--context",
    default="1K",
    metavar="TOKENS",
    help="Of the prefill: exact, or with K for 1,024 tokens.",
)
@click.option(
    "--policy",
    default="keep-all, sinks:4+window:124",
    metavar='"SPEC, SPEC, ..."',
    help="What attnspan.Cache keeps.",
)
@click.option(
    "--storage",
    default="dense, int8, int4",
    help="dense, int8, int4, or several with commas: each policy in each.",
)
@click.option("--batch", type=options.Count(1), default=1, help="Sequences at once.")
@click.option(
    "--chunk",
    type=options.Count(1),
    help="Tokens that go through the model at once; by default all.",
)
@click.option(
    "--random",
    is_flag=True,
    help="MODEL is a config's file or folder, or bundled; its weights are made at random.",
)
@options.device
@options.json_file
def verify(
    model: str,
    context: str,
    policy: str,
    storage: str,
    batch: int,
    chunk: int | None,
    random: bool,
    device: str | None,
    json: str | None,
) -> None:
    """Hold the plan's bytes against what MODEL really allocates here.

    MODEL is `bundled`, or a folder with a model in safetensors. Caches must match to the byte, and
    the peak of a prefill to a tenth; what doesn't is marked.
    """
    from attnspan.planner.quantities import tokens
    from attnspan.policies import parse_list

    length, policies = tokens(context), parse_list(policy)

    from attnspan.cache import parse_storage
    from attnspan.evaluation.display import Bar

    storages = [parse_storage(name) for name in storage.split(",")]
    with Bar() as bar:
        with bar.waiting("loading the model"):
            from attnspan.evaluation import verify as evaluation
            from attnspan.models.loading import load, made_up

            loaded = made_up(model, device) if random else load(model, device)[0]
        result = evaluation.verify(
            loaded,
            context=length,
            policies=policies,
            storages=storages,
            batch=batch,
            chunk=chunk,
            model_name=model,
            report=bar.show,
        )
    result["meta"] = {"model": model, **result["meta"], **_versions()}
    options.give(result, json, lambda: click.echo(_table(result)))


def _versions() -> dict[str, str]:
    from datetime import date

    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def _table(result: dict[str, Any]) -> str:
    about, rows = result["meta"], result["rows"]
    wide = max(len(row["what"]) for row in rows)
    lines = [
        f"{about['model']} ({about['family']}), {about['context']:,} tokens x {about['batch']}, "
        f"{about['dtype']} on {about['device']}; transformers {about['transformers']}, torch "
        f"{about['torch']}; sizes in bytes",
        "",
        f"{'':{wide}} {'planned':>15} {'measured':>15} {'off':>8}",
    ]
    for row in rows:
        mark = "  miss" if row["miss"] else ""
        note = f"  {row['note']}" if row["note"] else ""
        off = "-" if row["off"] is None else f"{row['off']:+.2%}"
        lines.append(
            f"{row['what']:{wide}} {row['planned']:15,} {row['measured']:15,} {off:>8}{mark}{note}"
        )
    lines += [
        "",
        f"{about['misses']} of {len(rows)} miss: caches and weights must match to the byte, a peak "
        f"to {about['peak_allowed']:.0%}.",
    ]
    return "\n".join([*lines, *(f"Not run: {why}." for why in result["refused"])])
