"""Attention on one NVIDIA GPU: our kernels beside their peers', interleaved in one process.

Contenders of a case take turns in bursts long enough for steady clocks, in alternating order; a
figure is the median of the bursts, beside the smallest and the largest. Rates count useful
operations alone (forward `4 * head_dim` for each pair and query head, backward two and a half times
that), for decode the bytes of keys and values as they are stored. A product and a copy in the same
turns are the machine's ceilings. Errors are against float64 on sampled rows and keys, relative.

First, processes side by side call every contender once, so that what compilers leave on the disk is
found there. Then the run writes benchmarks/results/gpu.json and, where matplotlib is there,
gpu.png. From a gpu.json that was made elsewhere, and without a GPU, `--plot` draws gpu.png,
`--docs` fills the tables of README.md and docs/kernels.md, and `--rates` puts the rates by which
`auto` chooses into a file of the package.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gpu_report
import peers
import torch
from gpu_calls import PEERLESS, prepare
from gpu_cases import CASES, SWEEP, W1, Case, K
from gpu_report import Row, goals_table, judged, table
from record import RESULTS, write

from attnspan.evaluation.files import write_file
from attnspan.patterns import SlidingWindow

HANG = 100  # seconds without a sign of life; what wasn't compiled ahead may take a minute
ROOT = Path(__file__).resolve().parent.parent
DOCS = (ROOT / "README.md", ROOT / "docs" / "kernels.md")
# Where compilers keep what they made, if not told otherwise.
CACHES = {
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # each process of the pool is one already
}
_COMPILED = ("ours", "hopper", "triton", "received", "fa4", "flex")


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
    def __init__(self, until: float) -> None:
        self.until = until
        self.rows: list[Row] = []
        self.gauge = Gauge()
        a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
        source = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(source)
        self.ceilings = {
            "TFLOP/s": ("product", 2 * 8192**3, lambda: a @ b),
            "GB/s": ("copy", 2 * source.nbytes, lambda: target.copy_(source)),
        }

    def case(self, case: Case, rounds: int, burst: float) -> None:
        """Times the contenders of a case: `rounds` bursts each of about `burst` seconds."""
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
                live.append((row, run, self._count(run, burst), calls))
            except Exception as error:
                torch.cuda.synchronize()  # raises where the context is lost
                row.failure = _said(error)
        if live:
            name, work, run = self.ceilings[case.unit]
            ceiling = Row(case.name, name, case.unit, work)
            live.append((ceiling, run, self._count(run, burst), 1))
            self.rows.append(ceiling)
        for i in range(rounds):
            for row, run, count, calls in live[:: -1 if i % 2 else 1]:
                faulthandler.dump_traceback_later(HANG, exit=True)
                seconds, mhz, watts = self._burst(run, count)
                row.seconds.append(seconds / calls)
                row.mhz.append(mhz)
                row.watts.append(round(watts, 1))
        faulthandler.cancel_dump_traceback_later()

    def _count(self, run: Callable[[], Any], burst: float) -> int:
        for _ in range(2):
            run()
        return max(3, math.ceil(burst / self._burst(run, 3)[0]))

    def _burst(self, run: Callable[[], Any], count: int) -> tuple[float, int, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        mhz, watts = self.gauge.until(end)
        return start.elapsed_time(end) / 1e3 / count, mhz, watts


def compile_all(cases: Iterable[Case], workers: int) -> None:
    """Every kernel that the cases need, into the caches on the disk; failures are told, no more."""
    began = time.monotonic()
    todo = {_alike(case, x): None for case in cases for x in case.contenders if _is_compiled(x)}
    # The longest first: the last to start is then not the last to end.
    order = sorted(todo, key=lambda task: (task[1] != "flex", task[1] != "fa4", task[0].n))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(order)), context) as pool:
        futures = {pool.submit(_compile, *task): task for task in order}
        try:
            for future in as_completed(futures):
                case, contender = futures[future]
                seconds, failure = future.result()
                said = f"  {failure}" if failure else ""
                print(f"{contender:8} {case.name:60} {seconds:5.1f} s{said}", flush=True)
        except BrokenProcessPool as error:
            print(f"compiling ahead ended early: {error}", flush=True)
    print(f"compiled {len(order)} in {time.monotonic() - began:.0f} s", flush=True)


def _is_compiled(contender: str) -> bool:
    return contender.partition(",")[0] in _COMPILED and not contender.endswith("eager")


def _alike(case: Case, contender: str) -> tuple[Case, str]:
    """A small case that needs the same kernel; FlexAttention has one for every shape and window."""
    if contender != "flex":
        pattern = W1 if isinstance(case.pattern, SlidingWindow) else case.pattern
        most = 64 * K if pattern is None else 32 * K
        lse = case.lse and contender not in PEERLESS  # ours always have it
        case = replace(case, n=min(case.n, most), pattern=pattern, lse=lse)
    return replace(case, contenders=()), contender


def _compile(case: Case, contender: str) -> tuple[float, str | None]:
    began, failure = time.monotonic(), None
    try:
        prepare(case, contender, Row(case.name, contender, case.unit, 0.0), check=False)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        failure = _said(error)
    return time.monotonic() - began, failure


def _said(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short bursts, no FlexAttention")
    parser.add_argument("--cases", nargs="*", default=[], help="only those with one of these texts")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--seconds", type=float, default=350, help="start no contender after these")
    usual = max(1, min(14, (os.cpu_count() or 1) - 2))
    parser.add_argument("--workers", type=int, default=usual, help="that compile ahead; 0: none")
    parser.add_argument("--plot", action="store_true", help="draw from --out; measure nothing")
    parser.add_argument("--docs", action="store_true", help="fill the documents from --out")
    parser.add_argument("--rates", type=Path, help="put the rates of --out into this file")
    options = parser.parse_args()
    options.out = options.out.absolute()
    if not (options.plot or options.docs or options.rates):
        if not torch.cuda.is_available():
            parser.error("this needs an NVIDIA GPU")
        measure(options)
        return
    try:
        results = json.loads(options.out.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"--out {options.out} can't be read: {error}")
    if not {"rows", "meta", "versions", "run"} <= results.keys():
        parser.error(f"--out {options.out} holds no results of this benchmark")
    if options.plot:
        write_file(options.out.with_suffix(".png"), gpu_report.plot(results))
    for path in DOCS if options.docs else ():
        write_file(path, gpu_report.fill(path, results))
    if options.rates:
        known = json.loads(options.rates.read_text()) if options.rates.exists() else {}
        text = gpu_report.rates_text(gpu_report.with_rates(known, results))
        write_file(options.rates, text.encode())


def measure(options: argparse.Namespace) -> None:
    began = time.monotonic()
    for name, value in CACHES.items():
        os.environ.setdefault(name, value)
    cases = [(case, 4, 0.08) for case in SWEEP]
    cases = [(case, 3, 0.05) for case in CASES] if options.quick else [
        *((case, 8, 0.1) for case in CASES), *cases
    ]  # fmt: skip
    wanted = options.cases or [""]
    cases = [x for x in cases if any(text in x[0].name for text in wanted)]
    if options.quick:
        for i, (case, *rest) in enumerate(cases):
            kept = tuple(x for x in case.contenders if x != "flex")
            cases[i] = replace(case, contenders=kept), *rest
    if options.workers:
        compile_all([case for case, _, _ in cases], options.workers)
    versions = peers.versions()
    bench = Bench(began + options.seconds)
    for case, rounds, burst in cases:
        first, at = len(bench.rows), time.monotonic()
        bench.case(case, rounds, burst)
        now = time.monotonic()
        print(table(bench.rows[first:]), f"[{now - at:.1f} s, {now - began:.0f}]", flush=True)
        results = {
            "versions": versions,
            "capability": torch.cuda.get_device_capability(),
            "run": {"rounds": cases[0][1], "burst_seconds": cases[0][2], "quick": options.quick},
            "seconds": round(now - began, 1),
            "goals": [v.as_dict() for v in judged(bench.rows)],
            "rows": [asdict(row) for row in bench.rows],
        }
        write(options.out, results)
    print(goals_table(judged(bench.rows)))
    try:
        drawn = gpu_report.plot(json.loads(options.out.read_text()))
    except ImportError:
        print(f"no matplotlib here: draw later with --plot --out {options.out.name}")
    else:
        write_file(options.out.with_suffix(".png"), drawn)


if __name__ == "__main__":
    main()
