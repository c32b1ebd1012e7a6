"""The front door on a GPU: every pattern and gradient against the oracle, and what is chosen."""

from __future__ import annotations

import pytest
import torch

from attnspan import attention, dispatch, explain, received
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
    for given in (None, lse.float()):
        got = received(q, k, pattern, lse=given)
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_few_queries_are_decoded(pattern, n) -> None:
    pattern = Documents((n + 40,) * 9) if isinstance(pattern, Documents) else pattern
    shape = {"batch": 2, "heads": (8, 2), "head_dim": 128, "dtype": torch.bfloat16}
    q, k, v = make_qkv(n, 300, **shape, device="cuda")
    sink = torch.linspace(-1, 2, 8, device="cuda")
    options = {"sink_logits": sink, "scale": 0.1, "softcap": 20.0}
    out, lse = attention(q, k, v, pattern, impl="decode", return_lse=True, **options)
    mask = pattern.sees(
        torch.arange(n, device="cuda")[:, None] + 300 - n, torch.arange(300, device="cuda")
    )
    low = reference(q, k, v, mask, compute=torch.bfloat16, cast=False, **options)
    exact = reference(q, k, v, mask, cast=False, **options)
    sizes = magnitudes(q, k, v, mask, **options)
    for got, rough, right, size in zip((out, lse), low, exact, sizes, strict=False):
        assert_accurate(got, rough, right, size, torch.bfloat16, "decode")
    assert explain(q, k, v, pattern, **options).impl == "decode"


@pytest.mark.parametrize("n", [1, 200])
def test_it_compiles_whole_for_any_length(n) -> None:
    pattern = SlidingWindow(90) | Sinks(2)

    def f(q, k, v):
        return attention(q, k, v, pattern, return_lse=True)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for more in (0, 1, 50):
        given = make_qkv(
            n + more, 300 + more, heads=(4, 2), head_dim=64, dtype=torch.bfloat16, device="cuda"
        )
        given = [x.requires_grad_() for x in given]
        results = [g(*given) for g in (f, compiled)]
        grads = [
            torch.autograd.grad(out.float().square().sum() + lse.sum(), given)
            for out, lse in results
        ]
        torch.testing.assert_close(results[1], results[0], atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(grads[1], grads[0], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "pattern",
    [SlidingWindow(50), GlobalTokens((3, 40, 90, 130, 170, 210)) & Causal(), ~Strided(30, 7)],
    ids=str,
)
def test_auto_is_right_for_what_our_kernels_lack_too(pattern, dtype) -> None:
    q, k, v = make_qkv(250, 250, heads=(4, 2), head_dim=64, dtype=dtype, device="cuda")
    out = attention(q, k, v, pattern)
    exact = reference(q, k, v, pattern)[0]
    close = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out, exact, atol=close, rtol=close)
    # Of one function torch.compile keeps eight variants; these tests ask for more.
    with torch._dynamo.config.patch(recompile_limit=64):
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v, pattern)
    torch.testing.assert_close(compiled, exact, atol=close, rtol=close)
    assert explain(q, k, v, pattern).impl in dispatch.IMPLS


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 80, 96, 256])
def test_auto_is_right_for_heads_of_any_width(head_dim, heads) -> None:
    leaves = make_qkv(
        130,
        150,
        heads=heads,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        device="cuda",
        requires_grad=True,
    )
    for pattern in (Causal(), SlidingWindow(40), SlidingWindow(40) | Sinks(3)):
        out = attention(*leaves, pattern)
        exact = reference(*leaves, pattern, q_offset=20)[0]
        torch.testing.assert_close(out, exact, atol=2e-2, rtol=2e-2)
        got, wants = (torch.autograd.grad(x.float().sum(), leaves) for x in (out, exact))
        torch.testing.assert_close(got, wants, atol=5e-2, rtol=5e-2)
        assert explain(*leaves, pattern).impl != "flex"


def test_explain_gives_the_figures() -> None:
    q, k, v = make_qkv(4096, 4096, heads=(4, 2), head_dim=128, dtype=torch.bfloat16, device="cuda")
    said = explain(q, k, v, SlidingWindow(1024))
    if torch.cuda.get_device_capability() != (9, 0):
        assert said.figures == ()
        return
    assert said.impl == "hopper"
    assert dict(said.figures)["hopper"] > 0
    assert "TFLOP/s for forward of SlidingWindow" in str(said)
    single = explain(q[:, :, :1], k, v)
    assert (single.impl, single.reasons) == (
        "decode",
        ("a few queries are read through once, whatever they see",),
    )


def test_auto_maps_over_the_batch() -> None:
    q, k, v = make_qkv(
        40, 70, batch=3, heads=(4, 2), head_dim=64, dtype=torch.bfloat16, device="cuda"
    )
    several = torch.stack([q, q + 1])
    got = torch.func.vmap(lambda x: attention(x, k, v, SlidingWindow(20)))(several)
    wants = torch.stack([attention(x, k, v, SlidingWindow(20)) for x in several])
    torch.testing.assert_close(got, wants)
