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
    what: str  # forward, backward, decode, int8, scores or received
    pattern: Pattern | None
    n: int
    contenders: tuple[str, ...]
    head_dim: int = 128
    lse: bool = False
    batch: int = 1

    @property
    def name(self) -> str:
        length = f"{self.n // K}K" if self.n < K * K else f"{self.n // K**2}M"
        parts = [self.what + (" with LSE" if self.lse and self.what == "forward" else "")]
        parts += [str(self.pattern)] if self.pattern else []
        parts += [f"n={length}"] + ([f"D={self.head_dim}"] if self.head_dim != 128 else [])
        return ", ".join(parts + ([f"B={self.batch}"] if self.batch > 1 else []))

    @property
    def unit(self) -> str:
        return "GB/s" if self.what in ("decode", "int8", "scores") else "TFLOP/s"


W4, W1 = SlidingWindow(4096), SlidingWindow(1024)
STREAMING = SlidingWindow(4096) | Sinks(4)
LONGFORMER, STRIDED = Longformer(1024, 64), Strided(1024, 128)
FA4, BOTH = (*OURS, "fa4"), (*OURS, "fa4", "flex")
DECODERS = ("ours", *peers.DECODE)
CASES = (
    Case("forward", W4, 32 * K, (*BOTH, "flash"), lse=True),
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
    Case("forward", W1, 32 * K, BOTH, head_dim=64, lse=True),
    Case("backward", W1, 32 * K, BOTH, head_dim=64),
    Case("decode", None, 4 * K, DECODERS),
    Case("int8", None, 4 * K, ("ours",)),
    Case("scores", None, 4 * K, ("ours",)),
    Case("decode", None, 64 * K, DECODERS),
    Case("int8", None, 64 * K, ("ours",)),
    Case("scores", None, 64 * K, ("ours",)),
    Case("decode", None, K * K, DECODERS),
    Case("int8", None, K * K, ("ours",)),
    Case("decode", None, 4 * K, DECODERS, batch=32),
    Case("received", Causal(), 8 * K, ("ours", "eager")),
    Case("received", W4, 32 * K, ("ours",)),
    Case("forward", Causal(), 8 * K, (*OURS, "fa4"), lse=True),
    Case("forward", STREAMING, 128 * K, (*OURS, "flex"), lse=True),
    Case("forward", LONGFORMER, 32 * K, (*OURS, "flex"), lse=True),
    Case("forward", STRIDED, 32 * K, (*OURS, "flex"), lse=True),
    Case("forward", Causal(), 32 * K, (*OURS, *peers.PREFILL[:3])),
    Case("backward", Causal(), 32 * K, (*OURS, *peers.PREFILL[:3])),
)
SWEEP = tuple(
    Case("forward", SlidingWindow(w), n * K, FA4, lse=True)
    for w, n in (
        *((w, n) for w in (1024, 4096) for n in (8, 16, 64)),
        *((w, 32) for w in (256, 512, 2048, 8192, 16384)),
    )
)


@dataclass(frozen=True)
class Goal:
    """`kind` speed: theirs over our seconds; time: ours over theirs; both: (ours + forward) over
    forward; rate, us, MiB: our own figure. Speed and rate must be at least `must`."""

    kind: str
    case: str
    against: tuple[str | None, str] | None  # case (None: the same) and contender
    must: float
    aim: float


def goals() -> Iterator[Goal]:
    fa4, flex = (None, "fa4"), (None, "flex")
    for n in ("32K", "128K"):
        for w, lse, no, back in (
            (4096, (1.03, 1.12), (1.05, 1.15), (1.00, 1.10)),
            (1024, (1.15, 1.25), (1.17, 1.27), (1.05, 1.20)),
        ):
            yield Goal("speed", f"forward with LSE, SlidingWindow({w}), n={n}", fa4, *lse)
            yield Goal("speed", f"forward, SlidingWindow({w}), n={n}", fa4, *no)
            yield Goal("speed", f"backward, SlidingWindow({w}), n={n}", fa4, *back)
    yield Goal("speed", f"forward with LSE, {STREAMING}, n=128K", flex, 1.45, 1.6)
    yield Goal("speed", "forward with LSE, SlidingWindow(1024), n=32K, D=64", fa4, 1.05, 1.20)
    yield Goal("speed", "backward, SlidingWindow(1024), n=32K, D=64", fa4, 1.00, 1.10)
    for pattern in (LONGFORMER, STRIDED):
        yield Goal("speed", f"forward with LSE, {pattern}, n=32K", flex, 1.2, 1.4)
    yield Goal("MiB", "backward, SlidingWindow(4096), n=128K", None, 2100, 1560)
    yield Goal("rate", "decode, n=64K", None, 3600, 4300)
    yield Goal("us", "decode, n=4K", None, 12, 8)
    for n, must, aim in (("64K", 0.62, 0.56), ("1M", 0.55, 0.52), ("4K", 1.0, 0.8)):
        yield Goal("time", f"int8, n={n}", (f"decode, n={n}", "ours"), must, aim)
    for n in ("4K", "64K"):
        yield Goal("time", f"scores, n={n}", (f"decode, n={n}", "ours"), 1.10, 1.05)
    for pattern in ("Causal(), n=8K", "SlidingWindow(4096), n=32K"):
        forward = (f"forward with LSE, {pattern}", "ours")
        yield Goal("both", f"received, {pattern}", forward, 1.65, 1.5)
