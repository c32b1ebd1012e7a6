"""The Hopper kernel against the definition in float64, and that it compiles where there is none."""

import ctypes
import re
import threading

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: no GPU kernel can be compiled")

from gpu_problems import BF16, FP16, PROBLEMS, lists_of, make, mask_of
from sass import disassembled, resources, unset_uniform_registers

from attnspan.kernels import driver, hopper
from attnspan.kernels.gpu_lists import Lists
from attnspan.kernels.reference import reference
from attnspan.patterns import Full, Pattern, Sinks, SlidingWindow, Strided, plan
from attnspan.testing import assert_accurate, magnitudes, make_qkv, poisoned_memory


def check(q, k, v, pattern: Pattern, offset: int, scale: float | None = None) -> None:
    """Forward twice, equal to the bit, and as near to float64 as the dtype allows."""
    n, m = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    lists = lists_of(pattern, n, m, offset)
    with poisoned_memory():
        out, lse = hopper.forward(q, k, v, lists, scale)
        again = hopper.forward(q, k, v, lists, scale)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
    mask = mask_of(pattern, n, m, offset)
    exact, exact_lse = reference(q, k, v, mask, scale=scale, cast=False)
    low, low_lse = reference(q, k, v, mask, scale=scale, compute=q.dtype)
    sizes = magnitudes(q, k, v, mask, scale=scale)
    assert_accurate(out, low, exact, sizes[0], q.dtype, "out")
    assert_accurate(lse, low_lse, exact_lse, sizes[1], q.dtype, "lse")


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "n", "m", "offset"), PROBLEMS, ids=str)
def test_patterns(pattern, n, m, offset) -> None:
    check(*make(n, m), pattern, offset)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (8, 2), (8, 1)], ids=str)
def test_heads_and_dtypes(heads, head_dim, dtype) -> None:
    q, k, v = make(601, 601, heads, head_dim, dtype, batch=2)
    check(q, k, v, SlidingWindow(300) | Sinks(3), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_beyond_the_guess_are_redone(head_dim, dtype) -> None:
    q, k, v = make(700, 700, head_dim=head_dim, dtype=dtype, batch=2)
    k[:, :, ::37] *= 24
    check(q, k, v, SlidingWindow(500), 0)
    k[:, :, :2] *= 8
    check(q, k, v, SlidingWindow(200) | Sinks(4), 0)


@pytest.mark.gpu
def test_two_of_many_heads_run_side_by_side() -> None:
    """Most tiles of a short window are alike: the six heads of the batch go in pairs."""
    pattern = SlidingWindow(60)
    walk = lists_of(pattern, 517, 517, 0).walk(32, 128, 32)
    assert hopper._side(walk, 6) == 2
    check(*make(517, 517, batch=3), pattern, 0)


@pytest.mark.gpu
def test_strides_are_free() -> None:
    q, k, v = make(300, 500, batch=2)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    wide = torch.randn(2, 2, 1000, 136, dtype=BF16, device="cuda")
    wide[:, :, ::2, :128] = v
    check(q, k, wide[:, :, ::2, :128], SlidingWindow(150), 200)
    # One that no TMA descriptor can have.
    odd = torch.randn(2, 2, 500, 131, dtype=BF16, device="cuda")
    odd[..., 1:129] = v
    check(q, k, odd[..., 1:129], SlidingWindow(150), 200)
    check(q, k[:1].expand(2, -1, -1, -1), v, SlidingWindow(150), 200)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [-0.1, 0.0, 1.0])
def test_scales(scale) -> None:
    check(*make(300, 300), SlidingWindow(150), 0, scale)


@pytest.mark.gpu
def test_residue_classes_are_a_batch() -> None:
    """A pass of a strided pattern: every step-th row and key, seen through strides."""
    q, k, v = make(640, 640)
    _, strided = plan(Strided(16, 8), 640)
    for job in strided.jobs:
        shape = (job.count, -1, job.tiles.n, 128)
        views = [
            x.as_strided(
                (job.count, x.shape[1], size, 128),
                (128, x.stride(1), strided.step * 128, 1),
                first * 128,
            )
            for x, size, first in (
                (q, job.tiles.n, job.first_query),
                (k, job.tiles.m, job.first_key),
                (v, job.tiles.m, job.first_key),
            )
        ]
        assert views[0].shape == (shape[0], 8, shape[2], 128)
        out, lse = hopper.forward(*views, Lists(job.tiles, "cuda"), 0.1)
        i = torch.arange(job.tiles.n, device="cuda")[:, None] + job.tiles.offset
        mask = job.tiles.rule.sees(i, torch.arange(job.tiles.m, device="cuda"))
        exact, exact_lse = reference(*views, mask, scale=0.1, cast=False)
        low, low_lse = reference(*views, mask, scale=0.1, compute=BF16)
        sizes = magnitudes(*views, mask, scale=0.1)
        assert_accurate(out, low, exact, sizes[0], BF16, "out")
        assert_accurate(lse, low_lse, exact_lse, sizes[1], BF16, "lse")


