"""The portable Triton kernels: against the oracle on a GPU, by Triton's interpreter on a CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton isn't installed")

from gpu_problems import PATTERNS, lists_of, make, mask_of
from triton_compile import compiled, interpret, recorded, specialised

from attnspan.kernels import triton_attention
from attnspan.kernels.reference import reference
from attnspan.patterns import Full, Pattern, Sinks, SlidingWindow
from attnspan.testing import assert_accurate, magnitudes, make_qkv

pytestmark = pytest.mark.usefixtures("poison_empty")


def check(
    pattern: Pattern,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offset: int,
    scale: float,
    softcap: float | None = None,
) -> None:
    """Forward and backward against float64, with gradients that come in for out and lse."""
    n, m = q.shape[2], k.shape[2]
    tiles = lists_of(pattern, n, m, offset, q.device.type)
    out, lse = triton_attention.forward(q, k, v, tiles, scale, softcap)
    mask = mask_of(pattern, n, m, offset, q.device.type)
    seen = mask.any(-1)
    generator = torch.Generator().manual_seed(1)
    grad_out, grad_lse = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(q.device, x.dtype)
        for x in (out, lse)
    )
    grad_lse = grad_lse.masked_fill(~seen, 0)
    got = triton_attention.backward(grad_out, grad_lse, q, k, v, out, lse, tiles, scale, softcap)
    options = {"scale": scale, "softcap": softcap}
    results = []
    for compute in (q.dtype, torch.float64):
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        a, b = reference(*inputs, mask, cast=False, compute=compute, **options)
        finite = b.masked_fill(~seen, 0)
        total = (a * grad_out.to(compute)).sum() + (finite * grad_lse.to(compute)).sum()
        results.append((a, b, *torch.autograd.grad(total, inputs)))
    sizes = magnitudes(q, k, v, mask, grad_out=grad_out, grad_lse=grad_lse, **options)
    names = ("out", "lse", "dq", "dk", "dv")
    for name, x, low, exact, size in zip(names, (out, lse, *got), *results, sizes[:5], strict=True):
        assert_accurate(x, low, exact, size, q.dtype, name)
    for x, like in zip(got, (q, k, v), strict=True):
        assert (x.dtype, x.shape) == (like.dtype, like.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_tiles_of_every_kind(pattern, dtype) -> None:
    q, k, v = make_qkv(400, 515, batch=2, heads=(4, 2), head_dim=64, dtype=dtype, device="cuda")
    check(pattern, q, k, v, 115, 0.125)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "value_width"), [(16, 16), (24, 40), (80, 64), (96, 128), (128, 128), (256, 200)]
)
def test_heads_of_any_width(width, value_width) -> None:
    q, k, _ = make_qkv(257, 257, heads=(4, 1), head_dim=width, dtype=torch.bfloat16, device="cuda")
    _, _, v = make_qkv(
        257, 257, heads=(4, 1), head_dim=value_width, dtype=torch.bfloat16, device="cuda"
    )
    check(SlidingWindow(90), q, k, v, 0, width**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize(("scale", "softcap"), [(0.2, 5.0), (-0.3, None), (0.0, None)])
def test_scores_of_every_kind(scale, softcap) -> None:
    q, k, v = make_qkv(200, 200, heads=(4, 2), head_dim=64, dtype=torch.float16, device="cuda")
    check(SlidingWindow(90), q, k, v, 0, scale, softcap)


@pytest.mark.gpu
def test_queries_before_the_first_key_get_zeros() -> None:
    q, k, v = make_qkv(150, 100, heads=(2, 1), head_dim=64, dtype=torch.bfloat16, device="cuda")
    check(SlidingWindow(30), q, k, v, -60, 0.125)
    out, lse = triton_attention.forward(q, k, v, lists_of(SlidingWindow(30), 150, 100, -60), 0.125)
    assert not out[:, :, :60].any()
    assert (lse[:, :, :60] == -torch.inf).all()


@pytest.mark.gpu
def test_strided_views_are_read_where_they_lie() -> None:
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2)[:, :, ::2]
        for x in make_qkv(400, 400, heads=(4, 2), head_dim=64, dtype=torch.float16, device="cuda")
    )
    check(SlidingWindow(90), q, k, v, 0, 0.125)


@pytest.mark.gpu
def test_backward_repeats_to_the_bit() -> None:
    q, k, v = make_qkv(900, 900, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, device="cuda")
    tiles = lists_of(SlidingWindow(300), 900, 900, 0)
    out, lse = triton_attention.forward(q, k, v, tiles, 0.1)
    runs = [triton_attention.backward(out, None, q, k, v, out, lse, tiles, 0.1) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.gpu
def test_other_lengths_and_windows_compile_nothing_anew() -> None:
    from attnspan.kernels import triton_code

    def compilations() -> int:
        return sum(len(cache[0]) for cache in triton_code.forward.device_caches.values())

    for n, window in ((512, 100), (777, 1), (1024, 3000)):
        q, k, v = make_qkv(n, n, heads=(2, 1), head_dim=64, dtype=torch.float16, device="cuda")
        triton_attention.forward(q, k, v, lists_of(SlidingWindow(window), n, n, 0), 0.1)
        if n == 512:
            before = compilations()
    assert compilations() == before


def test_no_keys_and_no_queries() -> None:
    q, k, v = make_qkv(3, 0)
    tiles = lists_of(Full(), 3, 0, 0, "cpu")
    out, lse = triton_attention.forward(q, k, v, tiles, 1.0)
    assert not out.any()
    assert (lse == -torch.inf).all()
    grads = triton_attention.backward(out, None, q, k, v, out, lse, tiles, 1.0)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    assert not grads[0].any()


def test_what_it_lacks_is_said() -> None:
    q, k, v = make_qkv(3, 3)
    assert triton_attention.lacks(q, k, v) == "it has no kernel for cpu tensors"


def test_its_arithmetic_is_the_oracle_by_the_interpreter() -> None:
    interpret("""
