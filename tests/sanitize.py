"""One small shape of each GPU kernel, for compute-sanitizer; odd lengths, two ranges of keys.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py

Without torch's caching every tensor is an allocation of its own, so a read past one is seen.
"""

from __future__ import annotations

import sys

import torch

from attnspan import attention, received
from attnspan.cache import Int4, Int8
from attnspan.kernels.view import KVView, RawPart, Stored
from attnspan.patterns import Pattern, Sinks, SlidingWindow, Strided
from attnspan.testing import make_qkv
from attnspan.views import attend

PATTERN = SlidingWindow(70) | Sinks(3)
SHAPE = {"heads": (4, 2), "dtype": torch.bfloat16, "device": "cuda"}


def prefill(impl: str, head_dim: int, deterministic: bool, pattern: Pattern = PATTERN) -> None:
    torch.use_deterministic_algorithms(deterministic)
    leaves = make_qkv(201, 333, head_dim=head_dim, **SHAPE, requires_grad=True)
    out = attention(*leaves, pattern, impl=impl)
    out.float().square().sum().backward()
    torch.use_deterministic_algorithms(False)


def cut() -> None:
    """Backward in parts, whose sums meet."""
    shape = SHAPE | {"heads": (8, 1)}
    leaves = make_qkv(901, 901, head_dim=128, **shape, requires_grad=True)
    out = attention(*leaves, SlidingWindow(400), impl="hopper")
    out.float().square().sum().backward()


def scores(head_dim: int) -> None:
    q, k, _ = make_qkv(201, 333, head_dim=head_dim, **SHAPE)
    received(q, k, PATTERN)


def decode(storage: Int4 | Int8 | None) -> None:
    q, k, v = make_qkv(1, 333, head_dim=128, **SHAPE)
    if storage is None:
        attention(q, k, v, PATTERN, impl="decode")
        return
    mean = k.float().mean(2, keepdim=True) if isinstance(storage, Int4) else None
    group = storage.group if isinstance(storage, Int4) else 0
    stored = Stored(storage.kind, storage.encode(k, v, mean), mean, group)
    attend(KVView((RawPart(q, stored),)), return_scores=True)


RUNS = {
    "hopper, 128": lambda: prefill("hopper", 128, False),
    "hopper, 64, deterministic": lambda: prefill("hopper", 64, True),
    "hopper, 128, cut": cut,
    "hopper, a stride's passes": lambda: prefill("hopper", 64, False, Strided(50, 7)),
    "triton, 64": lambda: prefill("triton", 64, False),
    "received, 128": lambda: scores(128),
    "received, 64": lambda: scores(64),
    "decode": lambda: decode(None),
    "decode, int8": lambda: decode(Int8()),
    "decode, int4": lambda: decode(Int4()),
}

if __name__ == "__main__":
    for name in sys.argv[1:] or RUNS:
        RUNS[name]()
        torch.cuda.synchronize()
        print(name, "ran", flush=True)
