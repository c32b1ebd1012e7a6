"""Decoding on a GPU, against the definition in float64; its kernels compile without one too."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gpu_problems import make
from torch import Tensor

from attnspan.cache.storage import Dense, Int4, Int8
from attnspan.kernels import gpu_decode
from attnspan.kernels.view import Angles, KVView, Part, RawPart, Stored
from attnspan.positions import Rope
from attnspan.testing import assert_accurate, make_qkv, poisoned_memory

HEADS = (8, 2)


def softmax(
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]],
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, list[Tensor], tuple[float, float, float]]:
    """out, lse and what keys received, computed in `dtype`, and how large the summed terms are."""
    logits, values, sizes = [], [], [0.0]
    for query, key, value, mask in parts:
        groups = query.shape[1] // key.shape[1]
        q = query.to(dtype)
        k, v = (x.to(dtype).repeat_interleave(groups, 1) for x in (key, value))
        x = q @ k.mT * scale
        if x.numel():
            sizes.append((q.double().abs() @ k.double().abs().mT * abs(scale)).max().item())
        if softcap is not None:
            x = softcap * torch.tanh(x / softcap)
        logits.append(x if mask is None else x + mask.to(dtype))
        values.append(v)
    whole = torch.cat(logits, -1)
    lse = whole.double().logsumexp(-1)
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits.double()[:, None].expand_as(lse))
    weights = torch.exp(whole.double() - lse.clamp_min(-1e300)[..., None])
    out = weights.to(dtype) @ torch.cat(values, 2)
    kv_heads = parts[0][1].shape[1]
    got = weights.unflatten(1, (kv_heads, -1)).sum((2, 3))
    lengths = [x.shape[-1] for x in logits]
    size = max(sizes)
    terms = (weights @ torch.cat(values, 2).double().abs()).max().item() * (1 + size)
    most = got.max().item() * (1 + size) if got.numel() else 0.0
    return out, lse, list(got.split(lengths, 2)), (terms, size + 1, most)


def check(view: KVView, exact, low, scale: float, dtype: torch.dtype, counters=None, **options):
    """`exact` and `low` are the view's parts as tensors, in float64 and in `dtype`."""
    got = gpu_decode.decode(view, scale, **options, return_received=True)
    again = gpu_decode.decode(view, scale, **options, counters=counters)
    repeated = gpu_decode.decode(view, scale, **options, counters=counters)
    assert torch.equal(repeated[0], again[0])
    assert torch.equal(repeated[1], again[1])
    cap, sink = options.get("softcap"), options.get("sink_logits")
    *best, sizes = softmax(exact, scale, cap, sink, torch.float64)
    *rough, _ = softmax(low, scale, cap, sink, dtype)
    for result in (got, again):
        for name, a, b, c, size in zip(("out", "lse"), result, rough, best, sizes, strict=False):
            assert_accurate(a, b, c, size, dtype, name)
    for a, b, c in zip(got[2], rough[2], best[2], strict=True):
        assert_accurate(a, b, c, sizes[2], dtype, "received")
    if counters is not None:
        assert not counters.any()


def raw_part(
    storage, n: int, m: int, turned: str, dtype: torch.dtype, head_dim: int, heads, masked: bool,
    batch: int = 2, seed: int = 0,
):  # fmt: skip
    """A stored part, and the same as tensors: in float64, and rounded to `dtype`."""
    q, k, v = make_qkv(
        m, n, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype, device="cuda", seed=seed
    )
    mean = k.float().mean(2, keepdim=True).half().float() if storage.kind == "int4" else None
    fields = storage.encode(k, v, mean)
    wide = None if mean is None else mean.double()
    key, value = storage.decode(
        {name: x.double() if x.is_floating_point() else x for name, x in fields.items()},
        wide, torch.float64,
    )  # fmt: skip
    angles = None
    if turned != "no":
        width = head_dim if turned == "halves" else head_dim // 2
        rope = Rope(width, 1e4, interleaved=turned == "pairs")
        places = torch.randperm(n, generator=torch.Generator().manual_seed(0)).cuda()
        key = rope.turn(key, *rope.spread(places, dtype=torch.float64))
        angles = Angles(*rope.cos_sin(places), rope.interleaved)
    mask = None
    if masked:
        mask = torch.zeros(m, n, device="cuda").masked_fill(
            torch.arange(n, device="cuda") % 5 == 2, -torch.inf
        )
    group = storage.group if storage.kind == "int4" else 0
    part = RawPart(q, Stored(storage.kind, fields, mean, group, angles), mask)
    return part, (q, key, value, mask), (q, key.to(dtype), value.to(dtype), mask)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", [Dense(), Int8(), Int4()], ids=str)
