import pytest
import torch

from attnspan.kernels.joint import joint
from attnspan.kernels.reference import reference
from attnspan.kernels.view import Part
from attnspan.testing import assert_accurate, magnitudes, make_qkv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_sixteen_bits_cost_one_rounding(dtype, size) -> None:
    """Where q and k are of 30 each, a score of 128 channels passes what fp16 holds."""
    q, k, v = make_qkv(3, 40, heads=(4, 2), head_dim=128, dtype=dtype)
    q, k = q * size, k * size
    parts = Part(q, k[:, :, :7], v[:, :, :7]), Part(q, k[:, :, 7:], v[:, :, 7:])
    out, _, scores = joint(parts, scale=128**-0.5, return_scores=True)
    seen = torch.ones(3, 40, dtype=torch.bool)
    low, _ = reference(q, k, v, seen, compute=dtype, cast=False)
    exact, _ = reference(q.double(), k.double(), v.double(), seen)
    # Arithmetic is fp32: what the 16 bits cost is the rounding of the result alone.
    bound = torch.finfo(dtype).eps * exact.abs().max().item() + 1e-4 * size**0.5
    assert (out.double() - exact).abs().max().item() <= bound
    if low.isfinite().all():
        magnitude = magnitudes(q, k, v, seen)[0]
        assert_accurate(out, low, exact, magnitude, dtype)
    assert scores is not None
    torch.testing.assert_close(sum(s.sum() for s in scores), torch.tensor(12.0))


def test_fp16_scores_do_not_overflow() -> None:
    q = torch.full((1, 1, 1, 128), 30.0, dtype=torch.float16)
    out, _, _ = joint((Part(q, q, q),), scale=1.0)
    torch.testing.assert_close(out, q)
