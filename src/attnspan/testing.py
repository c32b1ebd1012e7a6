"""For tests of attention: input makers, derived tolerances, NaN-poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnspan.patterns import Causal, Full, Pattern, Sinks, SlidingWindow

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
    """A hypothesis strategy: every named pattern, and combinations of up to four."""
    from hypothesis import strategies as st

    size = st.integers(1, max_size)
    named: SearchStrategy[Pattern] = st.one_of(
        st.just(Causal()),
        st.just(Full()),
        st.builds(SlidingWindow, size, st.booleans()),
        st.builds(Sinks, st.integers(0, max_size)),
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


def assert_accurate(got: Tensor, low: Tensor, exact: Tensor, what: str = "result") -> None:
    """Raises AssertionError unless `got` is about as near to `exact` as its dtype allows.

    The largest error of `got` may be twice that of `low`, plus a rounding band. Where `exact` is
    not finite, `got` must equal it.

    Args:
        got: the result under test.
        low: the definition computed in the dtype of the inputs of `got`.
        exact: the definition computed in float64.
        what: the name in the message.

    The band is `eps * largest |exact|`: a kernel rounds its result to its dtype at most twice, half
    an eps each, which `low` may happen not to.
    """
    got, low, exact, eps = got.double(), low.double(), exact.double(), torch.finfo(got.dtype).eps
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(got[~finite], exact[~finite]), f"{what}: differs where not finite"
    if not finite.any():
        return
    got, low, exact = got[finite], low[finite], exact[finite]
    error = (got - exact).abs().max().item()
    bound = 2 * (low - exact).abs().max().item() + eps * exact.abs().max().item()
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
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before, warn_only=warned)