import torch
from attnspan.patterns import SlidingWindow, Sinks
from attnspan.testing import make_qkv, poisoned_memory
from kernels.test_triton_attention import check

pattern = SlidingWindow(20) | Sinks(3)
with poisoned_memory():
    for width, value_width, dtype, offset, scale, softcap in (
        (24, 40, torch.float32, 20, 0.3, None),
        (16, 16, torch.float32, -20, -0.3, 5.0),
        (16, 16, torch.float16, 0, 0.0, None),
    ):
        q, k, _ = make_qkv(45, 65, heads=(2, 1), head_dim=width, dtype=dtype)
        _, _, v = make_qkv(45, 65, heads=(2, 1), head_dim=value_width, dtype=dtype)
        check(pattern, q, k, v, offset, scale, softcap)
""")


KERNELS = ("forward", "pull", "backward_keys", "backward_queries")


def launches(n: int, window: int, dtype: torch.dtype, head_dim: int) -> list:
    """What forward and backward start, all options on."""
    from attnspan.kernels import triton_code

    q, k, v = make(n, n, (4, 2), head_dim, dtype, device="cpu")
    tiles = lists_of(SlidingWindow(window) | Sinks(3), n, n, 0, "cpu")
    with recorded(triton_code, *KERNELS) as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_attention, "_roomy", lambda _: True)
        out, lse = triton_attention.forward(q, k, v, tiles, 0.1, 5.0)
        triton_attention.backward(out, lse, q, k, v, out, lse, tiles, 0.1, 5.0)
    return found


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "kernels"),
    [(90, 128, torch.bfloat16, KERNELS), (80, 64, torch.float16, KERNELS[:1])],
)
def test_it_compiles_without_a_gpu(capability, head_dim, dtype, kernels, tmp_path) -> None:
    found = {launch[0].__name__: launch for launch in launches(300, 70, dtype, head_dim)}
    assert tuple(found) == KERNELS
    for name in kernels:
        made = compiled(found[name], capability, tmp_path)
        assert f".target sm_{capability}" in made.asm["ptx"]
        assert made.metadata.shared <= 163 * 1024, "more than an A100's multiprocessor has"


def test_other_lengths_and_windows_are_the_same_to_the_compiler() -> None:
    runs = [launches(n, window, torch.float16, 64) for n, window in ((512, 100), (777, 1))]
    for a, b in zip(*runs, strict=True):
        assert specialised(a) == specialised(b)
