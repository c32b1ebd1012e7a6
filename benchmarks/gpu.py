"""Attention on one NVIDIA GPU: our kernels beside their peers', interleaved in one process.

Contenders of a case take turns in bursts long enough for steady clocks, in alternating order; a
figure is the median of the bursts, beside the smallest and the largest. Rates count useful
operations alone (forward `4 * head_dim` for each pair and query head, backward two and a half times
that), for decode the bytes of keys and values as they are stored. A product and a copy in the same
turns are the machine's ceilings. Errors are against float64 on sampled rows and keys, relative.

Writes benchmarks/results/gpu.json and, where matplotlib is there, gpu.png; `--plot` draws that from
a JSON that was made elsewhere.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import peers
import sampled
import torch
from gpu_cases import CASES, HEADS, KV_HEADS, OURS, SWEEP, W1, W4, Case, K, goals
from record import RESULTS, write
from torch import Tensor

from attnspan import attention, received
from attnspan.cache import Int8
from attnspan.dispatch import attend
from attnspan.evaluation.files import write_file
from attnspan.kernels.view import KVView, Part, RawPart, Stored
from attnspan.patterns import Full, Pattern, SlidingWindow, pairs

WARM = 128 << 20  # bytes of inputs to go through before any is read again: over twice the L2
HANG = 150  # seconds without a sign of life; FlexAttention's first compilation may take minutes


@dataclass
class Row:
    """One contender of a case; `work` is operations or bytes of one call."""

    case: str
    contender: str
    unit: str
    work: float
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    extra_mib: float | None = None  # backward's peak over what was held before it
    mhz: list[int] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Gauge:
    """SM clock and power while the GPU works; without pynvml, nothing."""

    def __init__(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:  # pynvml raises its own kinds, of which an absent module knows none
            self._nvml = None

    def until(self, done: torch.cuda.Event) -> tuple[int, float]:
        clocks, powers = [0], [0.0]
        while self._nvml is not None and not done.query():
            clocks.append(self._nvml.nvmlDeviceGetClockInfo(self._handle, 1))
            powers.append(self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3)
            time.sleep(0.003)
        done.synchronize()
        return int(statistics.median(clocks[len(clocks) // 2 :])), max(powers)


class Bench:
    def __init__(self, rounds: int, seconds: float, until: float) -> None:
        self.rounds, self.seconds, self.until = rounds, seconds, until
        self.rows: list[Row] = []
        self.gauge = Gauge()
        a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
        source = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(source)
        self.ceilings = {
            "TFLOP/s": ("product", 2 * 8192**3, lambda: a @ b),
            "GB/s": ("copy", 2 * source.nbytes, lambda: target.copy_(source)),
        }

    def case(self, case: Case) -> None:
        torch.cuda.empty_cache()
        live: list[tuple[Row, Callable[[], Any], int, int]] = []
        for contender in case.contenders:
            # A hang must not take the figures before it along: they are written after each case.
            faulthandler.dump_traceback_later(HANG, exit=True)
            row = Row(case.name, contender, case.unit, 0.0)
            self.rows.append(row)
            if time.monotonic() > self.until:
                row.failure = "left out: the run's time was over"
                continue
            try:
                run, calls = prepare(case, contender, row)
                live.append((row, run, self._count(run), calls))
            except Exception as error:
                torch.cuda.synchronize()  # raises where the context is lost
                first = str(error).strip().partition("\n")[0]
                row.failure = f"{type(error).__name__}: {first}"[:200]
        if live:
            name, work, run = self.ceilings[case.unit]
            live.append((Row(case.name, name, case.unit, work), run, self._count(run), 1))
            self.rows.append(live[-1][0])
        for i in range(self.rounds):
            for row, run, count, calls in live[:: -1 if i % 2 else 1]:
                faulthandler.dump_traceback_later(HANG, exit=True)
                seconds, mhz, watts = self._burst(run, count)
                row.seconds.append(seconds / calls)
                row.mhz.append(mhz)
                row.watts.append(round(watts, 1))
        faulthandler.cancel_dump_traceback_later()

    def _count(self, run: Callable[[], Any]) -> int:
        for _ in range(2):
            run()
        return max(3, math.ceil(self.seconds / self._burst(run, 3)[0]))

    def _burst(self, run: Callable[[], Any], count: int) -> tuple[float, int, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        mhz, watts = self.gauge.until(end)
        return start.elapsed_time(end) / 1e3 / count, mhz, watts


def prepare(case: Case, contender: str, row: Row) -> tuple[Callable[[], Any], int]:
    """What a burst repeats and how many calls that is; notes work, error and memory in `row`."""
    if case.pattern is None:
        return _decode(case, contender, row)
    *leaves, grad = _inputs(case)
    exact = _exact(case)
    at, some = _sample(case.n)
    row.work = 4.0 * case.head_dim * HEADS * pairs(case.pattern, case.n)
    if case.what == "received":
        row.work /= 2
        run = _received(contender, case.pattern, *leaves)
        row.error = _error(run()[0, :, some], exact["received"])
        return run, 1
    for x in leaves:
        x.requires_grad_(case.what == "backward")
    with torch.set_grad_enabled(case.what == "backward"):
        call = _forward(contender, case, *leaves)
        out, lse = call()
    if case.what == "forward":
        row.error = _error(out[0, :, at], exact["out"])
        if lse is not None:
            row.error = max(row.error, _error(lse[0, :, at], exact["lse"]))
        return torch.no_grad()(call), 1
    row.work *= 2.5

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    backward()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    dq, dk, dv = backward()
    row.extra_mib = round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)
    found = {"dq": dq[0, :, at], "dk": dk[0, :, some], "dv": dv[0, :, some]}
    row.error = max(_error(x, exact[name]) for name, x in found.items())
    return backward, 1


def _inputs(case: Case) -> list[Tensor]:
    """q, k, v and a gradient, the same for all contenders of a case.

    They are views of `(batch, sequence, heads, head_dim)` memory, as a model's projections leave
    it.
    """
    make = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "generator": make}
    shape = case.batch, case.n
    all_heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    made = [torch.randn(*shape, heads, case.head_dim, **options) for heads in all_heads]
    return [x.transpose(1, 2) for x in made]


def _sample(n: int) -> tuple[Tensor, Tensor]:
    """Rows and keys at which results are compared: the first, the last and some between."""
    between = torch.randint(n, (16,), generator=torch.Generator().manual_seed(n))
    at = torch.cat([torch.arange(8), between, torch.arange(n - 8, n)])
    # Not in the middle of a long sequence: all that see a key take part in its gradients.
    start = max(n // 2, n - 8192)
    return at.cuda(), torch.arange(start, start + 8, device="cuda")


@lru_cache(maxsize=1)
def _exact(case: Case) -> dict[str, Tensor]:
    q, k, v, grad = _inputs(case)
    at, some = _sample(case.n)
    assert case.pattern is not None
    if case.what == "forward":
        out, lse, _ = sampled.rows(q, k, v, case.pattern, at)
        return {"out": out, "lse": lse}
    if case.what == "received":
        return {"received": sampled.keys(q, k, v, case.pattern, some)[0]}
    dq = sampled.rows(q, k, v, case.pattern, at, grad)[2]
    _, dk, dv = sampled.keys(q, k, v, case.pattern, some, grad)
    assert dq is not None
    return {"dq": dq, "dk": dk, "dv": dv}


def _forward(contender: str, case: Case, q: Tensor, k: Tensor, v: Tensor) -> peers.Run:
    assert case.pattern is not None
    if contender not in OURS:
        return peers.prefill(contender, q, k, v, case.pattern, case.lse)

    def run() -> tuple[Tensor, Tensor | None]:
        if case.lse:
            return attention(q, k, v, case.pattern, impl=contender, return_lse=True)
        return attention(q, k, v, case.pattern, impl=contender), None

    return run


def _received(
    contender: str, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor
) -> Callable[[], Tensor]:
    if contender == "eager":
        return peers.eager_received(q, k, pattern)
    _, lse = attention(q, k, v, pattern, return_lse=True)
    return lambda: received(q, k, pattern, lse=lse)


def _decode(case: Case, contender: str, row: Row) -> tuple[Callable[[], Any], int]:
    """A graph of calls that go through enough inputs that none lies in the L2."""
    coded = case.what == "int8"
    token = Int8().bytes_per_token(case.head_dim, torch.float16) if coded else 4 * case.head_dim
    row.work = float(case.batch * KV_HEADS * case.n * token)
    sets = math.ceil(WARM / row.work) + (case.n < K * K)
    make = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "generator": make}
    runs: list[Callable[[], Any]] = []
    for i in range(sets):
        q = torch.randn(case.batch, HEADS, 1, case.head_dim, **options)
        shape = case.batch, KV_HEADS, case.n, case.head_dim
        k, v = (torch.randn(shape, **options) for _ in range(2))
        part: Part | RawPart = Part(q, k, v)
        if coded:
            fields = Int8().encode(k, v, None)
            part = RawPart(q, Stored("int8", fields))
        if contender == "ours":
            scores = case.what == "scores"
            view = KVView((part,))
            runs.append(lambda view=view, scores=scores: attend(view, return_scores=scores))
        else:
            runs.append(peers.decode(contender, q, k, v))
        if i == 0:
            if coded:
                k, v = Int8().decode(fields, None, torch.float32)
            row.error = _decode_error(case, runs[0](), q[:1], k[:1], v[:1])

    def through() -> None:
        for run in runs:
            run()

    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(torch.cuda.Stream()):
            through()  # what is built or chosen at a first call isn't captured
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            through()
    # The closure keeps the inputs alive for as long as the graph reads them.
    return lambda graph=graph, held=runs: graph.replay(), sets


def _decode_error(case: Case, given: tuple[Any, Any], q: Tensor, k: Tensor, v: Tensor) -> float:
    out, scores = given
    last = torch.zeros(1, dtype=torch.int64, device="cuda")
    exact, _, _ = sampled.rows(q, k, v, Full(), last)
    error = _error(out[:1].reshape(exact.shape), exact)
    if scores is None:
        return error
    some = torch.arange(0, case.n, 97, device="cuda")
    exact_scores, _, _ = sampled.keys(q, k, v, Full(), some)
    return max(error, _error(scores[0][0][:, some], exact_scores))


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def judged(rows: list[Row]) -> list[dict[str, Any]]:
    """Every goal with what was reached; value None where a figure is missing."""
    done = {(row.case, row.contender): row for row in rows if row.seconds}

    def find(case: str, contender: str) -> Row | None:
        if contender != "ours":
            return done.get((case, contender))
        named = [done[case, x] for x in ("ours", *OURS) if (case, x) in done]
        return min(named, key=lambda row: row.median, default=None)

    verdicts = []
    for goal in goals():
        ours = find(goal.case, "ours")
        other = find(goal.against[0] or goal.case, goal.against[1]) if goal.against else None
        value = None
        if ours is not None and (other is not None or goal.against is None):
            match goal.kind, other:
                case "speed", Row():
                    value = other.median / ours.median
                case "time", Row():
                    value = ours.median / other.median
                case "both", Row():
                    value = 1 + ours.median / other.median
                case "rate", _:
                    value = ours.work / ours.median / 1e9
                case "us", _:
                    value = ours.median * 1e6
                case _:
                    value = ours.extra_mib
        more = goal.kind in ("speed", "rate")
        level = "no figure"
        if value is not None:
            met = [value >= x if more else value <= x for x in (goal.aim, goal.must)]
            level = "aim reached" if met[0] else "reached" if met[1] else "missed"
        by = ours.contender if ours else None
        verdicts.append({**asdict(goal), "by": by, "value": value, "verdict": level})
    return verdicts


def table(rows: list[Row], verdicts: list[dict[str, Any]]) -> str:
    lines, case = [], None
    for row in rows:
        if row.case != case:
            case = row.case
            lines.append(f"{case} ({row.unit})")
        if not row.seconds:
            lines.append(f"    {row.contender:14} -- {row.failure}")
            continue
        scale = row.work / (1e12 if row.unit == "TFLOP/s" else 1e9)
        rates = scale / row.median, scale / max(row.seconds), scale / min(row.seconds)
        error = "" if row.error is None else f"  error {row.error:.1e}"
        memory = "" if row.extra_mib is None else f"  extra {row.extra_mib:.0f} MiB"
        gauge = f"  {statistics.median(row.mhz):.0f} MHz {max(row.watts):.0f} W"
        lines.append(
            f"    {row.contender:14} {rates[0]:7.1f} [{rates[1]:.1f} to {rates[2]:.1f}]"
            f"  {row.median * 1e6:10.1f} us{error}{memory}{gauge if any(row.mhz) else ''}"
        )
    if verdicts:
        lines.append(f"\n{'':82} {'value':>8} {'must':>7} {'aim':>7}")
    for v in verdicts:
        value = "" if v["value"] is None else f"{v['value']:.3g}"
        against = f" of {v['against'][1]}" if v["against"] else ""
        by = f" ({v['by']})" if v["by"] else ""
        text = f"{v['case']}: {v['kind']}{against}{by}"
        lines.append(f"{text:82} {value:>8} {v['must']:7} {v['aim']:7} {v['verdict']}")
    return "\n".join(lines)


def plot(results: dict[str, Any]) -> bytes:
    """Rates of the forward with LSE against n and W, under the machine's ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [Row(**row) for row in results["rows"]]
    shown = [r for r in rows if r.seconds and r.unit == "TFLOP/s"]
    rate = {(r.case, r.contender): r.work / r.median / 1e12 for r in shown}
    ceiling = statistics.median(y for (_, name), y in rate.items() if name == "product")
    forward = [c for c in (*CASES, *SWEEP) if c.what == "forward" and c.lse and c.head_dim == 128]
    figure, all_axes = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained", sharey=True)
    panels = (
        ("tokens, W=4096", [c for c in forward if c.pattern == W4], lambda c: c.n),
        ("tokens, W=1024", [c for c in forward if c.pattern == W1], lambda c: c.n),
        (
            "window W, n=32K",
            [c for c in forward if c.n == 32 * K and isinstance(c.pattern, SlidingWindow)],
            lambda c: c.pattern.window,
        ),
    )
    for axes, (label, cases, place) in zip(all_axes, panels, strict=True):
        for contender, marker in (("hopper", "o"), ("triton", "s"), ("fa4", "^"), ("flex", "D")):
            points = sorted(
                (place(c), rate[c.name, contender]) for c in cases if (c.name, contender) in rate
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, label=contender)
        axes.axhline(ceiling, color="0.4", linestyle="--", label="8192-cubed bf16 product")
        axes.set_xscale("log", base=2)
        ticks = sorted({place(c) for c in cases})
        axes.set_xticks(ticks, [f"{t // K}K" if t >= K else str(t) for t in ticks])
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylim(0, 1.08 * max(ceiling, *rate.values()))
    all_axes[0].set_ylabel("useful TFLOP/s, forward with LSE")
    all_axes[0].legend(fontsize=8, frameon=False)
    meta = results["meta"]
    figure.suptitle(f"{meta['device']}, bf16, 32/8 heads of 128, {meta['date']}", fontsize=9)
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short bursts, no FlexAttention")
    parser.add_argument("--cases", nargs="*", default=[], help="only those with one of these texts")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--seconds", type=float, default=350, help="start no contender after these")
    parser.add_argument("--plot", action="store_true", help="draw from --out; measure nothing")
    options = parser.parse_args()
    out = options.out.absolute()
    if options.plot:
        write_file(out.with_suffix(".png"), plot(json.loads(out.read_text())))
        return
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    began = time.monotonic()
    rounds, burst = (3, 0.05) if options.quick else (6, 0.15)
    bench = Bench(rounds, burst, began + options.seconds)
    chosen = CASES if options.quick else (*CASES, *SWEEP)
    results: dict[str, Any] = {}
    for case in chosen:
        if options.cases and not any(text in case.name for text in options.cases):
            continue
        if options.quick:
            kept = tuple(x for x in case.contenders if x != "flex")
            case = replace(case, contenders=kept)
        first = len(bench.rows)
        bench.case(case)
        print(table(bench.rows[first:], []), f"[{time.monotonic() - began:.0f} s]", flush=True)
        results = {
            "versions": peers.versions(),
            "run": {"rounds": rounds, "burst_seconds": burst, "quick": options.quick},
            "seconds": round(time.monotonic() - began, 1),
            "goals": judged(bench.rows),
            "rows": [asdict(row) for row in bench.rows],
        }
        write(out, results)
    print(table([], judged(bench.rows)))
    try:
        drawn = plot(json.loads(out.read_text()))
    except ImportError:
        print(f"no matplotlib here: draw later with --plot --out {out.name}")
    else:
        write_file(out.with_suffix(".png"), drawn)


if __name__ == "__main__":
    main()
