"""What the tests of GPU kernels share: patterns, their lists and masks, and random inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspan.kernels.gpu_lists import Lists
from attnspan.patterns import (
    Blockwise,
    Causal,
    Documents,
    Full,
    GlobalTokens,
    Longformer,
    Pattern,
    Sinks,
    SlidingWindow,
    plan,
)
from attnspan.testing import make_qkv

BF16, FP16 = torch.bfloat16, torch.float16

PATTERNS = (
    Causal(),
    Full(),
    SlidingWindow(70),
    SlidingWindow(300) | Sinks(3),
    Longformer(90, 5, right=20),
    Documents((60, 101, 239)),
)
# (pattern, n, m, offset): every kind of edge that a kernel's tiles can have.
PROBLEMS = (
    (SlidingWindow(1024), 1500, 1500, 0),
    (SlidingWindow(1), 300, 300, 0),
    (SlidingWindow(129), 517, 517, 0),
    (SlidingWindow(150), 211, 467, 256),
    (SlidingWindow(90), 301, 200, -50),
    (SlidingWindow(90), 301, 200, 250),
    (SlidingWindow(70, include_self=False), 333, 333, 0),
    (SlidingWindow(300), 1, 601, 600),
    (SlidingWindow(200) | Sinks(4), 901, 901, 0),
    (Longformer(200, 64), 901, 901, 0),
    (Longformer(100, 30, right=99), 500, 500, 0),
    (Documents((100, 7, 300, 65)), 500, 500, 0),
    (Documents((100, 7, 300, 65), causal=False), 500, 500, 0),
    (Blockwise(50, before=True), 400, 400, 0),
    (GlobalTokens((3, 99, 300)) | SlidingWindow(40), 600, 600, 0),
    (Causal(), 777, 777, 0),
    (Full(), 130, 1000, 0),
    (~Causal(), 200, 200, 0),
)


def lists_of(pattern: Pattern, n: int, m: int, offset: int, device: str = "cuda") -> Lists:
    """The lists of a pattern that is one dense problem."""
    (only,) = plan(pattern, n, m, offset)
    (job,) = only.jobs
    return Lists(job.tiles, device)


def mask_of(pattern: Pattern, n: int, m: int, offset: int, device: str = "cuda") -> Tensor:
    """`(n, m)`, true where a query sees a key."""
    i, j = torch.arange(n, device=device)[:, None] + offset, torch.arange(m, device=device)
    return pattern.sees(i, j).expand(n, m)


def make(
    n: int,
    m: int,
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 128,
    dtype: torch.dtype = BF16,
    batch: int = 1,
    device: str = "cuda",
) -> tuple[Tensor, Tensor, Tensor]:
    """`attnspan.testing.make_qkv` with the defaults of most tests of GPU kernels."""
    return make_qkv(n, m, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype, device=device)
