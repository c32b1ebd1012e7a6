"""A token's way into a cache against torch's own operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnspan.cache import Dense, Int8
from attnspan.kernels import gpu_append
from attnspan.positions import Rope

pytestmark = pytest.mark.usefixtures("poison_empty")


def token(heads: int, dtype: torch.dtype, width: int, seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 1, heads, width, generator=generator).cuda().to(dtype)
    return x.transpose(1, 2)  # as a model's projections leave it


@pytest.mark.gpu
@pytest.mark.parametrize("storage", [Dense(), Int8()], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [16, 64, 128])
def test_a_token_is_turned_encoded_and_written(storage, dtype, width) -> None:
    q, k, v = (token(heads, dtype, width, i) for i, heads in enumerate((6, 2, 2)))
    v[0, 0] = 0  # a vector of zeros has a scale
    rope, position = Rope(width, 1e4), torch.tensor([1_000_003], device="cuda")
    angles = rope.spread(position)
    fields = {
        name: torch.zeros(2, 2, 9, wide, dtype=kind, device="cuda")
        for name, (wide, kind) in storage.layout(width, dtype).items()
    }
    before = {name: x.clone() for name, x in fields.items()}
    assert gpu_append.lacks(q, fields, angles) is None
    slot = torch.tensor([5], device="cuda")
    turned = gpu_append.append(q, k, v, fields, slot, *angles)
    # One rounding to the dtype, of sums that may be fused: the last place, and no more.
    close = {"atol": 1e-6, "rtol": torch.finfo(dtype).eps}
    torch.testing.assert_close(turned, rope.turn(q, *angles), **close)
    exact = storage.encode(rope.turn(k, *angles), v, None)
    for name, x in fields.items():
        others = [i for i in range(9) if i != 5]
        assert torch.equal(x[:, :, others], before[name][:, :, others])
        got, expected = x[:, :, 5:6], exact[name]
        if name == "value" or not x.is_floating_point():
            assert (got.float() - expected.float()).abs().max() <= (name == "key")
            assert (got != expected).float().mean() < 0.02
        else:
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=2**-7)


def test_it_says_what_it_lacks() -> None:
    x = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16)
    assert gpu_append.lacks(x, {}, (x, x)) == "it runs on NVIDIA's Hopper GPUs, not on cpu"


@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
def test_it_compiles_for_sm_90(int8) -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from attnspan.kernels.gpu_append_code import append_token

    pointers = {
        **dict.fromkeys(("q", "k", "v", "turned"), "*bf16"),
        **dict.fromkeys(("cos", "sin"), "*fp32"),
        **dict.fromkeys(("key", "value"), "*i8" if int8 else "*bf16"),
        "slot": "*i64",
    }
    constants: dict[str, object] = {"HEADS": 32, "D": 128, "INT8": int8}
    scales = ("key_scale", "value_scale")
    pointers |= dict.fromkeys(scales, "*fp16") if int8 else {}
    constants |= {} if int8 else dict.fromkeys(scales)
    signature, fixed = {}, {}
    for i, argument in enumerate(append_token.arg_names):
        if argument in constants:
            signature[argument], fixed[(i,)] = "constexpr", constants[argument]
        else:
            signature[argument] = pointers.get(argument, "i32")
    made = triton.compile(
        ASTSource(append_token, signature, fixed),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 1, "launch_pdl": True},
    )
    reads = made.asm["ptx"].partition("griddepcontrol.wait")[2]
    assert "ld.global" in reads  # nothing is read before the kernel before has ended
    assert "ld.global" not in made.asm["ptx"].partition("griddepcontrol.wait")[0]
