"""What benchmarks/gpu.py measures, and what our kernels must reach there.

Batch 1 unless said, 32 query heads over 8 KV heads, bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import peers

from attnspan.patterns import Causal, Longformer, Pattern, Sinks, SlidingWindow, Strided

HEADS, KV_HEADS = 32, 8
OURS = ("hopper", "triton")
K = 1024


@dataclass(frozen=True)
class Case:
    what: str  # forward, backward or decode
    pattern: Pattern | None
    n: int
    contenders: tuple[str, ...]
    head_dim: int = 128
    lse: bool = False
    batch: int = 1

    @property
    def name(self) -> str:
        parts = [self.what + (" with LSE" if self.lse else "")]
        parts += [str(self.pattern)] if self.pattern else []
        parts += [f"n={length(self.n)}"]
        parts += [f"D={self.head_dim}"] if self.head_dim != 128 else []
        return ", ".join(parts + ([f"B={self.batch}"] if self.batch > 1 else []))

    @property
    def unit(self) -> str:
        return "GB/s" if self.what == "decode" else "TFLOP/s"


def length(n: int) -> str:
    return f"{n // K}K" if K <= n < K * K else f"{n // K**2}M" if n >= K * K else str(n)


W4, W1 = SlidingWindow(4096), SlidingWindow(1024)
STREAMING = SlidingWindow(4096) | Sinks(4)
LONGFORMER, STRIDED = Longformer(1024, 64), Strided(1024, 128)
FA4, BOTH, FLEX = (*OURS, "fa4"), (*OURS, "fa4", "flex"), (*OURS, "flex")
DENSE = (*OURS, "fa4", "cudnn", "flash")
SCORES = ("ours", "ours, scores")
DECODERS = (*SCORES, "ours, int8", *peers.DECODE[:4])
CASES = (
    Case("forward", W4, 32 * K, (*BOTH, "flash", "received"), lse=True),
    Case("forward", W1, 32 * K, (*BOTH, "flash"), lse=True),
    Case("forward", W4, 128 * K, FA4, lse=True),
    Case("forward", W1, 128 * K, FA4, lse=True),
    Case("forward", W4, 32 * K, FA4),
    Case("forward", W1, 32 * K, FA4),
    Case("forward", W4, 128 * K, FA4),
    Case("forward", W1, 128 * K, FA4),
    Case("backward", W4, 32 * K, BOTH),
    Case("backward", W1, 32 * K, BOTH),
    Case("backward", W4, 128 * K, BOTH),
    Case("backward", W1, 128 * K, FA4),
    Case("forward", W1, 32 * K, FA4, head_dim=64, lse=True),
    Case("backward", W1, 32 * K, FA4, head_dim=64),
    Case("forward", STREAMING, 128 * K, FLEX, lse=True),
    Case("forward", LONGFORMER, 32 * K, FLEX, lse=True),
    Case("forward", STRIDED, 32 * K, FLEX, lse=True),
    Case("decode", None, 4 * K, DECODERS),
    Case("decode", None, 64 * K, (*DECODERS, "ours, int4")),
    Case("decode", None, K * K, DECODERS),
    Case("decode", None, 4 * K, DECODERS, batch=32),
    Case("forward", Causal(), 8 * K, (*OURS, "fa4", "received", "received, eager"), lse=True),
    Case("forward", Causal(), 32 * K, DENSE),
    Case("backward", Causal(), 32 * K, DENSE),
)
# For the choice of `auto` and for the plot; measured more shortly.
SWEEP = (
    Case("forward", Causal(), 32 * K, ("hopper", "fa4", "flash"), lse=True),
    *(
        Case(what, pattern, 32 * K, contenders, head_dim=64)
        for what in ("forward", "backward")
        for pattern, contenders in ((Causal(), DENSE), (W4, FA4))
    ),
    *(Case("backward", pattern, 32 * K, FLEX) for pattern in (STREAMING, LONGFORMER, STRIDED)),
    Case("forward", STREAMING, 32 * K, OURS, head_dim=64, lse=True),
    Case("backward", STREAMING, 32 * K, OURS, head_dim=64),
    *(Case(what, Causal(), n * K, DENSE) for what in ("forward", "backward") for n in (1, 4)),
    *(Case("forward", pattern, 8 * K, FA4, lse=True) for pattern in (W1, W4)),
    *(
        Case("forward", SlidingWindow(w), n * K, FA4, lse=True)
        for w, n in (
            *((w, n) for w in (1024, 4096) for n in (16, 64)),
            *((w, 32) for w in (256, 512, 2048, 8192, 16384)),
        )
    ),
    *(Case("backward", SlidingWindow(w), 32 * K, FA4) for w in (256, 512, 2048, 8192, 16384)),
    *(Case("backward", W4, n * K, FA4) for n in (8, 64)),
    *(Case("decode", None, n * K, (*SCORES, "ours, int8", "cudnn", "fa4")) for n in (16, 256)),
)


@dataclass(frozen=True)
class Goal:
    """What `kind` says of our figure and theirs must reach `must`, and is aimed at `aim`.

    speed: their seconds over ours; time: ours over theirs; both: the sum over theirs; rate (GB/s),
    us, MiB: ours alone. Speed and rate are to be at least that, the others at most. `ours` None is
    the fastest of our kernels; the fastest of `theirs` counts. `first` are those that README shows.
    """

    label: str
    kind: str
    case: str
    theirs: tuple[str, ...]
    must: float
    aim: float
    ours: str | None = None

    @property
    def first(self) -> bool:
        return self.label in _FIRST


_FIRST = (
    "window 4096, n=32K, forward with LSE",
    "window 1024, n=32K, forward with LSE",
    "window 4096, n=32K, backward",
    "window 1024, n=32K, backward",
    "sinks 4 + window 4096, n=128K, forward",
    "Longformer 1024 + 64 global, n=32K, forward",
    "window 4096, n=128K, backward: memory with gradients",
    "decode bf16, 64K keys",
    "decode bf16, 4096 keys, in a graph",
    "decode int8 to bf16, 64K keys",
    "decode with scores to without, 64K keys",
    "forward and scores to forward, window 4096, n=32K",
)


def goals() -> Iterator[Goal]:
    fa4, flex, ours = ("fa4",), ("flex",), ("ours",)
    for w, lse, no, back in (
        (4096, (1.03, 1.12), (1.05, 1.15), (1.00, 1.10)),
        (1024, (1.15, 1.25), (1.17, 1.27), (1.05, 1.20)),
    ):
        for what, levels in (("forward with LSE", lse), ("forward", no), ("backward", back)):
            for n in ("32K", "128K"):
                case = f"{what}, SlidingWindow({w}), n={n}"
                yield Goal(f"window {w}, n={n}, {what}", "speed", case, fa4, *levels)
    case = f"forward with LSE, {STREAMING}, n=128K"
    yield Goal("sinks 4 + window 4096, n=128K, forward", "speed", case, flex, 1.45, 1.6)
    for what, levels in (("forward with LSE", (1.05, 1.20)), ("backward", (1.00, 1.10))):
        case = f"{what}, SlidingWindow(1024), n=32K, D=64"
        yield Goal(f"D=64, window 1024, n=32K, {what}", "speed", case, fa4, *levels)
    for name, pattern in (("Longformer 1024 + 64 global", LONGFORMER), ("strided", STRIDED)):
        case = f"forward with LSE, {pattern}, n=32K"
        yield Goal(f"{name}, n=32K, forward", "speed", case, flex, 1.2, 1.4)
    case = "backward, SlidingWindow(4096), n=128K"
    yield Goal(
        "window 4096, n=128K, backward: memory with gradients", "MiB", case, ("flex",), 2100, 1560
    )
    cudnn = ("cudnn", "cudnn, packed")
    yield Goal("decode bf16, 64K keys", "rate", "decode, n=64K", cudnn, 3600, 4300, "ours")
    yield Goal("decode bf16, 4096 keys, in a graph", "us", "decode, n=4K", cudnn, 12, 8, "ours")
    for n, must, aim in (("64K", 0.62, 0.56), ("1M", 0.55, 0.52), ("4K", 1.0, 0.8)):
        case = f"decode, n={n}"
        yield Goal(f"decode int8 to bf16, {n} keys", "time", case, ours, must, aim, "ours, int8")
    for n in ("4K", "64K"):
        case = f"decode, n={n}"
        label = f"decode with scores to without, {n} keys"
        yield Goal(label, "time", case, ours, 1.10, 1.05, "ours, scores")
    for name, case in (
        ("causal, n=8K", "forward with LSE, Causal(), n=8K"),
        ("window 4096, n=32K", "forward with LSE, SlidingWindow(4096), n=32K"),
    ):
        label = f"forward and scores to forward, {name}"
        yield Goal(label, "both", case, ("hopper",), 1.65, 1.5, "received")
