"""What attention costs on this machine, implementation beside implementation in one run.

A figure is the median of runs that take turns, so that a machine's drift meets all alike. Rates
count useful operations alone, those of pairs that see each other: forward `4 * head_dim` for each
pair and query head, backward two and a half times that.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnspan.dispatch import attention, explain
from attnspan.evaluation.files import to_json, write_file
from attnspan.kernels.view import KVView, Part, RawPart, Stored
from attnspan.patterns import (
    Blockwise,
    Causal,
    Longformer,
    Pattern,
    Sinks,
    SlidingWindow,
    Strided,
    pairs,
)
from attnspan.planner.links import RATES, rates_path
from attnspan.views import attend

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
PATTERNS = (
    SlidingWindow(512),
    SlidingWindow(1024),
    SlidingWindow(508) | Sinks(4),
    Strided(256, 128),
    Blockwise(512, before=True),
    Longformer(512, 16),
    Causal(),
)
DENSE = "sdpa, is_causal"
# A dense mask of fp32 beyond this would take over a gibibyte.
_MOST_MASK = 16_384


@dataclass(frozen=True)
class Row:
    """One case: seconds are the median of `runs`, `rate` useful operations (or bytes) a second."""

    what: str
    pattern: str
    impl: str
    dtype: str
    n: int
    seconds: float
    rate: float
    runs: int


@dataclass
class _Case:
    what: str
    pattern: Pattern | None
    impl: str
    dtype: torch.dtype
    n: int
    work: float
    run: Callable[[], Any]
    times: list[float]


def tensors(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Random q `(1, HEADS, n, HEAD_DIM)` and k, v `(1, KV_HEADS, n, HEAD_DIM)`."""
    make = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, heads, n, HEAD_DIM, generator=make).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def prefill(
    n: int, patterns: tuple[Pattern, ...] = PATTERNS, runs: int = 7, peers: bool = True
) -> list[Row]:
    """Forward and backward at `n` tokens under each pattern, beside dense causal SDPA.

    With `peers`, also SDPA under a dense mask, SDPA by chunks of queries (windows alone), and
    FlexAttention, compiled (forward alone: on a CPU it has no backward).
    """
    q, k, v = tensors(n)
    cases = [_case("forward", Causal(), DENSE, n, lambda: _dense(q, k, v))]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)

    def backward_of(f: Callable[..., Tensor]) -> Callable[[], Any]:
        with torch.enable_grad():
            out = f(*leaves)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    cases.append(_case("backward", Causal(), DENSE, n, backward_of(_dense)))
    half = tensors(n, torch.bfloat16)
    for pattern in patterns:
        for impl in _impls():

            def ours(q: Tensor, k: Tensor, v: Tensor, impl=impl, pattern=pattern) -> Tensor:
                return attention(q, k, v, pattern, impl=impl)

            cases.append(_case("forward", pattern, impl, n, lambda f=ours: f(q, k, v)))
            if pattern in patterns[:2]:  # beside float32, so that both meet the same machine
                cases.append(
                    _case("forward", pattern, impl, n, lambda f=ours: f(*half), torch.bfloat16)
                )
            cases.append(_case("backward", pattern, impl, n, backward_of(ours)))
        if peers:
            # A dense mask costs the same whatever it holds: one pattern shows it.
            cases += _peers(pattern, n, q, k, v, mask=pattern == patterns[0])
    return _measured(cases, runs)


