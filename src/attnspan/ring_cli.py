"""`attnspan ring`: what a ring will cost."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from attnspan.planner.links import Machine
    from attnspan.planner.prefill import Prefill, Simulation

ring = typer.Typer(no_args_is_help=True, help="One sequence over many processes: what it costs.")


@ring.command()
def simulate(
    model: Annotated[
        str, typer.Option(help="A preset such as llama-3.1-8b, or the path of a config.json.")
    ] = "mistral-7b",
    context: Annotated[
        str,
        typer.Option(
            metavar="TOKENS", help="Exact, or with K for 1,024 tokens and M for 1,048,576."
        ),
    ] = "1M",
    devices: Annotated[
        str,
        typer.Option(metavar="LIST", help="1,2,12, or 1..1024: the powers of two in between."),
    ] = "1..1024",
    link: Annotated[
        str,
        typer.Option(help="nvlink, ib, eth, or a file that `attnspan ring check --json` wrote."),
    ] = "ib",
    device: Annotated[
        str | None, typer.Option(help="h100 (the default), h200, h100-500w, a100 or cpu.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Of all layers, such as 'SlidingWindow(4096) | Sinks(4)'; by default the model's.",
        ),
    ] = None,
    layout: Annotated[str, typer.Option(help="zigzag, contiguous or striped.")] = "zigzag",
    schedule: Annotated[
        str,
        typer.Option(
            help="ring, allgather, ulysses, RxU such as 2x4, auto (the cheapest), or all."
        ),
    ] = "all",
    tensor_parallel: Annotated[
        int, typer.Option(metavar="T", help="Devices that share each rank's heads and weights.")
    ] = 1,
    weights: Annotated[
        str, typer.Option(help="bf16, or fp8 for those of the feed-forward layers.")
    ] = "bf16",
    json: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write the figures; `-`: print them."),
    ] = None,
) -> None:
    """Predict a prefill on a ring of devices: time, what communication hides, memory, traffic.

    Nothing is loaded or run. A row for each schedule and number of devices.
    """
    from attnspan.evaluation.files import check_file, to_json, write_file
    from attnspan.patterns.text import parse
    from attnspan.planner.links import machine
    from attnspan.planner.prefill import Simulation
    from attnspan.planner.quantities import devices as parse_devices
    from attnspan.planner.quantities import tokens
    from attnspan.planner.spec import model as find

    if tensor_parallel < 1:
        raise ValueError(
            f"tensor-parallel is {tensor_parallel}; a whole number of at least 1 is allowed"
        )
    if json is not None and json != "-":
        check_file(json)
    spec, length, rates = find(model), tokens(context), machine(link, device)
    simulation = Simulation(
        spec,
        length,
        rates,
        pattern=None if pattern is None else parse(pattern),
        layout=layout,
        tensor=tensor_parallel,
        weights=weights,
    )
    rows, refused = _rows(simulation, parse_devices(devices, tensor_parallel), schedule)
    about = {
        "command": "ring simulate",
        "model": spec.name,
        "model_source": spec.source,
        "context": length,
        "pattern": [f"{count} x {each}" for count, each in simulation.patterns],
        "exact": simulation.exact,
        "layout": layout,
        "tensor_parallel": tensor_parallel,
        "weights": weights,
        **_described(rates),
    }
    text = to_json({"meta": about, "rows": [_as_json(row) for row in rows], "refused": refused})
    if json == "-":
        sys.stdout.write(text)
        return
    if json is not None:
        write_file(json, text.encode())
    typer.echo(_head(about))
    typer.echo(_table(rows, refused, rates))


def _rows(
    simulation: Simulation, numbers: list[int], schedule: str
) -> tuple[list[Prefill], list[str]]:
    """The rows that can run, and why the others can't."""
    from attnspan.planner.ring import lack

    rows: list[Prefill] = []
    refused: dict[str, str] = {}  # by schedule, the fewest devices first
    for number in numbers:
        size = simulation.ranks(number)
        wanted = [schedule]
        if schedule == "auto" or size == 1:
            wanted = [simulation.choose(number)]
        elif schedule == "all":
            wanted = ["ring", "allgather", "ulysses"]
            best = simulation.choose(number)
            wanted += [best] if best not in wanted else []
        for each in wanted:
            if why := lack(each, size, simulation.heads):
                if schedule not in ("all", "auto"):
                    raise ValueError(f"{why}; whole heads for each are allowed")
                refused.setdefault(each, f"{number} devices: {why}, and whole heads are needed")
            else:
                rows.append(simulation.prefill(number, each))
    return rows, list(refused.values())


