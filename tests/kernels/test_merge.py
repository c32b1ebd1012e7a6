import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnspan.kernels.merge import merge
from attnspan.kernels.reference import reference
from attnspan.patterns import Full, Pattern
from attnspan.testing import assert_accurate, magnitudes, make_qkv, patterns

pytestmark = pytest.mark.usefixtures("poison_empty")
# Weighted means in another order, of numbers of size one or so.
TIGHT = {"rtol": 1e-13, "atol": 1e-13}


def parts_of(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, owner: list[int], count: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Attention over each part of the keys; key `j` belongs to part `owner[j]`."""
    i = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    seen = pattern.sees(i, torch.arange(k.shape[2]))
    outs, lses = [], []
    for part in range(count):
        mine = torch.tensor([o == part for o in owner], dtype=torch.bool)
        out, lse = reference(q, k, v, seen & mine)
        outs.append(out)
        lses.append(lse)
    return outs, lses


split = st.lists(st.integers(0, 3), min_size=1, max_size=8)


@given(patterns(6), split, st.integers(1, 4))
@settings(deadline=None, max_examples=100)
def test_merged_parts_are_the_union(pattern: Pattern, owner: list[int], n: int) -> None:
    m = len(owner)
    q, k, v = make_qkv(n, m, heads=(4, 2), head_dim=3, dtype=torch.float64)
    whole = reference(q, k, v, pattern, q_offset=m - n)
    out, lse = merge(*parts_of(q, k, v, pattern, owner, 4))
    torch.testing.assert_close(out, whole[0], **TIGHT)
    torch.testing.assert_close(lse, whole[1], **TIGHT)


def test_a_dropped_part_turns_the_union_red() -> None:
    q, k, v = make_qkv(2, 4, dtype=torch.float64)
    whole = reference(q, k, v, torch.ones(2, 4, dtype=torch.bool))
    outs, lses = parts_of(q, k, v, Full(), [0, 1, 2, 2], 3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(merge(outs[:2], lses[:2])[0], whole[0], **TIGHT)


@given(patterns(6), split)
@settings(deadline=None, max_examples=60)
def test_merging_is_associative_and_commutative(pattern: Pattern, owner: list[int]) -> None:
    q, k, v = make_qkv(3, len(owner), head_dim=3, dtype=torch.float64)
    outs, lses = parts_of(q, k, v, pattern, owner, 3)
    flat = merge(outs, lses)
    left = merge(outs[:2], lses[:2])
    nested = merge([left[0], outs[2]], [left[1], lses[2]])
    backwards = merge(outs[::-1], lses[::-1])
    for other in (nested, backwards):
        torch.testing.assert_close(other[0], flat[0], **TIGHT)
        torch.testing.assert_close(other[1], flat[1], **TIGHT)


def test_an_empty_part_changes_no_bit_and_is_not_read() -> None:
    out, lse = torch.randn(2, 3, 5), torch.randn(2, 3)
    nothing = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    for outs, lses in (
        ((out, nothing[0]), (lse, nothing[1])),
        ((nothing[0], out), (nothing[1], lse)),
    ):
        merged, total = merge(outs, lses)
        assert torch.equal(merged, out)
        assert torch.equal(total, lse)
    merged, total = merge([nothing[0]] * 2, [nothing[1]] * 2)
    assert torch.equal(merged, torch.zeros_like(out))
    assert torch.equal(total, nothing[1])


def test_bfloat16_parts_merge_in_float32() -> None:
    q, k, v = make_qkv(4, 64, dtype=torch.bfloat16)
    seen = torch.ones(4, 64, dtype=torch.bool)
    near = torch.arange(64) < 32
    exact, exact_lse = reference(q, k, v, seen, cast=False)
    low, _ = reference(q, k, v, seen, compute=torch.bfloat16, cast=False)
    parts = [reference(q, k, v, seen & part) for part in (near, ~near)]
    out, lse = merge([p[0] for p in parts], [p[1] for p in parts])
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert_accurate(out, low, exact, magnitudes(q, k, v, seen)[0], q.dtype)
    assert (lse - exact_lse).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact_lse.max()


def test_gradients() -> None:
    outs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: merge(x[:3], x[3:]), (*outs, *lses))
    # An empty part, and a row where all are empty, have a gradient of zero and no NaN.
    empty = torch.tensor([-torch.inf, 0.0], dtype=torch.float64, requires_grad=True)
    out, lse = merge([outs[0], outs[1]], [empty, torch.where(empty.isinf(), empty, lses[1])])
    grads = torch.autograd.grad(out.sum() + lse[1], [*outs[:2], empty, lses[1]])
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][0].any()


def test_bad_input_is_refused_in_one_sentence() -> None:
    out, lse = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match="merge: 0 outs and 0 lses"):
        merge([], [])
    with pytest.raises(ValueError, match="merge: 2 outs and 1 lses"):
        merge([out, out], [lse])
    with pytest.raises(ValueError, match=r"shape \(2, 3\) with an lse of shape \(3,\)"):
        merge([out], [torch.zeros(3)])
