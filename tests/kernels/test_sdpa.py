from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnspan.kernels import sdpa as fused
from attnspan.kernels.reference import reference
from attnspan.patterns import Causal, Full, Pattern, Sinks, SlidingWindow
from attnspan.testing import assert_accurate, magnitudes, make_qkv, patterns

pytestmark = pytest.mark.usefixtures("poison_empty")
NAMES = ("out", "lse", "grad of q", "grad of k", "grad of v", "grad of sink_logits")


def check(
    seen: Pattern | Tensor,
    n: int,
    m: int,
    *,
    told: Pattern | Tensor | None = None,
    batch: int = 1,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    q_offset: int = 0,
    sinks: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Holds out, lse and all gradients of a random weighting of both against the oracle."""
    q, k, v = make_qkv(
        n, m, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype, device=device, seed=n + m
    )
    sink = torch.linspace(-1, 2, heads[0], dtype=dtype, device=device) if sinks else None
    weights = make_qkv(n, n, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype, seed=1)
    weight_out = weights[0].to(device).double()
    weight_lse = weight_out[..., 0]

    def results(function: Callable[..., Any], wide: bool, **options: Any) -> list[Tensor]:
        inputs = [
            (x.double() if wide else x).detach().requires_grad_()
            for x in (q, k, v, sink)
            if x is not None
        ]
        logits = inputs[3] if sinks else None
        out, lse = function(*inputs[:3], sink_logits=logits, q_offset=q_offset, **options)
        kept = torch.where(lse == -torch.inf, 0, lse)
        loss = (out.double() * weight_out).sum() + (kept.double() * weight_lse).sum()
        return [out, lse, *torch.autograd.grad(loss, inputs)]

    got = results(fused.sdpa, False, seen=seen if told is None else told)
    low = results(reference, False, seen=seen, compute=dtype)
    exact = results(reference, True, seen=seen)
    mask = seen
    if isinstance(seen, Pattern):
        i = torch.arange(n, device=device)[:, None] + q_offset
        mask = seen.sees(i, torch.arange(m, device=device))
    sizes = magnitudes(q, k, v, mask, sink_logits=sink, grad_out=weight_out, grad_lse=weight_lse)
    for name, a, b, c, size in zip(NAMES, got, low, exact, sizes, strict=False):
        # In float64 the oracle is no better than the kernel: the worst order of sums counts.
        terms = n + m + head_dim if dtype == torch.float64 else 1
        assert_accurate(a, b, c, terms * size, dtype, name)


dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@given(
    patterns(24),
    st.integers(0, 40),
    st.integers(0, 70),
    st.integers(0, 2),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    st.sampled_from([1, 3, 16, 20, 64]),
    st.integers(-5, 50),
    st.booleans(),
    dtypes,
)
@settings(deadline=None, max_examples=200)
def test_sdpa_is_the_reference(
    pattern: Pattern,
    n: int,
    m: int,
    batch: int,
    heads: tuple[int, int],
    head_dim: int,
    q_offset: int,
    sinks: bool,
    dtype: torch.dtype,
) -> None:
    check(
        pattern,
        n,
        m,
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        q_offset=q_offset,
        sinks=sinks,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sinks", [False, True])
def test_many_tiles(dtype: torch.dtype, sinks: bool) -> None:
    check(SlidingWindow(200) | Sinks(4), 300, 700, q_offset=400, sinks=sinks, dtype=dtype)
    check(Causal(), 300, 300, sinks=sinks, dtype=dtype)


@pytest.mark.parametrize("shape", [(6, 9), (1, 1, 6, 9), (2, 1, 6, 9), (1, 4, 6, 9), (2, 4, 6, 9)])
def test_masks_with_rows_that_see_nothing(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[..., 2, :] = False
    check(mask, 6, 9, batch=2)
    check(mask, 6, 9, batch=2, sinks=True)
    q, k, v = make_qkv(6, 9, batch=2, heads=(4, 2))
    out, lse = fused.sdpa(q, k, v, mask)
    assert not out[:, :, 2].any()
    assert (lse[:, :, 2] == -torch.inf).all()


@pytest.mark.parametrize("pattern", [Causal(), SlidingWindow(5), Full()])
def test_one_wrong_pair_turns_it_red(pattern: Pattern) -> None:
    mask = pattern.sees(torch.arange(12)[:, None], torch.arange(12))
    check(pattern, 12, 12, told=mask)
    for row, column in ((0, 0), (11, 11), (11, 7), (5, 6)):
        mutated = mask.clone()
        mutated[row, column] ^= True
        with pytest.raises(AssertionError, match="out"):
            check(pattern, 12, 12, told=mutated)


def test_a_window_one_too_wide_turns_it_red() -> None:
    with pytest.raises(AssertionError, match="out"):
        check(SlidingWindow(5), 12, 12, told=SlidingWindow(6))


@pytest.mark.parametrize("pattern", [Causal(), Full(), SlidingWindow(2, include_self=False)])
@pytest.mark.parametrize("sinks", [False, True])
def test_gradients(pattern: Pattern, sinks: bool) -> None:
    q, k, v = make_qkv(3, 4, head_dim=2, dtype=torch.float64, requires_grad=True)
    logits = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True) if sinks else None

    def both(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        sink = inputs[3] if sinks else None
        out, lse = fused.sdpa(*inputs[:3], pattern, sink_logits=sink)
        return out, torch.where(lse == -torch.inf, 0, lse)

    inputs = (q, k, v) if logits is None else (q, k, v, logits)
    assert torch.autograd.gradcheck(both, inputs)


def test_strides_of_every_kind() -> None:
    q, k, v = make_qkv(5, 7, heads=(2, 2), dtype=torch.float64)
    straight = fused.sdpa(q, k, v, Full())
    for order in ((0, 1, 3, 2), (3, 2, 1, 0), (2, 0, 3, 1)):
        back = [order.index(axis) for axis in range(4)]
        a, b, c = (x.permute(order).contiguous().permute(back) for x in (q, k, v))
        a.requires_grad_()
        out, lse = fused.sdpa(a, b, c, Full())
        torch.testing.assert_close(out, straight[0], rtol=0, atol=1e-15)
        torch.testing.assert_close(lse, straight[1], rtol=0, atol=1e-15)
        # A gradient whose strides are all zero, as `sum` gives it.
        expected = torch.autograd.grad(reference(a, b, c, Full())[0].sum(), a)[0]
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), a)[0], expected, rtol=0, atol=1e-14
        )


def test_a_sink_of_minus_infinity_is_none() -> None:
    q, k, v = make_qkv(3, 4, requires_grad=True)
    sink = torch.full((2,), -torch.inf, requires_grad=True)
    pattern = SlidingWindow(2, include_self=False)
    out, lse = fused.sdpa(q, k, v, pattern, sink_logits=sink)
    plain, plain_lse = fused.sdpa(q, k, v, pattern)
    assert torch.equal(lse, plain_lse)
    torch.testing.assert_close(out, plain)
    for grad in torch.autograd.grad(out.sum(), (q, k, v, sink)):
        assert grad.isfinite().all()


def test_what_it_lacks_is_named() -> None:
    q, k, v = make_qkv(2, 3)
    assert fused.lacks(q, k, v) is None
    assert fused.lacks(q, k, v, softcap=30.0) == "it has no logit soft cap"
    assert fused.lacks(q, k, v[..., :8]) == "it needs values as wide as keys, not 8 beside 16"
    meta = [x.to("meta") for x in (q, k, v)]
    assert fused.lacks(*meta) == "it has no kernel with a log-sum-exp for meta tensors"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sinks", [False, True])
def test_cuda(dtype: torch.dtype, sinks: bool) -> None:
    for n, m, offset in ((300, 300, 0), (1, 515, 514), (37, 130, 93), (5, 3, -2)):
        for pattern in (Causal(), SlidingWindow(20, include_self=False) | Sinks(2), Full()):
            check(pattern, n, m, q_offset=offset, sinks=sinks, dtype=dtype, device="cuda")


@pytest.mark.gpu
def test_cuda_edges_and_limits() -> None:
    for n, m in ((0, 4), (4, 0), (0, 0)):
        check(Causal(), n, m, device="cuda")
    q, k, v = make_qkv(2, 3, head_dim=6, dtype=torch.bfloat16, device="cuda")
    assert "whole 16 bytes" in str(fused.lacks(q, k, v))
    assert "no float64 kernel" in str(fused.lacks(q.double(), k.double(), v.double()))
