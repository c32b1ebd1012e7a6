"""The oracle against a triple loop over Python floats, which shares nothing with it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnspan.kernels.reference import reference
from attnspan.patterns import Causal, Full, Pattern, Sinks, SlidingWindow
from attnspan.testing import make_qkv, patterns

pytestmark = pytest.mark.usefixtures("poison_empty")


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    q_offset: int,
    scale: float,
    softcap: float | None,
    sink_logits: list[float] | None,
) -> tuple[list[float], list[float]]:
    """Every number of out and lse, in order."""
    outs, lses = [], []
    queries, keys, values = q.tolist(), k.tolist(), v.tolist()
    share = q.shape[1] // k.shape[1]
    for b, heads in enumerate(queries):
        for h, rows in enumerate(heads):
            for i, row in enumerate(rows):
                weights, seen = [], []
                for j, key in enumerate(keys[b][h // share]):
                    if not pattern.sees(i + q_offset, j):
                        continue
                    score = scale * math.fsum(x * y for x, y in zip(row, key, strict=True))
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    weights.append(math.exp(score))
                    seen.append(values[b][h // share][j])
                extra = 0.0 if sink_logits is None else math.exp(sink_logits[h])
                total = math.fsum(weights) + extra
                lses.append(math.log(total) if total else -math.inf)
                for d in range(v.shape[-1]):
                    top = math.fsum(w * value[d] for w, value in zip(weights, seen, strict=True))
                    outs.append(top / total if total else 0.0)
    return outs, lses


def check(
    pattern: Pattern,
    n: int,
    m: int,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (2, 1),
    q_offset: int = 0,
    scale: float = 0.5,
    softcap: float | None = None,
    sinks: bool = False,
    told: Pattern | Tensor | None = None,
) -> None:
    q, k, v = make_qkv(n, m, batch=batch, heads=heads, head_dim=3, dtype=torch.float64, seed=n + m)
    logits = torch.linspace(-1, 2, heads[0], dtype=torch.float64) if sinks else None
    out, lse = reference(
        q,
        k,
        v,
        pattern if told is None else told,
        q_offset=q_offset,
        scale=scale,
        softcap=softcap,
        sink_logits=logits,
    )
    outs, lses = by_hand(
        q, k, v, pattern, q_offset, scale, softcap, logits.tolist() if sinks else None
    )
    # Both sum at most 12 terms of size one or so in float64: a few hundred eps is a wide margin
    # for their order and for exp, and far below any dropped or added pair.
    tight = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(out.flatten(), torch.tensor(outs, dtype=torch.float64), **tight)
    torch.testing.assert_close(lse.flatten(), torch.tensor(lses, dtype=torch.float64), **tight)


@given(
    patterns(6),
    st.integers(0, 6),
    st.integers(0, 7),
    st.integers(0, 2),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    st.integers(-3, 8),
    st.sampled_from([None, 0.7, 30.0]),
    st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_reference_is_the_definition(
    pattern: Pattern,
    n: int,
    m: int,
    batch: int,
    heads: tuple[int, int],
    q_offset: int,
    softcap: float | None,
    sinks: bool,
) -> None:
    check(pattern, n, m, batch=batch, heads=heads, q_offset=q_offset, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("pattern", [Causal(), SlidingWindow(3), Sinks(2) | SlidingWindow(2)])
def test_one_wrong_pair_turns_the_oracle_red(pattern: Pattern) -> None:
    i, j = torch.arange(6)[:, None], torch.arange(6)
    mask = pattern.sees(i, j)
    check(pattern, 6, 6, told=mask)
    for row, column in ((0, 0), (5, 5), (5, 0), (2, 3)):
        mutated = mask.clone()
        mutated[row, column] ^= True
        with pytest.raises(AssertionError, match="not close"):
            check(pattern, 6, 6, told=mutated)


def test_a_window_one_too_wide_turns_the_oracle_red() -> None:
    with pytest.raises(AssertionError, match="not close"):
        check(SlidingWindow(3), 6, 6, told=SlidingWindow(4))


def test_masks_broadcast_over_batch_and_heads() -> None:
    q, k, v = make_qkv(3, 5, batch=2, heads=(4, 2), dtype=torch.float64)
    seen = torch.rand(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    out, lse = reference(q, k, v, seen)
    for b in range(2):
        for h in range(4):
            one = slice(b, b + 1), slice(h, h + 1)
            kv = slice(b, b + 1), slice(h // 2, h // 2 + 1)
            part, part_lse = reference(q[one], k[kv], v[kv], seen[b, h])
            torch.testing.assert_close(part, out[one], rtol=0, atol=1e-15)
            torch.testing.assert_close(part_lse, lse[one], rtol=0, atol=1e-15)
    shared = reference(q, k, v, seen[:, :1])[0]
    torch.testing.assert_close(shared[:, 0], out[:, 0], rtol=0, atol=1e-15)


def test_output_dtypes() -> None:
    q, k, v = make_qkv(2, 3, dtype=torch.bfloat16)
    out, lse = reference(q, k, v, Causal())
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    out, lse = reference(q, k, v, Causal(), cast=False)
    assert (out.dtype, lse.dtype) == (torch.float64, torch.float64)


@pytest.mark.parametrize("pattern", [Causal(), SlidingWindow(2, include_self=False), Full()])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_gradients(pattern: Pattern, softcap: float | None, sinks: bool) -> None:
    # An offset of -1 gives rows that see nothing.
    q, k, v = make_qkv(3, 4, head_dim=2, dtype=torch.float64, requires_grad=True)
    logits = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True) if sinks else None

    def both(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference(
            *inputs[:3],
            pattern,
            q_offset=-1,
            softcap=softcap,
            sink_logits=inputs[3] if sinks else None,
        )
        return out, torch.where(lse == -torch.inf, 0, lse)

    inputs = (q, k, v) if logits is None else (q, k, v, logits)
    assert torch.autograd.gradcheck(both, inputs)


def test_a_query_that_sees_nothing_has_no_gradient() -> None:
    q, k, v = make_qkv(2, 2, requires_grad=True)
    out, lse = reference(q, k, v, SlidingWindow(2, include_self=False))
    assert torch.equal(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
    assert torch.equal(lse[:, :, 0], torch.full_like(lse[:, :, 0], -torch.inf))
    (out.sum() + lse[:, :, 1].sum()).backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()
    assert q.grad is not None
    assert not q.grad[:, :, 0].any()
