"""The calls that benchmarks/gpu.py times: a contender's on the inputs of a case, and its error.

Inputs are the same for all contenders of a case: for prefill views of `(batch, sequence, heads,
head_dim)` memory, as a model's projections leave it, for decode `(batch, heads, sequence,
head_dim)`, as a cache holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import peers
import sampled
import torch
from gpu_cases import HEADS, KV_HEADS, OURS, Case
from gpu_report import Row
from torch import Tensor

from attnspan import attention, gpu
from attnspan.cache import Int4, Int8
from attnspan.kernels import gpu_decode
from attnspan.kernels.view import Angles, KVView, Part, RawPart, Stored
from attnspan.patterns import Full, Pattern, pairs
from attnspan.positions import Rope

PEERLESS = (*OURS, "sdpa")  # called through our front door
_WARM = 128 << 20  # bytes of inputs to go through before any is read again: over twice the L2
_ALONE = 1 << 30  # bytes of one input that drive themselves out of the L2
_MEAN = 64  # tokens from which int4 learns the means of its keys

Call = Callable[[], Any]


def prepare(case: Case, contender: str, row: Row, check: bool = True) -> tuple[Call, int]:
    """What a burst repeats and how many calls that is; notes work, memory and error in `row`."""
    if case.pattern is None:
        return _decode(case, contender, row, check)
    q, k, v, grad = _inputs(case.batch, case.n, case.head_dim)
    row.work = 4.0 * case.head_dim * HEADS * pairs(case.pattern, case.n)
    if contender.startswith("received"):
        row.work /= 2
        run = _received(contender, case.pattern, q, k, v)
        found = run()
        if check:
            row.error = _error(found[0, :, _sample(case.n)[1]], _exact_received(case))
        return run, 1
    back = case.what == "backward"
    leaves = [x.detach().requires_grad_(back) for x in (q, k, v)]
    with torch.set_grad_enabled(back):
        call = _forward(contender, case, *leaves)
        out, lse = call()
    if back:
        return _backward(case, row, leaves, out, grad, check), 1
    if check:
        at, exact = _sample(case.n)[0], _exact(case)
        row.error = _error(out[0, :, at], exact["out"])
        if lse is not None:
            row.error = max(row.error, _error(lse[0, :, at], exact["lse"]))
    return torch.no_grad()(call), 1


def _backward(
    case: Case, row: Row, leaves: list[Tensor], out: Tensor, grad: Tensor, check: bool
) -> Call:
    row.work *= 2.5

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    run()
    if check:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        dq, dk, dv = run()
        row.extra_mib = round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)
        at, some = _sample(case.n)
        found = {"dq": dq[0, :, at], "dk": dk[0, :, some], "dv": dv[0, :, some]}
        exact = _exact(case)
        row.error = max(_error(x, exact[name]) for name, x in found.items())
    return run


@lru_cache(maxsize=1)
def _inputs(batch: int, n: int, head_dim: int) -> tuple[Tensor, ...]:
    """q, k, v and a gradient of the output."""
    make = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "generator": make}
    all_heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    made = [torch.randn(batch, n, heads, head_dim, **options) for heads in all_heads]
    return tuple(x.transpose(1, 2) for x in made)


@lru_cache(maxsize=8)
def _sample(n: int) -> tuple[Tensor, Tensor]:
    """Rows and keys at which results are compared: the first, the last and some between."""
    between = torch.randint(n, (16,), generator=torch.Generator().manual_seed(n))
    at = torch.cat([torch.arange(8), between, torch.arange(n - 8, n)])
    # Not in the middle of a long sequence: all that see a key take part in its gradients.
    start = max(n // 2, n - 8192)
    return at.cuda(), torch.arange(start, start + 8, device="cuda")


@lru_cache(maxsize=1)
def _exact(case: Case) -> dict[str, Tensor]:
    q, k, v, grad = _inputs(case.batch, case.n, case.head_dim)
    at, some = _sample(case.n)
    assert case.pattern is not None
    if case.what == "forward":
        out, lse, _ = sampled.rows(q, k, v, case.pattern, at)
        return {"out": out, "lse": lse}
    dq = sampled.rows(q, k, v, case.pattern, at, grad)[2]
    _, dk, dv = sampled.keys(q, k, v, case.pattern, some, grad)
    assert dq is not None
    return {"dq": dq, "dk": dk, "dv": dv}


@lru_cache(maxsize=1)
def _exact_received(case: Case) -> Tensor:
    q, k, v, _ = _inputs(case.batch, case.n, case.head_dim)
    assert case.pattern is not None
    return sampled.keys(q, k, v, case.pattern, _sample(case.n)[1])[0]


def _forward(contender: str, case: Case, q: Tensor, k: Tensor, v: Tensor) -> peers.Run:
    assert case.pattern is not None
    if contender not in PEERLESS:
        return peers.prefill(contender, q, k, v, case.pattern, case.lse)

    def run() -> tuple[Tensor, Tensor | None]:
        if case.lse:
            return attention(q, k, v, case.pattern, impl=contender, return_lse=True)
        return attention(q, k, v, case.pattern, impl=contender), None

    return run


def _received(contender: str, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Call:
    if contender == "received, eager":
        return peers.eager_received(q, k, pattern)
    with torch.no_grad():
        _, lse = attention(q, k, v, pattern, return_lse=True, impl="hopper")
    scale = q.shape[3] ** -0.5
    return lambda: gpu.received(q, k, lse, pattern.text, 0, scale, None)


def _decode(case: Case, contender: str, row: Row, check: bool) -> tuple[Call, int]:
    """A graph of calls that go through enough inputs that none lies in the L2."""
    kind, _, more = contender.partition(", ")
    stored = {"int8": Int8(), "int4": Int4()}.get(more if kind == "ours" else "")
    token = 4 * case.head_dim
    if stored is not None:
        token = stored.bytes_per_token(case.head_dim, torch.float16)
    row.work = float(case.batch * KV_HEADS * case.n * token)
    sets = math.ceil(_WARM / row.work) + (row.work < _ALONE)
    make = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "generator": make}
    counters = torch.zeros(case.batch * KV_HEADS, dtype=torch.int32, device="cuda")
    runs: list[Call] = []
    for i in range(sets if check else 1):
        q = torch.randn(case.batch, HEADS, 1, case.head_dim, **options)
        shape = case.batch, KV_HEADS, case.n, case.head_dim
        k, v = (torch.randn(shape, **options) for _ in range(2))
        if kind == "ours":
            part, key, value = (Part(q, k, v), k, v) if stored is None else _coded(stored, q, k, v)
            runs.append(_ours(KVView((part,)), counters, more == "scores"))
        else:
            key, value = k, v
            runs.append(peers.decode(contender, q, k, v))
        if i == 0 and check:
            row.error = _decode_error(case, runs[0](), q[:1], key[:1], value[:1])
            del key, value
    if not check:
        runs[0]()
        return runs[0], 1

    def through() -> None:
        for run in runs:
            run()

    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(torch.cuda.Stream()):
            through()  # what is built or chosen at a first call isn't captured
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            through()
    # The closure keeps the inputs alive for as long as the graph reads them.
    return lambda graph=graph, held=runs: graph.replay(), sets


def _ours(view: KVView, counters: Tensor, scores: bool) -> Call:
    scale = view.parts[0].query.shape[3] ** -0.5

    def run() -> tuple[Tensor, list[Tensor] | None]:
        given = {"return_received": scores, "counters": counters}
        out, _, received = gpu_decode.decode(view, scale, **given)
        return out, received

    return run


def _coded(storage: Int8 | Int4, q: Tensor, k: Tensor, v: Tensor) -> tuple[RawPart, Tensor, Tensor]:
    """A part as a cache stores it, and the keys and values that its codes stand for.

    Int4 holds its keys un-rotated, since means count, so decoding turns them.
    """
    if isinstance(storage, Int8):
        fields = storage.encode(k, v, None)
        return RawPart(q, Stored("int8", fields)), *storage.decode(fields, None, torch.float32)
    mean = k[:, :, :_MEAN].double().mean(2, keepdim=True).half().float()
    fields = storage.encode(k, v, mean)
    key, value = storage.decode(fields, mean, torch.float32)
    rope = Rope(q.shape[3], 1e4)
    places = torch.arange(k.shape[2], device=k.device)
    key = rope.turn(key, *rope.spread(places, dtype=torch.float32))
    angles = Angles(*rope.cos_sin(places), rope.interleaved)
    return RawPart(q, Stored("int4", fields, mean, storage.group, angles)), key, value


def _decode_error(case: Case, given: tuple[Any, Any], q: Tensor, k: Tensor, v: Tensor) -> float:
    out, scores = given
    last = torch.zeros(1, dtype=torch.int64, device="cuda")
    exact, _, _ = sampled.rows(q, k, v, Full(), last)
    error = _error(out[:1].reshape(exact.shape), exact)
    if scores is None:
        return error
    some = torch.arange(0, case.n, 97, device="cuda")
    exact_scores, _, _ = sampled.keys(q, k, v, Full(), some)
    return max(error, _error(scores[0][0][:, some], exact_scores))


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())
