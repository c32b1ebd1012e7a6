"""What stands in for FlashAttention where a peer's exchange runs on a CPU."""

import pytest
import torch

from attnspan.kernels.reference import reference
from attnspan.patterns import Causal, Documents, Pattern, SlidingWindow
from benchmarks import flash_reference as flash


@pytest.mark.parametrize(
    ("pattern", "window"),
    [(Causal(), (-1, -1)), (SlidingWindow(3), (2, 0)), (Documents((4, 7)), (-1, -1))],
)
def test_the_stand_in_is_attention(pattern: Pattern, window: tuple[int, int]) -> None:
    whole = [
        torch.randn(1, h, 11, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2, 4)
    ]
    exact, _ = reference(*whole[:3], pattern)
    grads = torch.autograd.grad(exact, whole[:3], whole[3])
    q, k, v, dout = (x.detach()[0].transpose(0, 1).contiguous() for x in whole)
    ends = torch.tensor([0, 4, 11] if isinstance(pattern, Documents) else [0, 11])
    common = (0.0, 0.5, True, *window, 0.0, None, False)
    out, lse, _, _ = flash._flash_attn_varlen_forward(q, k, v, ends, ends, 11, 11, *common)
    found = [torch.empty_like(x) for x in (q, k, v)]
    flash._flash_attn_varlen_backward(dout, q, k, v, out, lse, *found, ends, ends, 11, 11, *common)
    # The log-sum-exp is float32, as FlashAttention's.
    for a, b in zip((out, *found), (exact, *grads), strict=True):
        torch.testing.assert_close(a, b[0].detach().transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_fewer_queries_stand_at_the_end_and_a_blind_one_has_plus_infinity() -> None:
    assert flash.seen(2, 3, False, -1, -1).all()
    assert flash.seen(1, 3, True, 1, 0).tolist() == [[False, True, True]]
    q, k = torch.randn(1, 3, 1, 4), torch.randn(1, 1, 1, 4)
    out, lse, _, _ = flash._flash_attn_forward(q, k, k, 0.0, 1.0, False, -1, 0, 0.0, None, False)
    assert (lse[0, 0] == torch.inf).tolist() == [True, True, False]
    assert not out[0, :2].any()
