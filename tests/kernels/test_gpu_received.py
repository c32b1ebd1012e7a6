"""What keys receive: against float64 on a GPU, by Triton's interpreter and compilers on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton isn't installed")

from gpu_problems import PATTERNS, PROBLEMS, lists_of, make, mask_of
from sass import disassembled, resources, unset_uniform_registers
from triton_compile import interpret, recorded, uses

from attnspan.kernels import gpu_received, hopper_received, nvrtc
from attnspan.patterns import Full, Pattern, Sinks, SlidingWindow
from attnspan.testing import assert_accurate, make_qkv

pytestmark = pytest.mark.usefixtures("poison_empty")


def weights(
    q: Tensor, k: Tensor, mask: Tensor, scale: float, softcap: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax `(batch, Hkv, G, n, m)`, its lse, and how large the terms of scores are."""
    q, k = q.to(dtype).unflatten(1, (k.shape[1], -1)), k.to(dtype)
    scores = torch.einsum("bhgnd,bhmd->bhgnm", q, k) * scale
    sizes = torch.einsum("bhgnd,bhmd->bhgnm", q.abs(), k.abs()) * abs(scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]).masked_fill(~mask, 0), lse, sizes


def check(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    offset: int,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """A float32 kernel: its error is held against the definition in float32, whatever q's dtype."""
    n, m = q.shape[2], k.shape[2]
    tiles = lists_of(pattern, n, m, offset, q.device.type)
    mask = mask_of(pattern, n, m, offset, q.device.type)
    exact, lse, sizes = weights(q, k, mask, scale, softcap, torch.float64)
    low, _, _ = weights(q, k, mask, scale, softcap, torch.float32)
    got = gpu_received.received(q, k, lse.flatten(1, 2).float(), tiles, scale, softcap)
    # A weight carries the rounding of its score and of the lse that it takes.
    level = lse.abs().masked_fill(lse == -torch.inf, 0)[..., None]
    magnitude = (exact * (1 + sizes + level)).sum((2, 3)).max().item()
    assert_accurate(got, low.sum((2, 3)), exact.sum((2, 3)), magnitude, torch.float32, "received")
    return got


@pytest.fixture(params=["best", "portable"])
def kernel(request, monkeypatch) -> None:
    """Whichever kernel is best for the GPU, and the one for all GPUs."""
    if request.param == "portable":
        monkeypatch.setattr(hopper_received, "lacks", lambda *_: "it isn't asked")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_tiles_of_every_kind(pattern, dtype, head_dim, kernel) -> None:
    q, k, _ = make_qkv(
        400, 515, batch=2, heads=(8, 2), head_dim=head_dim, dtype=dtype, device="cuda"
    )
    check(pattern, q, k, 115, head_dim**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_edges_of_every_kind(problem, kernel) -> None:
    pattern, n, m, offset = problem
    q, k, _ = make_qkv(n, m, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, device="cuda")
    check(pattern, q, k, offset, 0.125)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (6, 2), (8, 1), (16, 1)])
def test_groups_of_every_size(heads, kernel) -> None:
    q, k, _ = make_qkv(333, 333, heads=heads, head_dim=128, dtype=torch.bfloat16, device="cuda")
    check(SlidingWindow(100), q, k, 0, 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 24, 80, 256])
@pytest.mark.parametrize(("scale", "softcap"), [(0.1, None), (0.2, 5.0), (-0.1, None)])
def test_heads_and_scores_of_every_kind(head_dim, scale, softcap) -> None:
    q, k, _ = make_qkv(
        200, 200, heads=(4, 2), head_dim=head_dim, dtype=torch.float16, device="cuda"
    )
    check(SlidingWindow(90), q, k, 0, scale, softcap)


@pytest.mark.gpu
def test_queries_that_see_nothing_give_nothing() -> None:
    q, k, _ = make_qkv(150, 100, heads=(2, 1), head_dim=64, dtype=torch.bfloat16, device="cuda")
    got = check(SlidingWindow(30), q, k, -60, 0.125)
    assert not got[..., 90:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [SlidingWindow(1000), SlidingWindow(2048), Full()], ids=str)
