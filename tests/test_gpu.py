"""Our GPU kernels through the front door: every pattern and its gradients against the oracle."""

from __future__ import annotations

import pytest
import torch

from attnspan import attention, gpu
from attnspan.kernels.reference import reference
from attnspan.patterns import (
    Blockwise,
    Causal,
    Documents,
    Full,
    GlobalTokens,
    Longformer,
    Sinks,
    SlidingWindow,
    Strided,
)
from attnspan.testing import assert_accurate, magnitudes, make_qkv

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison_empty")]

PATTERNS = [
    Causal(),
    Full(),
    SlidingWindow(100) | Sinks(4),
    SlidingWindow(30, dilation=3),
    SlidingWindow(70, right=20),
    Strided(60, 7),
    Blockwise(96, before=True),
    Longformer(90, 20),
    Longformer(90, (5, 200), right=9),
    Documents((101, 250, 120)),
    Documents((200, 300)) & (SlidingWindow(64) | GlobalTokens((2,))),
    Causal() & ~SlidingWindow(50),
]


@pytest.mark.parametrize("impl", ["hopper", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern_is_the_oracle(pattern, dtype, impl) -> None:
    n, m = 333, 500
    shape = {"batch": 2, "heads": (4, 2), "head_dim": 64, "dtype": dtype}
    leaves = make_qkv(n, m, **shape, device="cuda", requires_grad=True)
    weight = make_qkv(n, m, **shape, device="cuda", seed=5)[0]
    sink = torch.linspace(-1, 2, 4, device="cuda", requires_grad=True)
    mask = pattern.sees(
        torch.arange(n, device="cuda")[:, None] + m - n, torch.arange(m, device="cuda")
    )

    def run(compute: torch.dtype | None) -> tuple:
        if compute is None:
            given = {"sink_logits": sink, "return_lse": True, "impl": impl}
            out, lse = attention(*leaves, pattern, **given)
        else:
            out, lse = reference(*leaves, mask, compute=compute, cast=False, sink_logits=sink)
        total = (out * weight).double().sum() + torch.where(lse == -torch.inf, 0, lse).sum() * 0.5
        return out, lse, *torch.autograd.grad(total, (*leaves, sink))

    options = {"sink_logits": sink, "grad_out": weight}
    sizes = magnitudes(*leaves, mask, **options, grad_lse=torch.full((2, 4, n), 0.5).cuda())
    names = ("out", "lse", "grad of q", "grad of k", "grad of v", "grad of the sink")
    for name, got, low, exact, size in zip(
        names, run(None), run(dtype), run(torch.float64), sizes, strict=True
    ):
        assert_accurate(got, low, exact, size, dtype, name)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_received_is_the_sum_of_the_weights(pattern) -> None:
    q, k, _ = make_qkv(
        300, 400, batch=2, heads=(4, 2), head_dim=64, dtype=torch.bfloat16, device="cuda"
    )
    mask = pattern.sees(
        torch.arange(300, device="cuda")[:, None] + 100, torch.arange(400, device="cuda")
    )
    eye = torch.eye(400, device="cuda", dtype=q.dtype).expand(2, 2, 400, 400)
    weights, lse = reference(q, k, eye, mask, cast=False)
    expected = weights.sum(2).unflatten(1, (2, 2)).sum(2).float()
    got = gpu.received(q, k, lse.float(), str(pattern), 100, 64**-0.5, None)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
