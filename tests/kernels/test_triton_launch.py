"""Launches that are known again: as Triton tells them apart, and no more coarsely."""

from itertools import combinations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: no GPU kernel can be compiled")

from gpu_problems import BF16, lists_of, make

from attnspan.kernels import triton_attention
from attnspan.kernels.triton_launch import _Known, _seen, launch
from attnspan.patterns import Causal


def test_what_is_one_launch_is_one_to_triton() -> None:
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    place = _Known(None).place
    held = torch.zeros(64, dtype=BF16)
    numbers = [0, 1, 2, 16, 17, -16, -1, 2**31 - 1, 2**31, 2**31 + 8, -(2**31), 2**40, 2**40 + 1]
    values = [*numbers, True, False, 1.0, 0.5, None, held, held[1:], held[8:], held.float()]
    for a, b in combinations(values, 2):
        if place(_seen(a)) is place(_seen(b)):
            kinds = [native_specialize_impl(CUDABackend, x, False, True, True) for x in (a, b)]
            assert kinds[0] == kinds[1], (a, b)
    assert place(_seen(17)) is place(_seen(99))


def test_what_triton_does_not_compile_is_called_each_time() -> None:
    class Kernel:
        def __getitem__(self, grid):
            return lambda *x, **y: calls.append((grid, x, y))

    calls = []
    for _ in range(2):
        launch(Kernel(), (3,), 1, WIDE=2)
    assert calls == [((3,), (1,), {"WIDE": 2})] * 2


@pytest.mark.gpu
def test_other_lengths_and_alignments_after_a_first_launch() -> None:
    for n in (300, 512, 300):
        lists = lists_of(Causal(), n, n, 0)
        held = torch.randn(3, 2 * n * 128 + 64, dtype=BF16, device="cuda")
        for offset in (0, 4, 0, 8, 1):
            # Shape and strides are the same, where they start isn't.
            q, k, v = (x[offset:][: 2 * n * 128].view(1, 2, n, 128) for x in held)
            got = triton_attention.forward(q, k, v, lists, 0.1)
            copies = [x.clone() for x in (q, k, v)]
            wanted = triton_attention.forward(*copies, lists, 0.1)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    q, k, v = make(64, 64, dtype=BF16)
    lists = lists_of(Causal(), 64, 64, 0)
    (out, lse), again = (triton_attention.forward(q, k, v, lists, 0.1) for _ in range(2))
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