@pytest.mark.parametrize("turned", ["no", "halves"])
@pytest.mark.parametrize(
    ("n", "m", "heads", "head_dim"),
    [
        (5, 1, (8, 2), 128),
        (1100, 1, (32, 8), 128),
        (777, 2, (12, 4), 128),
        (1500, 1, (32, 1), 128),
        (333, 3, (16, 2), 64),
        (2001, 16, (8, 2), 128),
    ],
)
def test_storages_are_read_as_they_are(storage, turned, n, m, heads, head_dim, dtype) -> None:
    part, exact, low = raw_part(storage, n, m, turned, dtype, head_dim, heads, masked=n > 5)
    counters = torch.zeros(64, dtype=torch.int32, device="cuda")
    check(KVView((part,)), [exact], [low], head_dim**-0.5, dtype, counters)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("storage", [Dense(), Int8(), Int4()], ids=str)
@pytest.mark.parametrize("turned", ["pairs", "half"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_are_turned_in_pairs_and_in_part(storage, turned, head_dim) -> None:
    part, exact, low = raw_part(storage, 333, 2, turned, torch.bfloat16, head_dim, HEADS, False)
    check(KVView((part,)), [exact], [low], head_dim**-0.5, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("storage", [Dense(), Int8(), Int4()], ids=str)
def test_one_softmax_over_all_parts(storage) -> None:
    part, exact, low = raw_part(storage, 700, 2, "no", torch.bfloat16, 128, (8, 4), True)
    q, k, v = make_qkv(
        2, 4, batch=2, heads=(8, 4), head_dim=128, dtype=torch.bfloat16, device="cuda", seed=3
    )
    front = (q, k, v, None)
    options = {"softcap": 3.0, "sink_logits": torch.linspace(-1, 1, 8, device="cuda")}
    counters = torch.zeros(8, dtype=torch.int32, device="cuda")
    view = KVView((Part(q, k, v), part))
    check(view, [front, exact], [front, low], 0.3, torch.bfloat16, counters, **options)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison_empty")
def test_strided_and_unaligned_caches_are_read_where_they_lie() -> None:
    q, k, v = make_qkv(
        1, 300, batch=2, heads=HEADS, head_dim=128, dtype=torch.bfloat16, device="cuda"
    )
    exact = [(q, k, v, None)]
    wide = [torch.full((2, 300, 2, 136), torch.nan, device="cuda", dtype=q.dtype) for _ in "kv"]
    for offset in (0, 8, 1):
        views = [x[..., offset : offset + 128].transpose(1, 2) for x in wide]
        for to, x in zip(views, (k, v), strict=True):
            to.copy_(x)
        check(KVView((Part(q, *views),)), exact, exact, 0.1, torch.bfloat16)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    check(KVView((Part(q, *views),)), exact, exact, 0.1, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison_empty")
def test_a_query_that_sees_nothing_gives_zeros() -> None:
    q, k, v = make_qkv(2, 90, heads=HEADS, head_dim=64, dtype=torch.bfloat16, device="cuda")
    mask = torch.zeros(2, 90, device="cuda")
    mask[1] = -torch.inf
    out, lse, scores = gpu_decode.decode(KVView((Part(q, k, v, mask),)), 0.1, return_received=True)
    assert scores is not None
    assert not out[:, :, 1].any()
    assert (lse[:, :, 1] == -torch.inf).all()
    torch.testing.assert_close(scores[0].sum(-1), torch.full((1, 2), 4.0, device="cuda"))


@pytest.mark.gpu
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("storage", [Dense(), Int8()], ids=str)
def test_rows_of_different_lengths_in_one_captured_graph(storage) -> None:
    slots, dtype = 900, torch.bfloat16
    q, k, v = make_qkv(1, slots, batch=4, heads=HEADS, head_dim=128, dtype=dtype, device="cuda")
    fields = storage.encode(k, v, None)
    key, value = storage.decode({n: x.double() if x.is_floating_point() else x
                                 for n, x in fields.items()}, None, torch.float64)  # fmt: skip
    scales = {n: x for n, x in fields.items() if n.endswith("scale")}
    lengths = torch.tensor([900, 1, 0, 411], dtype=torch.int32, device="cuda")
    starts = torch.zeros(4, dtype=torch.int32, device="cuda")
    counters = torch.zeros(8, dtype=torch.int32, device="cuda")

    def run(scored: bool):
        return gpu_decode.decode_rows(
            q, fields["key"], fields["value"], lengths, starts, scale=0.1, **scales,
            return_received=scored, counters=counters,
        )  # fmt: skip

    run(True), run(False)
    with no_waiting():
        run(True), run(False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(True), run(False)
    for ends in ((0, 900), (7, 880), (500, 77)):
        first = torch.tensor([0, 3, ends[0], ends[0]], dtype=torch.int32, device="cuda")
        starts.copy_(first)
        lengths.copy_(torch.tensor([ends[1] - ends[0] if ends[1] > ends[0] else 5, 1, 0, ends[1]])
                      .clamp_max(slots - first.cpu()))  # fmt: skip
        graph.replay()
        for got, want in zip(results, (run(True), run(False)), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True) if x is not None)
        for b, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            row, seen = slice(b, b + 1), slice(start, start + length)
            exact = [(q[row], key[row, :, seen], value[row, :, seen], None)]
            *best, sizes = softmax(exact, 0.1, None, None, torch.float64)
            low = [(q[row], exact[0][1].to(dtype), exact[0][2].to(dtype), None)]
            *rough, _ = softmax(low, 0.1, None, None, dtype)
            for out, lse, scores in results:
                assert_accurate(out[row], rough[0], best[0], sizes[0], dtype, "out")
                assert_accurate(lse[row], rough[1], best[1], sizes[1], dtype, "lse")
                if scores is not None:
                    assert_accurate(
                        scores[row, :, seen], rough[2][0], best[2][0], sizes[2], dtype, "received"
                    )
                    assert not scores[row, :, :start].any()
                    assert not scores[row, :, start + length :].any()


@contextmanager
def no_waiting():
    """Inside, whatever would wait for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls that mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("storage", [Dense(), Int8(), Int4()], ids=str)
@pytest.mark.parametrize("turned", ["no", "halves"])
@pytest.mark.parametrize("n", [70, 3000])
def test_a_captured_graph_gives_the_bits_of_a_call(storage, turned, n) -> None:
    def held(seed: int):
        part, exact, low = raw_part(
            storage, n, 1, turned, torch.bfloat16, 128, (32, 8), False, batch=1, seed=seed
        )
        tensors = [part.query, *part.stored.fields.values()]
        return (
            part,
            exact,
            low,
            tensors if part.stored.mean is None else [*tensors, part.stored.mean],
        )

    counters = torch.zeros(8, dtype=torch.int32, device="cuda")
    part, _, _, tensors = held(0)
    view = KVView((part,))

    def run():
        return (
            gpu_decode.decode(view, 0.1, return_received=True),
            gpu_decode.decode(view, 0.1, counters=counters),
        )

    run()
    with no_waiting():
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        _, exact, low, others = held(seed)
        for to, x in zip(tensors, others, strict=True):
            to.copy_(x)
        graph.replay()
        for got, want in zip(captured, run(), strict=True):
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
            if got[2] is not None:
                assert torch.equal(got[2][0], want[2][0])
        *best, sizes = softmax([exact], 0.1, None, None, torch.float64)
        *rough, _ = softmax([low], 0.1, None, None, torch.bfloat16)
        assert_accurate(captured[1][0], rough[0], best[0], sizes[0], torch.bfloat16, "out")
    assert not counters.any()


@pytest.mark.gpu
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_scales_may_lie_far_apart(dtype) -> None:
    q, k, v = make_qkv(1, 1500, batch=2, heads=HEADS, head_dim=128, dtype=dtype, device="cuda")
    spread = torch.logspace(-5, 3, 1500, device="cuda")
    spread = spread[torch.randperm(1500, generator=torch.Generator().manual_seed(0)).cuda()]
    v = (v.float() * spread[:, None]).to(dtype)
    q = (q.float() * torch.logspace(-6, 1.5, 8, device="cuda")[:, None, None]).to(dtype)
    fields = Int8().encode(k, v, None)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in fields.items()}
    exact = (q, *Int8().decode(wide, None, torch.float64), None)
    low = (q, exact[1].to(dtype), exact[2].to(dtype), None)
    view = KVView((RawPart(q, Stored("int8", fields)),))
    check(view, [exact], [low], 0.1, dtype)


@pytest.mark.gpu
def test_what_lies_past_a_row_is_not_read() -> None:
    q, k, v = make_qkv(1, 256, heads=HEADS, head_dim=128, dtype=torch.bfloat16, device="cuda")
    k[:, :, 100:], v[:, :, 100:] = torch.nan, torch.nan
    lengths = torch.tensor([100], dtype=torch.int32, device="cuda")
    with poisoned_memory():
        out, _, _ = gpu_decode.decode_rows(q, k, v, lengths, scale=0.1)
    assert out.isfinite().all()
    out, _, _ = gpu_decode.decode_rows(q, k, v, lengths + 1, scale=0.1)
    assert out.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("storage", [Dense(), Int8(), Int4()], ids=str)
def test_one_wrong_key_is_seen(storage) -> None:
    # Of few keys, and seen about alike: the band of rounding grows with the largest score and
    # weight, and among many keys would hide one of little weight.
    part, exact, low = raw_part(storage, 20, 1, "no", torch.bfloat16, 128, HEADS, False)
    view = KVView((part,))
    check(view, [exact], [low], 0.02, torch.bfloat16)

    def with_neighbour(given, key: int):
        q, k, v, mask = given
        k, v = k.clone(), v.clone()
        k[:, :, key], v[:, :, key] = k[:, :, key - 1], v[:, :, key - 1]
        return q, k, v, mask

    for key in range(20):
        with pytest.raises(AssertionError, match="out: error"):
            check(
                view, [with_neighbour(exact, key)], [with_neighbour(low, key)], 0.02, torch.bfloat16
            )


def test_it_says_what_it_lacks() -> None:
    x = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16)
    assert gpu_decode.lacks(x, x, x) == "it runs on NVIDIA's Hopper GPUs, not on cpu"


@pytest.mark.parametrize(
    ("pairs", "keys", "runs"),
    [(8, 65536, 16), (8, 4096, 16), (1, 10, 1), (128, 32768, 1), (8, 64, 1)],
)
def test_runs_fill_the_processors_and_no_wave_is_left_half_empty(pairs, keys, runs) -> None:
    assert gpu_decode._runs(pairs, keys, 132) == runs


@pytest.mark.parametrize(
    ("heads", "rows", "width", "change", "together"),
    [
        (8, 4, 128, "none", 4),
        (8, 4, 128, "no angles", 4),
        (2, 4, 128, "none", 1),
        (8, 9, 128, "none", 1),
        (8, 4, 64, "none", 1),
        (8, 4, 128, "group", 1),
        (8, 4, 128, "pairs", 1),
        (8, 4, 128, "unaligned", 1),
    ],
)
def test_int4_heads_share_a_thread_block_where_they_can(
    heads, rows, width, change, together
) -> None:
    group = 16 if change == "group" else 32
    q, k, v = make_qkv(1, 40, heads=(heads * rows, heads), head_dim=width, dtype=torch.bfloat16)
    mean = k.float().mean(2, keepdim=True)
    fields = Int4(group).encode(k, v, mean)
    if change == "unaligned":
        fields["key"] = torch.zeros(fields["key"].numel() + 1, dtype=torch.uint8)[1:].view_as(
            fields["key"]
        )
    cos, sin = Rope(width, 1e4).cos_sin(torch.arange(40))
    angles = None if change == "no angles" else Angles(cos, sin, change == "pairs")
    piece = gpu_decode._piece(RawPart(q, Stored("int4", fields, mean, group, angles)))
    assert piece.together(rows) == together


def launches(storage, m: int, heads, head_dim: int, turned: bool, options: str) -> dict[str, Any]:
    """What decode starts over a cache, by the kernel's name; `options` are some of the words below.

    counters: one launch does. masked: a mask, a soft cap and sink logits. rows: of different
    lengths. received: scores are kept.
    """
    from triton_compile import recorded

    from attnspan.kernels import gpu_decode_int4, gpu_decode_stored, gpu_decode_turned

    q, k, v = make(m, 2000, heads, head_dim, batch=2, device="cpu")
    fields = storage.encode(k, v, k.float().mean(2, keepdim=True))
    given: dict[str, Any] = {"return_received": "received" in options}
    if "counters" in options:
        given["counters"] = torch.zeros(2 * heads[1], dtype=torch.int32)
    mask = None
    if "masked" in options:
        mask = torch.zeros(m, 2000)
        given |= {"softcap": 5.0, "sink_logits": torch.zeros(heads[0])}
    with (
        recorded(gpu_decode_stored, "attend_dense", "attend_int8") as plain,
        recorded(gpu_decode_int4, "attend_int4") as words,
        recorded(gpu_decode_turned, "attend_turned", "finish") as others,
    ):
        if "rows" in options:
            lengths = torch.zeros(2, dtype=torch.int32)
            scales = {name: x for name, x in fields.items() if name.endswith("scale")}
            gpu_decode.decode_rows(
                q, fields["key"], fields["value"], lengths, lengths, scale=0.1, **scales, **given
            )
        else:
            angles = None
            if turned:
                rope = Rope(head_dim, 1e4)
                angles = Angles(*rope.cos_sin(torch.arange(2000)), rope.interleaved)
            group = storage.group if storage.kind == "int4" else 0
            mean = k.float().mean(2, keepdim=True) if storage.kind == "int4" else None
            part = RawPart(q, Stored(storage.kind, fields, mean, group, angles), mask)
            gpu_decode.decode(KVView((part,)), 0.1, **given)
    return {launch[0].__name__: launch for launch in (*plain, *words, *others)}


@pytest.mark.parametrize(
    ("m", "heads", "head_dim", "options"),
    [
        (1, (8, 2), 128, "counters"),
        (4, (32, 2), 128, "masked, received"),
        (1, (8, 2), 64, "rows, counters"),
        (1, (32, 1), 128, "received"),
    ],
)
@pytest.mark.parametrize(("storage", "name"), [(Dense(), "attend_dense"), (Int8(), "attend_int8")])
def test_kernels_for_plain_keys_compile_without_spilling(
    storage, name, m, heads, head_dim, options, tmp_path
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from triton_compile import uses

    found = launches(storage, m, heads, head_dim, False, options)
    assert ("finish" in found) == ("counters" not in options)
    registers, stack = uses(found[name], tmp_path)
    assert stack == 0, (registers, stack)


@pytest.mark.parametrize(
    ("storage", "turned"), [(Dense(), True), (Int8(), True), (Int4(), False), (Int4(), True)]
)
def test_kernels_for_turned_keys_compile_without_spilling(storage, turned, tmp_path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from triton_compile import uses

    found = launches(storage, 1, (8, 2), 128, turned, "")
    registers, stack = uses(found["attend_turned"], tmp_path)
    assert stack == 0, (registers, stack)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("options", ["", "masked, received"])
def test_kernels_for_words_of_int4_compile_without_spilling(turned, options, tmp_path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from triton_compile import uses

    found = launches(Int4(), 1, (32, 8), 128, turned, options)
    registers, stack = uses(found["attend_int4"], tmp_path)
    assert stack == 0, (registers, stack)


def test_the_last_pass_compiles_without_spilling(tmp_path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from triton_compile import uses

    found = launches(Dense(), 1, (8, 2), 128, False, "rows, received")
    assert uses(found["finish"], tmp_path)[1] == 0
