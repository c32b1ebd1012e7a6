"""A part taken into a result in place: what `merge` gives, on a GPU or by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from triton_compile import compiled, interpret, recorded

from attnspan.kernels.gpu_merge import merge_into
from attnspan.kernels.merge import merge


def parts(dtype: torch.dtype, width: int, device: str) -> tuple[list, list]:
    """Two parts; the first saw nothing for row 1, the second for row 2, neither for row 3."""
    generator = torch.Generator().manual_seed(3)
    outs = [torch.randn(2, 3, 70, width, generator=generator) for _ in range(2)]
    lses = [4 * torch.randn(2, 3, 70, generator=generator) for _ in range(2)]
    for part, row in ((0, 1), (1, 2), (0, 3), (1, 3)):
        lses[part][..., row] = -torch.inf
        outs[part][..., row, :] = torch.nan
    return [x.to(device, dtype) for x in outs], [x.to(device) for x in lses]


def check(dtype: torch.dtype, width: int, device: str) -> None:
    outs, lses = parts(dtype, width, device)
    expected = merge(outs, lses)
    # Into every third row, the heads within, as a class of a stride lies.
    out = torch.full((2, 210, 3, width), 7.0, dtype=dtype, device=device)
    lse = torch.full((2, 3, 210), 7.0, device=device)
    into, its_lse = out.transpose(1, 2)[:, :, 1::3], lse[..., 1::3]
    into.copy_(outs[0])
    its_lse.copy_(lses[0])
    merge_into(into, its_lse, outs[1], lses[1])
    close = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(into, expected[0], atol=close, rtol=close)
    torch.testing.assert_close(its_lse, expected[1], atol=1e-6, rtol=1e-6)
    assert torch.equal(into[:, :, 2], outs[0][:, :, 2])
    assert (out.transpose(1, 2)[:, :, 2::3] == 7).all()
    assert (lse[..., ::3] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 128, 40])
def test_it_is_the_merge(dtype, width) -> None:
    check(dtype, width, "cuda")


def test_it_is_the_merge_by_the_interpreter() -> None:
    interpret("""
import torch
from kernels.test_gpu_merge import check

for dtype, width in ((torch.float32, 24), (torch.float16, 16)):
    check(dtype, width, "cpu")
""")


def test_it_compiles_without_a_gpu(tmp_path) -> None:
    from attnspan.kernels import triton_code

    outs, lses = parts(torch.bfloat16, 128, "cpu")
    with recorded(triton_code, "merge") as launches:
        merge_into(outs[0], lses[0], outs[1], lses[1])
    (launch,) = launches
    text = compiled(launch, 90, tmp_path).asm["ptx"]
    assert "ld.global.v4" in text, "rows are read by pieces of less than 16 bytes"


def test_passes_of_a_batch_and_of_queries_that_lie_by_channel() -> None:
    interpret("""
import torch
from attnspan import gpu
from attnspan.kernels.reference import reference
from attnspan.patterns import SlidingWindow, Strided
from attnspan.testing import make_qkv

gpu.lacks_backward = lambda *_: None  # it would ask for a GPU
pattern = SlidingWindow(4) | Strided(4, 8)
for lies in (lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: x.mT.contiguous().mT[:1]):
    q, k, v = (lies(x) for x in make_qkv(40, 40, batch=2, heads=(4, 2)))
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = reference(*given, pattern, scale=0.25)
    out, lse = gpu.forward("triton", q, k, v, str(pattern), 0, 0.25, None)
    torch.testing.assert_close((out, lse), exact, atol=1e-5, rtol=1e-5)
    grad = torch.linspace(-1, 2, out.numel()).view(out.shape)
    total = (exact[0] * grad).sum() + exact[1].square().sum()
    got = gpu.backward(
        "triton", grad, 2 * lse, q, k, v, out, lse, str(pattern), 0, 0.25, None
    )
    torch.testing.assert_close(got, torch.autograd.grad(total, given), atol=1e-4, rtol=1e-4)
""")
