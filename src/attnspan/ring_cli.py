"""`attnspan ring`: whether a ring is exact here, and what one costs, here and elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from attnspan import options

if TYPE_CHECKING:
    from attnspan.planner.links import Machine
    from attnspan.planner.prefill import Prefill, Simulation


@click.group(invoke_without_command=True)
@click.pass_context
def ring(context: click.Context) -> None:
    """One sequence over many processes: is it exact here, and what does it cost?"""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


@ring.command()
@click.option(
    "--model",
    default="mistral-7b",
    help="A preset such as llama-3.1-8b, or the path of a config.json.",
)
@click.option(
    "--context",
    default="1M",
    metavar="TOKENS",
    help="Exact, or with K for 1,024 tokens and M for 1,048,576.",
)
@click.option(
    "--devices",
    metavar="LIST",
    help="1,2,12, or 1..1024, the default: the powers of two in between.",
)
@click.option(
    "--link",
    default="ib",
    help="nvlink, ib, eth, or a file that `attnspan ring check --json` wrote.",
)
@click.option("--device", help="h100 (the default), h200, h100-500w, a100 or cpu.")
@click.option(
    "--pattern",
    metavar="PATTERN",
    help="Of all layers, such as 'SlidingWindow(4096) | Sinks(4)'; by default the model's.",
)
@click.option("--layout", default="zigzag", help="zigzag, contiguous or striped.")
@click.option(
    "--schedule",
    default="all",
    help="ring, allgather, ulysses, RxU such as 2x4, auto (the cheapest), or all.",
)
@click.option(
    "--tensor-parallel",
    type=options.Count(1),
    default=1,
    metavar="T",
    help="Devices that share each rank's heads and weights.",
)
@click.option(
    "--weights", default="bf16", help="bf16, or fp8 for those of the feed-forward layers."
)
@options.json_file
def simulate(
    model: str,
    context: str,
    devices: str | None,
    link: str,
    device: str | None,
    pattern: str | None,
    layout: str,
    schedule: str,
    tensor_parallel: int,
    weights: str,
    json: str | None,
) -> None:
    """Predict a prefill on a ring of devices: time, what communication hides, memory, traffic.

    Nothing is loaded or run. A row for each schedule and number of devices.
    """
    from attnspan.patterns.text import parse
    from attnspan.planner.links import machine
    from attnspan.planner.prefill import Simulation
    from attnspan.planner.presets import model as find
    from attnspan.planner.quantities import devices as parse_devices
    from attnspan.planner.quantities import tokens
    from attnspan.planner.ring import SCHEDULES, mixed

    mix = mixed(schedule)
    if mix is None and schedule not in (*SCHEDULES, "auto", "all"):
        raise ValueError(
            f"schedule {schedule!r} is not known; allowed are {', '.join(SCHEDULES)}, RxU such as "
            "2x4, auto and all"
        )
    if devices is None:  # of a mix there is but one number of ranks
        devices = "1..1024" if mix is None else str(mix[0] * mix[1] * tensor_parallel)
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
    found = {"meta": about, "rows": [_as_json(row) for row in rows], "refused": refused}
    text = f"{_head(about)}\n{_table(rows, refused, rates)}"
    options.give(found, json, lambda: click.echo(text))


@ring.command()
@click.option(
    "--processes", type=options.Count(2), default=4, help="How many share the sequence here."
)
@click.option(
    "--tokens", type=options.Count(1), default=8192, help="Of the sequence whose cost is measured."
)
@click.option("--heads", type=options.Count(1), default=8, help="Query heads.")
@click.option("--kv-heads", type=options.Count(1), default=2, help="Key and value heads.")
@click.option("--head-dim", type=options.Count(1), default=64, help="Channels of a head.")
@options.json_file
def check(
    processes: int, tokens: int, heads: int, kv_heads: int, head_dim: int, json: str | None
) -> None:
    """Run a ring of processes here: is it exact, does it leak, what does it send and cost?

    It starts the processes itself, over gloo on the CPU.

    `attnspan ring simulate --link FILE` takes what --json wrote.
    """
    import tempfile
    from datetime import date
    from json import loads
    from pathlib import Path

    from attnspan.bench import machine as about_machine

    if tokens % (2 * processes):
        raise ValueError(
            f"tokens is {tokens} on {processes} processes; a multiple of {2 * processes} is allowed"
        )
    if heads % kv_heads:
        raise ValueError(f"heads is {heads}; a multiple of the {kv_heads} KV heads is allowed")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "check.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), "-m", "attnspan.ring.check", "--out", str(out)),
            *("--tokens", str(tokens), "--heads", str(heads)),
            *("--kv-heads", str(kv_heads), "--head-dim", str(head_dim)),
        ]
        # One thread each: the processes are what runs side by side.
        said = Path(folder) / "said"
        with open(said, "wb") as errors:
            running = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # an interrupt is ours to pass on, once
            )
            with _ending(running):
                code = running.wait()
        if code or not out.exists():
            text = said.read_text(errors="replace")[-4000:]
            sys.stderr.write(f"{text}\nattnspan: ring check: a process failed\n")
            sys.exit(1)
        about = {**about_machine(), "date": date.today().isoformat()}
        found = {"meta": about, **loads(out.read_text())}
    options.give(found, json, lambda: click.echo(_checked(found)))


@contextmanager
def _ending(running: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends the processes with this one, which a signal to end takes for an interrupt inside."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if running.poll() is None:
            running.terminate()  # torchrun then ends its own
            running.wait()


def _checked(found: dict[str, Any]) -> str:
    """What a check found, as tables."""
    shape = found["shape"]
    lines = [
        f"{found['processes']} processes over gloo, float32. Largest error of a result or a "
        "gradient against float64, and that of one process:",
        f"{'pattern':32} {'layout':11} {'schedule':10} {'ring':>9} {'one':>9}",
    ]
    lines += [
        f"{row['pattern']:32} {row['layout']:11} {row['schedule']:10} {row['error']:9.1e} "
        f"{row['one_process']:9.1e}"
        for row in found["exactness"]
    ]
    lines += [
        "",
        "One token changed at a time; outputs that moved, or stayed, against the pattern:",
    ]
    lines += [
        f"{row['pattern']:32} {row['layout']:11} {row['outputs_wrong']} of "
        f"{row['tokens_changed']} changes"
        for row in found["leaks"]
    ]
    lines += [
        "",
        f"Forward and backward of {shape['tokens']} tokens, {shape['heads']}/{shape['kv_heads']} "
        f"heads of {shape['head_dim']}; processor seconds of all processes, and peak bytes of a "
        "process's tensors, are beside one process's:",
        f"{'pattern':32} {'layout':11} {'s':>7} {'predicted':>9} {'CPU s':>7} {'of one':>6} "
        f"{'waited':>6} {'uneven':>6} {'MB sent':>8} {'counted':>8} {'peak':>5}",
    ]
    for row in found["costs"]:
        sent, counted = (sum(row[key]) / 1e6 for key in ("sent_bytes", "sent_bytes_counted"))
        lines.append(
            f"{row['pattern']:32} {row['layout']:11} {row['seconds']:7.3f} "
            f"{row['seconds_predicted']:9.3f} {row['cpu_seconds']:7.3f} "
            f"{row['cpu_seconds'] / row['one_process_cpu_seconds']:6.2f} "
            f"{row['waited_share']:6.1%} {row['imbalance']:6.1%} {sent:8.2f} {counted:8.2f} "
            f"{row['peak_tensor_bytes'] / row['one_process_peak_tensor_bytes']:5.2f}"
        )
    link, device = found["machine"]["link"], found["machine"]["device"]
    lines += [
        "",
        f"An exchange takes {link['latency_s'] * 1e3:.2f} ms and moves "
        f"{link['bandwidth_bytes_per_s'] / 1e6:.0f} MB/s; {link['overlap']:.0%} of it goes on "
        f"beside computing at {device['forward_flop_per_s'] / 1e9:.1f} GFLOP/s.",
    ]
    return "\n".join(lines)


def _rows(
    simulation: Simulation, numbers: list[int], schedule: str
) -> tuple[list[Prefill], list[str]]:
    """The rows that can run, and why the others can't."""
    from attnspan.planner.ring import SCHEDULES, lack

    rows: list[Prefill] = []
    refused: dict[str, str] = {}  # by schedule, the fewest devices first
    for number in numbers:
        size = simulation.ranks(number)
        wanted = [schedule]
        if schedule == "auto" or size == 1:
            wanted = [simulation.choose(number)]
        elif schedule == "all":
            wanted = [*SCHEDULES]
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
