"""For tests of attention: input makers, derived tolerances, NaN-poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    Strided,
)

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def make_qkv(
    n: int,
    m: int,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q `(batch, Hq, n, head_dim)` and k, v `(batch, Hkv, m, head_dim)`; heads (Hq, Hkv).

    The same seed gives the same numbers on every device, up to the rounding to `dtype`.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, h, length, head_dim, generator=generator, dtype=torch.float64)
        .to(device=device, dtype=dtype)
        .requires_grad_(requires_grad)
        for h, length in ((heads[0], n), (heads[1], m), (heads[1], m))
    )
    return q, k, v


def patterns(max_size: int = 12) -> SearchStrategy[Pattern]:
    """A hypothesis strategy: every named pattern with its options, and combinations of up to four.

    Windows, blocks, strides and documents are of up to `max_size` tokens, global tokens lie below
    `3 * max_size`.
    """
    from hypothesis import strategies as st

    size, count, flag = st.integers(1, max_size), st.integers(0, max_size), st.booleans()
    places = st.sets(st.integers(0, 3 * max_size), max_size=6).map(lambda x: tuple(sorted(x)))
    tokens = st.one_of(count, places)
    lengths = st.lists(size, min_size=1, max_size=6).map(tuple)
    named: SearchStrategy[Pattern] = st.one_of(
        st.just(Causal()),
        st.just(Full()),
        st.builds(SlidingWindow, size, st.just(True), st.integers(1, 4), st.integers(0, 4)),
        st.builds(SlidingWindow, size, st.just(False), st.integers(1, 4)),
        st.builds(Sinks, count),
        st.builds(Strided, size, size),
        st.builds(Blockwise, size, flag, flag),
        st.builds(GlobalTokens, tokens, flag),
        st.builds(Longformer, size, tokens, st.integers(0, 4)),
        st.builds(Documents, lengths, flag),
    )
    return st.recursive(
        named,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
        ),
        max_leaves=4,
    )


def magnitudes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> tuple[float, ...]:
    """How large the terms are that attention and its gradients sum up, in any exact algorithm.

    A result's rounding error is about eps times the sum of the absolute values of its terms, not
    times the result, which may be small by cancellation: with P = exp(score - lse), the gradient of
    a score is P * (dout . v - dout . out + dlse), and P itself carries what the score and the lse
    were rounded by: eps * (1 + |q| . |k| + |lse|).

    Args:
        q: with k, v, scale, softcap and sink_logits as in `attnspan.attention`.
        k: see q.
        v: see q.
        mask: bool, True where seen, of a shape that broadcasts to `(batch, Hq, n, m)`.
        scale: see q.
        softcap: see q.
        sink_logits: see q.
        grad_out: the gradient that comes in for `out`; zeros by default.
        grad_lse: that for `lse`; zeros by default.

    Returns:
        The largest sum of absolute terms of out, lse and the gradients of q, k, v and sink_logits
        (the last zero without sink logits).
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.detach().double(), k.detach().double(), v.detach().double()
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    factor = abs(q.shape[-1] ** -0.5 if scale is None else scale)
    sign = 1.0 if scale is None or scale > 0 else -1.0
    scores = sign * factor * q @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    sizes = factor * q.abs() @ k.abs().mT
    sink = scores.new_full((q.shape[1],), -torch.inf)
    if sink_logits is not None:
        sink = sink_logits.detach().double()
    rows = scores.masked_fill(~mask, -torch.inf)
    lse = torch.cat([rows, sink[:, None, None].expand(*rows.shape[:3], 1)], -1).logsumexp(-1)
    lse = lse.masked_fill(lse == -torch.inf, 0)[..., None]
    p = torch.exp(rows - lse)
    wide_p, out = p * (1 + sizes + lse.abs()), (p @ v).abs()
    dout = torch.zeros_like(out) if grad_out is None else grad_out.detach().double().abs()
    dlse = (
        torch.zeros_like(lse) if grad_lse is None else grad_lse.detach().double().abs()[..., None]
    )
    pull = (dout * out).sum(-1, keepdim=True) + dlse
    ds = wide_p * (dout @ v.abs().mT + pull)

    def per_kv_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, groups)).sum(2)

    sums = (
        wide_p @ v.abs(),
        torch.cat([lse.abs(), sizes.masked_fill(~mask, 0)], -1),
        factor * ds @ k.abs(),
        factor * per_kv_head(ds.mT @ q.abs()),
        per_kv_head(wide_p.mT @ dout),
        (torch.exp(sink[:, None, None] - lse) * (1 + lse.abs()) * pull).sum((0, 2)),
    )
    return tuple(x.max().item() if x.numel() else 0.0 for x in sums)


def assert_accurate(
    got: Tensor,
    low: Tensor,
    exact: Tensor,
    magnitude: float,
    dtype: torch.dtype,
    what: str = "result",
) -> None:
    """Raises AssertionError unless `got` is about as near to `exact` as `dtype` allows.

    The largest error of `got` may be twice that of `low`, plus a rounding band of one eps of
    `dtype` times `magnitude`: its terms rounded twice, half an eps each, where `low` may happen to
    be exact. Where `exact` is not finite, `got` must equal it.

    Args:
        got: the result under test.
        low: the definition computed in the dtype of the inputs of `got`.
        exact: the definition computed in float64.
        magnitude: the size of the terms that the result sums up, from `magnitudes`.
        dtype: that of the inputs: a kernel may round scores to it even for a float32 lse.
        what: the name in the message.
    """
    got, low, exact = got.detach().double(), low.detach().double(), exact.detach().double()
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(got[~finite], exact[~finite]), f"{what}: differs where not finite"
    if not finite.any():
        return
    got, low, exact = got[finite], low[finite], exact[finite]
    error = (got - exact).abs().max().item()
    bound = 2 * (low - exact).abs().max().item() + torch.finfo(dtype).eps * magnitude
    assert error <= bound, f"{what}: error {error:.3g} where {bound:.3g} is allowed"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, memory that torch hands out uninitialised holds NaN (or the largest integer).

    A kernel that reads what nobody wrote then shows it. This is torch's deterministic mode
    (`torch.utils.deterministic.fill_uninitialized_memory`); on CUDA operations that have no
    deterministic form run all the same.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before, warn_only=warned)
