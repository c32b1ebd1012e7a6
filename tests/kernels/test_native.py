"""What only the C++ kernels have: their build, decoding from storages, widths, poisoned memory.

That they are the oracle under every pattern, forward and backward, is held in tests/test_dispatch.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from attnspan import attention
from attnspan.cache.storage import Dense, Int4, Int8
from attnspan.kernels import native
from attnspan.kernels.joint import joint
from attnspan.kernels.reference import reference
from attnspan.kernels.view import Angles, KVView, Part, RawPart, Stored
from attnspan.patterns import (
    Documents,
    Longformer,
    Pattern,
    Sinks,
    SlidingWindow,
    Strided,
    plan,
)
from attnspan.positions import Rope
from attnspan.testing import assert_accurate, magnitudes, make_qkv

if native.build().lack is not None:
    pytest.skip(f"the C++ kernels: {native.build().lack}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison_empty")

PATTERNS = [
    SlidingWindow(70) | Sinks(3),
    Strided(20, 7),
    Longformer(40, (5, 130), right=9),
    Documents((60, 101, 139)),
    ~SlidingWindow(50),
]


def check(pattern: Pattern, q, k, v, dtype: torch.dtype) -> None:
    scale = q.shape[3] ** -0.5
    got = native.forward(q, k, v, plan(pattern, q.shape[2], k.shape[2], tile=64), scale)
    mask = pattern.sees(
        torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2], torch.arange(k.shape[2])
    )
    exact = reference(q, k, v, mask, cast=False)
    low = reference(q, k, v, mask, cast=False, compute=dtype)
    sizes = magnitudes(q, k, v, mask)
    for name, a, b, c, size in zip(("out", "lse"), got, low, exact, sizes, strict=False):
        assert_accurate(a, b, c, size, dtype, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_tiles_of_every_kind(pattern, dtype) -> None:
    check(pattern, *make_qkv(300, 300, batch=2, heads=(6, 2), dtype=dtype), dtype)


@pytest.mark.parametrize(("width", "value_width"), [(1, 1), (24, 33), (80, 64), (256, 200)])
def test_heads_of_any_width(width, value_width) -> None:
    q, k, _ = make_qkv(130, 200, heads=(4, 2), head_dim=width)
    _, _, v = make_qkv(130, 200, heads=(4, 2), head_dim=value_width)
    check(SlidingWindow(90), q, k, v, torch.float32)


def test_strided_views_are_read_where_they_lie() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_qkv(200, 200))
    check(SlidingWindow(90), q, k, v, torch.float32)


def test_threads_of_python_share_what_a_plan_was_made_into() -> None:
    each = plan(Strided(20, 7), 300, tile=native.TILE)[1]
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(lambda _: native._jobs(each), range(16)))
    assert all(entry is entries[0] for entry in entries)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists them")
def test_the_openmp_runtime_is_torchs_own(tmp_path) -> None:
    ours = native._openmp()
    other = tmp_path / "libgomp.so.1"  # of another package, before torch's in any order
    shutil.copy(ours, other)
    ctypes.CDLL(str(other))
    assert native._openmp() == ours


def test_results_do_not_depend_on_the_threads() -> None:
    q, k, v = make_qkv(500, 500, heads=(8, 2), requires_grad=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            out = attention(q, k, v, SlidingWindow(100), impl="native")
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_what_nobody_sees_is_not_read() -> None:
    q, k, v = make_qkv(64, 400, heads=(4, 2), requires_grad=True)
    leaves = q, k, v
    with torch.no_grad():
        for x in (k, v):
            x[:, :, 20:200] = torch.nan  # between the sinks and the first query's window
    out = attention(q, k, v, SlidingWindow(100) | Sinks(20), impl="native")
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(x.isfinite().all() for x in (out, *grads))
    with torch.no_grad():
        k[:, :, 350] = torch.nan  # and what is seen comes through
    assert attention(q, k, v, SlidingWindow(100), impl="native")[0, 0, 63].isnan().all()


STORAGES = [Dense(), Int8(), Int4(group=8)]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("turned", ["no", "halves", "pairs"])
@pytest.mark.parametrize(("n", "m"), [(5, 1), (1100, 1), (200, 3)])
def test_decoding_reads_storages_as_they_are(storage, turned, n, m) -> None:
    q, k, v = make_qkv(m, n, batch=2, heads=(6, 2), head_dim=24)
    mean = k.mean(2, keepdim=True) if storage.kind == "int4" else None
    fields = storage.encode(k, v, mean)
    key, value = storage.decode(fields, mean, torch.float32)
    angles = None
    if turned != "no":
        rope = Rope(16, 1e4, interleaved=turned == "pairs")
        places = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        key = rope.turn(key, *rope.spread(places))
        angles = Angles(*rope.cos_sin(places), rope.interleaved)
    mask = torch.zeros(m, n).masked_fill(torch.arange(n) % 5 == 2, -torch.inf)
    sink_q, sink_k, sink_v = make_qkv(m, 4, batch=2, heads=(6, 2), head_dim=24, seed=3)
    front = Part(sink_q, sink_k, sink_v)
    options = {"softcap": 3.0, "sink_logits": torch.linspace(-1, 1, 6)}
    raw = RawPart(q, Stored(storage.kind, fields, mean, 8, angles), mask)
    out, _, scores = native.decode(KVView((front, raw)), 0.3, **options, return_received=True)
    parts = (front, Part(q, key, value, mask))
    expected, _, expected_scores = joint(parts, scale=0.3, **options, return_scores=True)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(scores, expected_scores, atol=2e-5, rtol=2e-5)


def test_a_tile_rule_that_is_off_by_one_is_seen(tmp_path, monkeypatch) -> None:
    q, k, v = make_qkv(200, 200, heads=(4, 2))
    check(SlidingWindow(70), q, k, v, torch.float32)
    monkeypatch.setattr(native, "_folder", lambda: tmp_path)
    build = native.build()
    path = native._built(build.command, build.compiler, ("-DWRONG_BY=1",))
    wrong = native._bound(ctypes.CDLL(str(path)))
    monkeypatch.setattr(native, "build", lambda: native.Build(wrong))
    with pytest.raises(AssertionError, match="error"):
        check(SlidingWindow(70), q, k, v, torch.float32)


def test_a_library_that_a_crash_left_empty_is_built_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(native, "_folder", lambda: tmp_path)
    monkeypatch.setattr(native, "_FLAGS", ("-O0", *native._FLAGS[1:]))  # sooner
    command, about = native.build().command, native.build().compiler
    path = native._built(command, about)
    path.write_bytes(b"")
    native.build.cache_clear()
    try:
        assert native.build().lack is None
        assert path.stat().st_size
    finally:
        native.build.cache_clear()


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"ATTNSPAN_NATIVE": "0"}, "ATTNSPAN_NATIVE=0 switches it off"),
        ({"CXX": "no-such-compiler -O2"}, "there is no C++ compiler (no-such-compiler -O2)"),
        ({"CXX": "false"}, "it couldn't be built: false"),
        ({"CXX": "g++ '"}, 'CXX is "g++ \'": No closing quotation'),
    ],
)
def test_where_it_can_not_be_built_the_composite_serves_and_says_so(
    tmp_path, variables, why
) -> None:
    code = (
        "import torch, attnspan as span; x = torch.ones(1, 2, 3, 8); "
        "print(span.explain(x, x, x)); print(span.attention(x, x, x).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[0].startswith(f"cpu: native can't: {why}")
    assert done.stdout.splitlines()[1] == "48.0"