def _described(rates: Machine) -> dict[str, Any]:
    from dataclasses import asdict

    return {"device": asdict(rates.device), "link": asdict(rates.link)}


def _as_json(row: Prefill) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(row), "overlap": row.overlap, "hides": row.hides}


def _head(about: dict[str, Any]) -> str:
    device, link = about["device"], about["link"]
    lines = [
        f"{about['model']}, prefill of {about['context']:,} tokens, {about['layout']}, "
        f"{about['weights']} weights; {', '.join(about['pattern'])}",
        f"{device['name']}: attention {device['forward'] / 1e12:.3g} TFLOP/s, products "
        f"{device['linear'] / 1e12:.3g} ({device['source']})",
        f"{link['name']}: {link['bandwidth'] / 1e9:.3g} GB/s each way, "
        f"{link['latency'] * 1e6:.3g} us a hop ({link['source']})",
    ]
    if about["tensor_parallel"] > 1:
        lines.append(
            f"Each rank of the ring is {about['tensor_parallel']} devices that share heads and "
            "weights over NVLink."
        )
    if not about["exact"]:
        lines.append("Pairs and keys of a stride are estimates.")
    return "\n".join(lines) + "\n"


def _table(rows: list[Prefill], refused: list[str], rates: Machine) -> str:
    names = "devices", "schedule", "seconds", "attention", "linear", "exposed", "hidden"
    lines = [
        "{:>7} {:9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>8} {:>9}".format(
            *names, "GiB each", "GiB sent"
        )
    ]
    best = _best(rows)
    for row in rows:
        hidden = f"{row.overlap:7.0%}" if row.communication else f"{'-':>7}"
        marks = [] if row.hides else ["not hidden"]
        marks += ["doesn't fit"] if row.fits is False else []
        marks += [f"KV heads held {row.copies} times"] if row.copies > 1 else []
        marks += ["best"] if row is best.get(row.devices) else []
        lines.append(
            f"{row.devices:7} {row.schedule:9} {row.seconds:9.4g} {row.attention:9.4g} "
            f"{row.linear + row.tensor:9.4g} {row.exposed:9.3g} {hidden} "
            f"{row.memory / 2**30:8.1f} {row.sent / 2**30:9.3f}  {', '.join(marks)}".rstrip()
        )
    lines += ["", *_notes(rows, refused, rates)]
    return "\n".join(lines)


def _best(rows: list[Prefill]) -> dict[int, Prefill]:
    """Where there are several, the first row within a hundredth of the fewest seconds."""
    best = {}
    for number in {row.devices for row in rows}:
        alike = [row for row in rows if row.devices == number]
        fewest = min(row.seconds for row in alike)
        if len(alike) > 1:
            best[number] = next(row for row in alike if row.seconds <= 1.01 * fewest)
    return best


def _notes(rows: list[Prefill], refused: list[str], rates: Machine) -> list[str]:
    notes = [
        "exposed: seconds of attention's exchanges that no computing hides, and hidden the share "
        "that it does; linear includes tensor parallelism's sums. GiB each: weights, keys and "
        "values, a layer's activations and what the schedule holds. GiB sent: attention's, of a "
        "device, all layers.",
    ]
    for schedule in dict.fromkeys(row.schedule for row in rows):
        first = next((r.devices for r in rows if r.schedule == schedule and not r.hides), None)
        if first is not None and "x" not in schedule:
            notes.append(
                f"{schedule}: from {first} devices on communication that nothing hides is over a "
                "hundredth of the time."
            )
    if any(row.fits is False for row in rows):
        weights = max(row.weights for row in rows)
        memory = rates.device.memory or 0
        note = f"A device has {memory / 2**30:.1f} GiB"
        if weights > memory:
            note += (
                f", and weights alone take {weights / 2**30:.1f}: share them among more "
                "(--tensor-parallel), or hold them in fewer bytes (--weights fp8)"
            )
        notes.append(f"{note}.")
    joins = rates.link.joins
    if joins is not None and any(row.devices > joins for row in rows):
        notes.append(
            f"{rates.link.name} joins {joins} devices of one host; figures for more are those of "
            "a switch that would join them all."
        )
    return notes + [f"{why}." for why in refused]