@pytest.mark.parametrize("batch", [1, 20])
def test_blocks_of_keys_whole_and_in_parts(pattern, batch) -> None:
    """Many blocks of keys are each one thread block's, few are several's."""
    q, k, _ = make_qkv(
        1999, 1999, batch=batch, heads=(2, 1), head_dim=128, dtype=torch.bfloat16, device="cuda"
    )
    check(pattern, q, k, 0, 0.1)


@pytest.mark.gpu
def test_a_graph_replays_it() -> None:
    q, k, _ = make_qkv(900, 900, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, device="cuda")
    lse = torch.full((1, 8, 900), 6.0, device="cuda")
    tiles = lists_of(SlidingWindow(300), 900, 900, 0)
    expected = gpu_received.received(q, k, lse, tiles, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gpu_received.received(q, k, lse, tiles, 0.1)
    for _ in range(2):
        got.zero_()
        graph.replay()
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("step", [1, 2])
def test_strided_views_are_read_where_they_lie(step) -> None:
    q, k, _ = (
        x.transpose(1, 2).contiguous().transpose(1, 2)[:, :, ::step]
        for x in make_qkv(400, 400, heads=(4, 2), head_dim=64, dtype=torch.float16, device="cuda")
    )
    check(SlidingWindow(90), q, k, 0, 0.125)


@pytest.mark.gpu
def test_it_repeats_to_the_bit() -> None:
    q, k, _ = make_qkv(2000, 2000, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, device="cuda")
    runs = [check(SlidingWindow(700), q, k, 0, 0.1) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_no_keys_and_no_queries() -> None:
    q, k, _ = make_qkv(0, 3)
    got = gpu_received.received(q, k, q.new_zeros(1, 2, 0), lists_of(Full(), 0, 3, 0, "cpu"), 1.0)
    assert got.tolist() == [[[0, 0, 0]]]


def test_what_it_lacks_is_said() -> None:
    q, k, _ = make_qkv(3, 3)
    assert gpu_received.lacks(q, k) == "it has no kernel for cpu tensors"
    assert "not on cpu" in (hopper_received.lacks(q, k) or "")


def test_it_is_the_definition_by_the_interpreter() -> None:
    interpret("""
import torch
from attnspan.patterns import SlidingWindow, Sinks
from attnspan.testing import make_qkv, poisoned_memory
from kernels.test_gpu_received import check

with poisoned_memory():
    for width, dtype, offset, scale, softcap in (
        (24, torch.float32, 20, 0.3, None),
        (16, torch.float16, -20, -0.3, 5.0),
    ):
        q, k, _ = make_qkv(45, 65, heads=(2, 1), head_dim=width, dtype=dtype)
        check(SlidingWindow(20) | Sinks(3), q, k, offset, scale, softcap)
""")


def test_it_compiles_without_a_gpu(tmp_path) -> None:
    from attnspan.kernels import triton_code

    q, k, _ = make(300, 300, device="cpu")
    tiles = lists_of(SlidingWindow(70) | Sinks(3), 300, 300, 0, "cpu")
    with recorded(triton_code, "received") as launches:
        gpu_received.received(q, k, q.new_zeros(1, 8, 300, dtype=torch.float32), tiles, 0.1)
    (launch,) = launches
    assert uses(launch, tmp_path)[1] == 0, "it spills"


@pytest.mark.parametrize(
    ("head_dim", "dtype", "ranges", "spilled"),
    [(128, torch.bfloat16, 1, 96), (128, torch.float16, 4, 192), (64, torch.float16, 2, 16)],
)
def test_it_compiles_for_hopper(head_dim, dtype, ranges, spilled, tmp_path) -> None:
    if nvrtc.lack():
        pytest.skip(f"not compiled: {nvrtc.lack()}")
    options = hopper_received.options(head_dim, dtype, ranges)
    code, told = nvrtc.compile_source(hopper_received.SOURCE, options)
    # What is spilled is used in tiles of which only some is seen, but for a word or two.
    assert max(stack for _, stack in resources(code, tmp_path).values()) <= spilled
    # ptxas tells so when it can't keep products in flight, which costs half the speed.
    assert "serialized" not in told
    assert not unset_uniform_registers(disassembled(code, tmp_path))