def decode(n: int = 65_536, layers: int = 4, runs: int = 7) -> list[Row]:
    """One query against `n` keys, as stored; the rate is bytes of what is stored a second.

    Each run goes through `layers` caches in turn, as a model does, so none lies warm.
    """
    from attnspan.cache import Dense, Int4, Int8

    q = tensors(1)[0]
    held = [tensors(n)[1:] for _ in range(layers)]
    views: dict[str, list[KVView]] = {
        "float32": [KVView((Part(q, k, v),)) for k, v in held],
        "bfloat16": [KVView((Part(q.bfloat16(), k.bfloat16(), v.bfloat16()),)) for k, v in held],
    }
    native = "native" in _impls()
    for storage in (Int8(), Int4()) if native else ():
        views[str(storage)] = []
        for k, v in held:
            mean = k.mean(2, keepdim=True) if isinstance(storage, Int4) else None
            group = storage.group if isinstance(storage, Int4) else 0
            stored = Stored(storage.kind, storage.encode(k, v, mean), mean, group)
            views[str(storage)].append(KVView((RawPart(q, stored),)))
    per_token = {name: Dense().bytes_per_token(HEAD_DIM, torch.float32) for name in ("read", DENSE)}
    per_token["float32"], per_token["bfloat16"] = per_token["read"], per_token["read"] // 2
    per_token["int8"] = Int8().bytes_per_token(HEAD_DIM, torch.float32)
    per_token["int4"] = Int4().bytes_per_token(HEAD_DIM, torch.float32)

    def each(f: Callable[[int], Any]) -> Callable[[], Any]:
        return lambda: [f(i) for i in range(layers)]

    peers = {
        "read": each(lambda i: [x.sum() for x in held[i]]),
        "sdpa": each(lambda i: F.scaled_dot_product_attention(q, *held[i], enable_gqa=True)),
        "cpu": each(lambda i: attention(q, *held[i], Causal(), impl="cpu")),
    }
    cases = []
    for name, run in peers.items():
        work = n * KV_HEADS * layers * per_token["read"]
        cases.append(_Case("decode", None, name, torch.float32, n, work, run, []))
    for name, each_view in views.items():
        work = n * KV_HEADS * layers * per_token[name]
        run = each(lambda i, views=each_view: attend(views[i]))
        label = f"{'native' if native else 'torch'}, {name}"
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        cases.append(_Case("decode", None, label, dtype, n, work, run, []))
    return _measured(cases, runs)


def extra_memory(n: int, impl: str, pattern: Pattern, dtype: torch.dtype) -> float:
    """Memory that a forward takes beyond its inputs, as a multiple of its output's bytes.

    The output itself is in it. Linux alone tells a process's peak.
    """
    q, k, v = tensors(n, dtype)
    with torch.no_grad():
        attention(q[:, :, :512], k[:, :, :512], v[:, :, :512], pattern, impl=impl)
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        out = attention(q, k, v, pattern, impl=impl)
        return (_memory("VmHWM") - before) / out.nbytes


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def scaling(lengths: tuple[int, ...], runs: int = 3) -> list[Row]:
    """Forward time against length: windows must be straight lines, causal attention must not."""
    rows = []
    for n in lengths:
        q, k, v = tensors(n)
        cases = []
        for pattern in PATTERNS:
            if isinstance(pattern, Causal) and n > 32_768:
                continue
            given = (q, k, v, pattern)
            cases.append(_case("forward", pattern, "auto", n, lambda x=given: attention(*x)))
        rows += _measured(cases, runs)
    return rows


