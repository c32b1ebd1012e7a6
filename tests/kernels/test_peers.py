"""Others' kernels behind the front door, beside the oracle; memory isn't poisoned here.

Poison needs torch's deterministic mode, in which torch has no cuDNN backward.
"""

import pytest
import torch

from attnspan import attention
from attnspan.kernels import fa4, fused_cuda
from attnspan.kernels.reference import reference
from attnspan.patterns import Causal, Full, Sinks, SlidingWindow
from attnspan.testing import assert_accurate, magnitudes, make_qkv


def from_fa4(test):
    """FlashAttention-4's compiler warns of its own code."""
    for kind in (
        "ignore:Argument .* cannot be converted to a JitArgument:UserWarning",
        "ignore:.*:DeprecationWarning:(flash_attn|quack|cutlass)",
    ):
        test = pytest.mark.filterwarnings(kind)(test)
    return test


@from_fa4
@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["fa4", "cudnn", "flash"])
@pytest.mark.parametrize("pattern", [Causal(), Full(), SlidingWindow(100)], ids=str)
def test_peers_are_the_oracle_or_say_what_they_lack(pattern, impl) -> None:
    if isinstance(pattern, SlidingWindow) and impl != "fa4":
        with pytest.raises(ValueError, match="torch gives it full attention"):
            attention(*make(300, torch.bfloat16), pattern, impl=impl)
        return
    if impl == "fa4":
        pytest.importorskip("flash_attn.cute")
    held_to_the_oracle(
        lambda q, k, v: attention(q, k, v, pattern, impl=impl, return_lse=False),
        pattern,
        300,
        torch.bfloat16,
        impl,
    )


@from_fa4
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("pattern", "n"),
    [(Causal(), 300), (SlidingWindow(100), 300), (SlidingWindow(100), 170)],
    ids=str,
)
def test_fa4_gives_gradients_of_its_lse(pattern, n, dtype) -> None:
    pytest.importorskip("flash_attn.cute")
    held_to_the_oracle(
        lambda q, k, v: attention(q, k, v, pattern, impl="fa4", return_lse=True),
        pattern,
        n,
        dtype,
        "fa4",
    )


def make(n: int, dtype: torch.dtype, **options):
    """q of n queries, k and v of 300 keys."""
    given = {"batch": 2, "heads": (4, 2), "head_dim": 64, "dtype": dtype, "device": "cuda"}
    return make_qkv(n, 300, **given, **options)


def held_to_the_oracle(call, pattern, n: int, dtype: torch.dtype, name: str) -> None:
    """Results and gradients, those of the log-sum-exp with them where `call` returns it."""
    leaves = make(n, dtype, requires_grad=True)
    weight = make(n, dtype, seed=5)[0]
    place = torch.arange(300, device="cuda")
    mask = pattern.sees(place[300 - n :, None], place)

    def with_grads(out, lse):
        loss = (out * weight).double().sum()
        if lse is None:
            return out, *torch.autograd.grad(loss, leaves)
        return out, lse, *torch.autograd.grad(loss + (lse * weight[..., 0]).double().sum(), leaves)

    results = call(*leaves)
    out, lse = results if isinstance(results, tuple) else (results, None)
    got, wants = with_grads(out, lse), []
    for compute in (dtype, torch.float64):
        right = reference(*leaves, mask, compute=compute, cast=False)
        wants.append(with_grads(right[0], None if lse is None else right[1]))
    grad_lse = None if lse is None else weight[..., 0]
    sizes = magnitudes(*leaves, mask, grad_out=weight, grad_lse=grad_lse)
    if lse is None:
        sizes = (sizes[0], *sizes[2:5])
    for x, low, exact, size in zip(got, *wants, sizes[: len(got)], strict=True):
        assert_accurate(x, low, exact, size, dtype, name)


def test_they_say_what_they_lack() -> None:
    q, k, v = make_qkv(4, 4)
    assert fa4.lacks(q, k, v, Causal(), 0) == "it runs on an NVIDIA GPU"
    assert fused_cuda.lacks("cudnn", q, k, v, Causal(), 0, False) == "it runs on a GPU"
    with pytest.raises(ValueError, match="impl 'fa4' can't do this: it runs on an NVIDIA GPU"):
        attention(q, k, v, Causal(), impl="fa4")


@pytest.mark.gpu
def test_what_they_lack_on_a_gpu() -> None:
    q, k, v = make_qkv(40, 50, head_dim=64, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="impl 'flash' can't do this: it is called without"):
        attention(q, q, q, Causal(), softcap=3.0, impl="flash")
    assert "full attention" in (fused_cuda.lacks("cudnn", q, k, v, Causal(), 10, False) or "")
    assert "log-sum-exp" in (fused_cuda.lacks("flash", q, k, v, Full(), 0, True) or "")
    lack = fa4.lacks(q, k, v, SlidingWindow(4) | Sinks(1), 10)
    assert lack is not None
    if "installed" not in lack:
        assert lack == "it has no SlidingWindow(4) | Sinks(1)"
        assert fa4.lacks(q, k, v, Causal(), 3) == "its queries are the last ones of the keys"