@pytest.mark.gpu
def test_empty_tensors() -> None:
    q, k, v = make(5, 0)
    out, lse = hopper.forward(q, k, v, lists_of(Full(), 5, 0, 0), 1.0)
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.gpu
def test_streams_and_graphs() -> None:
    q, k, v = make(700, 700, batch=2)
    spiked = k.clone()
    spiked[:, :, ::37] *= 24
    lists = lists_of(SlidingWindow(500), 700, 700, 0)
    wanted = [hopper.forward(q, x, v, lists, 0.1) for x in (k, spiked)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = []
    for _ in range(10):
        for stream, x in zip(streams, (k, spiked), strict=True):
            with torch.cuda.stream(stream):
                got.append(hopper.forward(q, x, v, lists, 0.1))
    torch.cuda.synchronize()
    for at, (out, lse) in enumerate(got):
        assert torch.equal(out, wanted[at % 2][0])
        assert torch.equal(lse, wanted[at % 2][1])
    fed = k.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = hopper.forward(q, fed, v, lists, 0.1)
    for x, (wanted_out, wanted_lse) in zip((k, spiked, k), (*wanted, wanted[0]), strict=True):
        fed.copy_(x)
        graph.replay()
        assert torch.equal(out, wanted_out)
        assert torch.equal(lse, wanted_lse)


@pytest.mark.gpu
def test_a_thread_of_its_own() -> None:
    """One in which CUDA has no context yet; memory that torch holds already gives it none."""
    q, k, v = make(300, 300)
    lists = lists_of(SlidingWindow(90), 300, 300, 0)
    wanted = hopper.forward(q, k, v, lists, 0.1)[0]
    hopper.forward(q, k, v, lists, 0.1)
    got = []
    for x in (k, k[:, :, :299]):  # the latter in no shape that is known
        lists = lists_of(SlidingWindow(90), 300, x.shape[2], 0)
        v = v[:, :, : x.shape[2]]
        given = q, x, v, lists, 0.1
        thread = threading.Thread(target=lambda x=given: got.append(hopper.forward(*x)[0]))
        thread.start()
        thread.join()
    assert torch.equal(got[0], wanted)
    assert torch.equal(got[1], hopper.forward(*given)[0])


def test_what_it_lacks_is_said() -> None:
    assert hopper.lacks(*make_qkv(4, 4)) == "it runs on NVIDIA's Hopper GPUs, not on cpu"


# Some bytes a thread are spilled: at 128, 8 to 12 accesses among a loop's thousand instructions. A
# change that spills more shows here.
@pytest.mark.parametrize(("head_dim", "guess", "spilled"), [(128, True, 192), (64, False, 16)])
def test_it_compiles_without_a_gpu(head_dim, guess, spilled, tmp_path, monkeypatch) -> None:
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = hopper.compiled_for(GPUTarget("cuda", 90, 32), BF16, head_dim, 4, 8, 2, guess)
    assert kernel.metadata.shared <= 232448, "more than a Hopper multiprocessor has"
    assert ".target sm_90a" in kernel.asm["ptx"]
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    cubin = kernel.asm["cubin"]
    assert unset_uniform_registers(disassembled(cubin, tmp_path)) == []
    ((_, stack),) = resources(cubin, tmp_path).values()
    assert stack <= spilled
    # What `forward` fills in is what the code reads.
    sizes = [ctypes.sizeof(x) for name, x in hopper._Arguments._fields_ if name[0] != "_"]
    parameters = r"\.param (?:\.align \d+ )?\.[a-z](\d+) .*?_param_\d+(?:\[(\d+)\])?,?$"
    found = re.findall(parameters, kernel.asm["ptx"], re.MULTILINE)
    assert sizes == [int(bits) // 8 * int(count or 1) for bits, count in found]
    assert [offset % 64 for offset in hopper._MAPS] == [0] * 6
    metas = kernel.metadata.tensordesc_meta
    assert all(meta["swizzle"] == driver._SWIZZLE_128B for meta in metas)
    chunk = hopper._chunk(4)
    assert [meta["block_size"] for meta in metas] == [
        *([1, 16, 4, 64], [1, 1, 128, 64], [1, 1, 128, 64]),
        *([1, 1, chunk, 64], [1, 1, chunk, 64], [1, 16, 4, 64]),
    ]
    assert (kernel.metadata.num_ctas, kernel.metadata.launch_cooperative_grid) == (1, False)


def test_a_register_set_on_one_path_alone_is_found() -> None:
    code = [
        (0x00, "@P0 BRA 0x20"),
        (0x10, "UIADD3 UR4, UR4, 0x1, URZ"),
        (0x20, "UIADD3.64 UR6, UR8, URZ, URZ"),
        (0x30, "HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR4].tnspB, R88"),
        (0x40, "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR4], R88"),
        (0x50, "EXIT"),
    ]
    assert [x.partition(":")[0] for x in unset_uniform_registers(code)] == ["10", "20", "40"]