def calibrate() -> Path:
    """Measures this machine's rates and stores them for the planner; gives the file.

    It lies in `$XDG_CONFIG_HOME/attnspan/rates.json` (`~/.config` by default): operations a second
    of products and of windowed attention, bytes a second of reads and of decoding; and under
    `device` those that `attnspan plan --device calibrated` takes.
    """
    a = torch.randn(2048, 2048)
    # Small: processors without instructions for bfloat16 do a hundredth of their float32 rate.
    b = torch.randn(512, 512).bfloat16()
    big = torch.randn(1 << 25)
    cases = [
        _Case("product", None, "float32", torch.float32, 2048, 2 * 2048**3, lambda: a @ a, []),
        _Case("product", None, "bfloat16", torch.bfloat16, 512, 2 * 512**3, lambda: b @ b, []),
        _Case("read", None, "float32", torch.float32, 1 << 25, big.nbytes, big.sum, []),
    ]
    rates = {f"{row.what} {row.impl}": row.rate for row in _measured(cases, 9)}
    fastest = {"forward": 0.0, "backward": 0.0}
    for row in prefill(8192, PATTERNS[1:2], 5, peers=False):
        rates[f"{row.what} {row.pattern} {row.impl} {row.dtype}"] = row.rate
        fastest[row.what] = max(fastest[row.what], row.rate)
    for row in decode(runs=5):
        rates[f"decode {row.impl}"] = row.rate
    about, path = machine(), rates_path()
    device = {
        "name": about["device"] or "calibrated",
        "source": f"attnspan bench --calibrate, {date.today().isoformat()}, {about['threads']} "
        f"threads, torch {about['torch']}; the faster of float32 and bfloat16",
        "forward_flop_per_s": fastest["forward"],
        "backward_flop_per_s": fastest["backward"],
        "linear_flop_per_s": max(rates["product float32"], rates["product bfloat16"]),
        "memory_bytes": _installed(),
        "memory_bytes_per_s": rates["read float32"],
        "call_s": 0.0,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {"format": RATES, "meta": about, "device": device, "rates": rates}
    write_file(path, to_json(held).encode())
    return path


def _installed() -> int | None:
    """Bytes of this machine's memory, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def machine() -> dict[str, Any]:
    """What the figures were measured on, the compiler of the C++ kernels included."""
    from attnspan.kernels import native

    build = native.build()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    except OSError:
        names = []
    return {
        "device": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "native": build.lack or f"{build.compiler}, {build.vectors}",
    }


def table(rows: list[Row]) -> str:
    """The rows as text, rates beside those of dense causal SDPA, or of a plain read."""
    base = {row.what: row.rate for row in rows if row.impl in (DENSE, "read")}
    lines = [f"{'':8} {'pattern':34} {'implementation':18} {'':8} {'n':>7} {'ms':>9} {'rate':>8}"]
    for row in rows:
        against = f"{row.rate / base[row.what]:6.2f}" if row.what in base else ""
        lines.append(
            f"{row.what:8} {row.pattern:34} {row.impl:18} {row.dtype:8} {row.n:7} "
            f"{row.seconds * 1e3:9.2f} {row.rate / 1e9:8.1f} {against}"
        )
    lines.append("rate: 1e9 useful operations a second, for decode 1e9 stored bytes; last column:")
    lines.append("as a share of dense causal SDPA's in the same direction, or of a plain read's")
    return "\n".join(lines)


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    return json.loads(json.dumps([asdict(row) for row in rows]))


def _impls() -> tuple[str, ...]:
    x = tensors(1)
    return ("native", "cpu") if explain(*x).impl == "native" else ("cpu",)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _peers(pattern: Pattern, n: int, q: Tensor, k: Tensor, v: Tensor, mask: bool) -> list[_Case]:
    cases = []
    if mask and n <= _MOST_MASK:
        place = torch.arange(n)
        bias = torch.where(pattern.sees(place[:, None], place), 0.0, -torch.inf)

        def masked(bias: Tensor = bias) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)

        cases.append(_case("forward", pattern, "sdpa, dense mask", n, masked))
    if isinstance(pattern, SlidingWindow):
        cases.append(
            _case("forward", pattern, "sdpa, by chunks", n, lambda: _chunked(pattern, q, k, v))
        )
    if "native" in _impls():  # FlexAttention needs the same compiler
        cases.append(
            _case("forward", pattern, "flex", n, lambda: attention(q, k, v, pattern, impl="flex"))
        )
    return cases


def _chunked(pattern: SlidingWindow, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a user writes by hand: chunks of a window's length, each against its own keys."""
    size = pattern.window
    outs = []
    for start in range(0, q.shape[2], size):
        first, stop = max(0, start - size + 1), min(start + size, q.shape[2])
        i, j = torch.arange(start, stop)[:, None], torch.arange(first, stop)
        outs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop],
                k[:, :, first:stop],
                v[:, :, first:stop],
                attn_mask=pattern.sees(i, j),
                enable_gqa=True,
            )
        )
    return torch.cat(outs, 2)


def _case(
    what: str,
    pattern: Pattern,
    impl: str,
    n: int,
    run: Callable[[], Any],
    dtype: torch.dtype = torch.float32,
) -> _Case:
    work = 4 * HEAD_DIM * HEADS * pairs(pattern, n) * (2.5 if what == "backward" else 1)
    return _Case(what, pattern, impl, dtype, n, work, run, [])


@torch.no_grad()
def _measured(cases: list[_Case], runs: int) -> list[Row]:
    for case in cases:
        case.run()  # builds, compiles, plans
    for _ in range(runs):
        for case in cases:
            start = time.perf_counter()
            case.run()
            case.times.append(time.perf_counter() - start)
    return [
        Row(
            case.what,
            "" if case.pattern is None else str(case.pattern),
            case.impl,
            str(case.dtype).removeprefix("torch."),
            case.n,
            statistics.median(case.times),
            case.work / statistics.median(case.times),
            runs,
        )
        for case in cases
    ]
