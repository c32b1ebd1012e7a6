import pytest
import torch

from attnspan import attention, explain
from attnspan.kernels import flex
from attnspan.kernels.reference import reference
from attnspan.patterns import Documents, GlobalTokens, Sinks, SlidingWindow, Strided
from attnspan.patterns.tiles import whole
from attnspan.testing import assert_accurate, magnitudes, make_qkv

# Torch's own compiler warns of torch's own past when it is first imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")


@pytest.mark.parametrize(
    "pattern",
    [
        SlidingWindow(150) | Sinks(3),
        Strided(20, 30) & Documents((100, 140, 60)) | GlobalTokens((5, 17), causal=False),
    ],
    ids=str,
)
def test_it_is_the_oracle(pattern) -> None:
    q, k, v = make_qkv(200, 300, heads=(4, 2), head_dim=32)
    options = {"softcap": 5.0, "scale": 0.3}
    got = attention(q, k, v, pattern, impl="flex", **options)
    mask = pattern.sees(torch.arange(200)[:, None] + 100, torch.arange(300))
    exact, _ = reference(q, k, v, mask, cast=False, **options)
    low, _ = reference(q, k, v, mask, cast=False, compute=torch.float32, **options)
    assert_accurate(got, low, exact, magnitudes(q, k, v, mask, **options)[0], torch.float32)


def test_its_block_mask_is_the_one_that_torch_evaluates() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    pattern = SlidingWindow(150) | Sinks(3)
    ours = flex._block_mask(whole(pattern, 500, 700, 200), torch.device("cpu"))
    theirs = create_block_mask(
        lambda b, h, i, j: pattern.sees(i + 200, j), None, None, 500, 700, device="cpu"
    )
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.sparsity() == theirs.sparsity()


def test_what_it_lacks_on_a_cpu_is_said() -> None:
    q, k, v = make_qkv(5, 5, requires_grad=True)
    with pytest.raises(ValueError, match="'flex' can't do this: on a CPU it has no backward"):
        attention(q, k, v, impl="flex")
    with torch.no_grad():
        with pytest.raises(ValueError, match="on a CPU it gives no log-sum-exp"):
            attention(q, k, v, impl="flex", return_lse=True)
        with pytest.raises(ValueError, match="it takes no empty tensors"):
            explain(q[:, :, :0], k, v, impl="flex")
        with pytest.raises(ValueError, match="it has no float64"):
            explain(q.double(), k.double(), v.double(), impl="flex")


def test_past_the_recompile_limit_it_refuses() -> None:
    torch._dynamo.reset()
    q, k, v = make_qkv(64, 64)
    with torch._dynamo.config.patch(recompile_limit=1):
        attention(q, k, v, SlidingWindow(9), impl="flex")
        with pytest.raises(RuntimeError, match="recompile_limit allows"):
            attention(q[:, :, :50], k, v, SlidingWindow(9), impl="flex")
    torch._dynamo.reset()
