"""GPU kernels over a plan: masks on the device, residue classes as batches, passes joined.

A kernel computes one dense problem under the mask of its `Lists`. A pattern without strides is one
problem. A stride adds a pass of problems on every s-th row and key, whose classes are the batch of
a strided view; what passes give is joined by their log-sum-exps. A few queries are the decode
kernel's, which reads the ranges of keys that they see.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnspan import rates
from attnspan.kernels import gpu_decode, gpu_received, hopper, hopper_backward, triton_attention
from attnspan.kernels.capability import compute_capability, device_name
from attnspan.kernels.gpu_lists import MOST_RANGES, Lists, Unlisted
from attnspan.kernels.gpu_merge import merge_into
from attnspan.kernels.view import KVView, Part
from attnspan.patterns.text import parse
from attnspan.patterns.tiles import plan

IMPLS = ("decode", "hopper", "triton")
_FORWARD: dict[str, ModuleType] = {"hopper": hopper, "triton": triton_attention}
_BACKWARD: dict[str, ModuleType] = {"hopper": hopper_backward, "triton": triton_attention}


@dataclass(frozen=True, eq=False)
class _Problem:
    """`count` dense problems, of every `step`-th row from `first_query` on and of the next ones."""

    step: int
    first_query: int
    first_key: int
    count: int
    lists: Lists

    @property
    def whole(self) -> bool:
        return self.step == 1


@lru_cache(maxsize=16)
def _passes(
    pattern: str, n: int, m: int, q_offset: int, device: torch.device
) -> tuple[tuple[_Problem, ...], ...]:
    return tuple(
        tuple(
            _Problem(each.step, job.first_query, job.first_key, job.count, Lists(job.tiles, device))
            for job in each.jobs
        )
        for each in plan(parse(pattern), n, m, q_offset)
    )


def lacks(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    q_offset: int,
    softcap: float | None,
) -> str | None:
    """What `impl` lacks for these inputs, as the end of a sentence; None: nothing."""
    grads = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if impl == "decode":
        lack = gpu_decode.lacks(q, k, v) or ("it has no backward" if grads else None)
        return lack or _lacks_ranges(pattern, q.shape[2], k.shape[2], q_offset)
    lack = _FORWARD[impl].lacks(q, k, v)
    if lack is None and grads:
        lack = _BACKWARD[impl].lacks(q, k, v)
    if lack is None and softcap is not None and impl == "hopper":
        lack = "it has no logit soft cap"
    return lack or lacks_lists(pattern, q.shape[2], k.shape[2], q_offset, q.device)


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    q_offset: int,
    softcap: float | None,
    backward: bool = False,
) -> str | None:
    """The one of `IMPLS` to run where the caller could not see the tensors; None: none can.

    `backward` asks for one with gradients, whoever computed the attention itself.
    """
    for impl in IMPLS:
        if backward and lacks_backward(impl, q, k, v) is not None:
            continue
        if lacks(impl, q, k, v, pattern, q_offset, softcap) is None:
            return impl
    return None


def lacks_backward(impl: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What a backward lacks for these inputs, as the end of a sentence; None: nothing."""
    return "it has no backward" if impl not in _BACKWARD else _BACKWARD[impl].lacks(q, k, v)


def ranking(q: Tensor, pattern: str, with_lse: bool, with_backward: bool) -> rates.Ranking | None:
    """What was measured on this GPU, or on one of its kind, for such a call."""
    if q.dtype not in (torch.bfloat16, torch.float16) or torch.version.hip is not None:
        return None
    return rates.ranking(
        device_name(q.device),
        compute_capability(q.device),
        pattern,
        q.shape[3],
        q.shape[2],
        with_lse,
        with_backward,
    )


def lacks_lists(pattern: str, n: int, m: int, q_offset: int, device: torch.device) -> str | None:
    """Why a pattern has no lists, as the end of a sentence; None where it has."""
    try:
        _passes(pattern, n, m, q_offset, device)
    except Unlisted as error:
        return f"its masks are a few ranges of keys a query, and here {error}"
    return None


def forward(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    q_offset: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp; arguments as in `attnspan.ops.attention`."""
    if impl == "decode":
        return _decode(q, k, v, pattern, q_offset, scale, softcap)
    options = {} if softcap is None else {"softcap": softcap}
    passes = _passes(pattern, q.shape[2], k.shape[2], q_offset, q.device)
    kernel = _FORWARD[impl]
    if len(passes) == 1 and len(passes[0]) == 1 and passes[0][0].whole:
        out, lse = kernel.forward(q, k, v, passes[0][0].lists, scale, **options)
    else:
        # Of two passes a row's results are joined once; of more than two, in float32.
        dtype = q.dtype if len(passes) < 3 else torch.float32
        some_q, some_k, some_v = (_folded(x) for x in (q, k, v))
        alike = some_q
        if v.shape[3] != q.shape[3]:
            alike = q.new_empty((*some_q.shape[:3], v.shape[3]))
        out = torch.zeros_like(alike, dtype=dtype)
        if out.stride(3) != 1:
            out = torch.zeros(out.shape, dtype=dtype, device=q.device)
        lse = q.new_full(some_q.shape[:3], -torch.inf, dtype=torch.float32)
        for problem in (problem for problems in passes for problem in problems):
            (rows, into, its_lse), keys = _views(
                problem, (some_q, out, lse[..., None]), (some_k, some_v)
            )
            part, part_lse = kernel.forward(rows, *keys, problem.lists, scale, **options)
            merge_into(into, its_lse[..., 0], part, part_lse)
        out, lse = out[0].unflatten(0, q.shape[:2]), lse[0].unflatten(0, q.shape[:2])
    out = laid_out(out, q) if v.shape[3] == q.shape[3] else out.to(q.dtype).contiguous()
    return out, lse.contiguous()


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    q_offset: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    parts = tuple(
        Part(q, k[:, :, start:stop], v[:, :, start:stop], mask)
        for start, stop, mask in _ranges(
            pattern, q.shape[2], k.shape[2], q_offset, q.dtype, q.device
        )
    )
    if not parts or not q.numel():
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
        return torch.zeros_like(q), lse
    out, lse, _ = gpu_decode.decode(KVView(parts), scale, softcap)
    return laid_out(out, q), lse


@lru_cache(maxsize=64)
def _bounds(pattern: str, n: int, m: int, q_offset: int) -> tuple[tuple[int, int, bool], ...]:
    """Disjoint ranges of the keys that `n` queries see, and whether each sees a range whole."""
    places = np.arange(n, dtype=np.int64) + q_offset
    some, every = parse(pattern).spans(places, places, m)
    pieces = sorted(
        (int(start), int(stop))
        for starts, stops in zip(some.starts, some.stops, strict=True)
        for start, stop in zip(starts, stops, strict=True)
        if stop > start
    )
    joined: list[list[int]] = []
    for start, stop in pieces:
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(stop, joined[-1][1])
        else:
            joined.append([start, stop])
    found = []
    for start, stop in joined:
        # All queries see a range whole where it lies in one run of each.
        whole = ((every.starts <= start) & (every.stops >= stop)).any(0).all()
        found.append((start, stop, bool(whole)))
    return tuple(found)


def _ranges(
    pattern: str, n: int, m: int, q_offset: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, int, Tensor | None], ...]:
    """`_bounds` with the additive mask of those that not every query sees whole.

    Masks are made for each call: kept ones would belong to the stream, or the captured graph, that
    made them.
    """
    found = []
    for start, stop, whole in _bounds(pattern, n, m, q_offset):
        mask = None
        if not whole:
            i = torch.arange(q_offset, q_offset + n, device=device)[:, None]
            seen = parse(pattern).sees(i, torch.arange(start, stop, device=device))
            mask = torch.zeros(seen.shape, dtype=dtype, device=device)
            mask.masked_fill_(~seen, -torch.inf)
        found.append((start, stop, mask))
    return tuple(found)


def _lacks_ranges(pattern: str, n: int, m: int, q_offset: int) -> str | None:
    count = len(_bounds(pattern, n, m, q_offset))
    if count > MOST_RANGES:
        return f"its queries see up to {MOST_RANGES} ranges of keys, not {count}"
    return None


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the dtype of `like` and as `torch.empty_like(like)` lies in memory: often as it is."""
    strides = _strides_like(like.shape, like.stride())
    if x.dtype == like.dtype and x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=like.dtype, device=x.device).copy_(x)


@lru_cache(maxsize=256)
def _strides_like(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Those of `torch.empty_like` of a tensor with these."""
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


def backward(
    impl: str,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: str,
    q_offset: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from the whole attention's `out` and `lse`."""
    if lack := lacks_backward(impl, q, k, v):
        raise ValueError(f"attention: impl {impl!r} can't do the backward of this: {lack}")
    options: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
    if impl == "hopper":
        options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    passes = _passes(pattern, q.shape[2], k.shape[2], q_offset, q.device)
    kernel = _BACKWARD[impl]
    if len(passes) == 1 and len(passes[0]) == 1 and passes[0][0].whole:
        given = grad_out, grad_lse, q, k, v, out, lse, passes[0][0].lists, scale
        return kernel.backward(*given, **options)
    # Passes add up in float32 and are rounded once.
    rows = [_folded(x) for x in (q, out, grad_out, lse[..., None])]
    keys = [_folded(x) for x in (k, v)]
    grads = [x.new_zeros(x.shape, dtype=torch.float32) for x in (rows[0], *keys)]
    more = [] if grad_lse is None else [_folded(grad_lse[..., None])]
    for problem in (problem for problems in passes for problem in problems):
        some, its_keys = _views(problem, (*rows, grads[0], *more), (*keys, *grads[1:]))
        its_q, its_out, its_grad, its_lse = some[:4]
        its_grad_lse = some[5][..., 0].contiguous() if more else None
        given = its_grad, its_grad_lse, its_q, *its_keys[:2], its_out, its_lse[..., 0].contiguous()
        found = kernel.backward(*given, problem.lists, scale, **options)
        for into, part in zip((some[4], *its_keys[2:]), found, strict=True):
            into += part
    first, second, third = (
        x[0].unflatten(0, like.shape[:2]) for x, like in zip(grads, (q, k, v), strict=True)
    )
    return first, second, third


def received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    pattern: str,
    q_offset: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The attention that each key receives, `(batch, Hkv, m)` float32; see `kernels.cpu`."""
    passes = _passes(pattern, q.shape[2], k.shape[2], q_offset, q.device)
    total = q.new_zeros(k.shape[:3], dtype=torch.float32)
    rows: tuple[Tensor, ...] = (q, lse.float()[..., None])
    keys: tuple[Tensor, ...] = (k, total[..., None])
    if not all(problem.whole for problems in passes for problem in problems):
        # Of `total` this is a view, since it was just made.
        rows, keys = tuple(map(_folded, rows)), tuple(map(_folded, keys))
    for problem in (problem for problems in passes for problem in problems):
        (some_q, some_lse), (some_k, into) = _views(problem, rows, keys)
        given = some_q, some_k, some_lse[..., 0].contiguous()
        into[..., 0] += gpu_received.received(*given, problem.lists, scale, softcap)
    return total


def _folded(x: Tensor) -> Tensor:
    """The sequences of a batch as heads of one sequence, so that a class of rows is one problem
    for them all. A query head's KV head stays the same. No view joins the heads of a batch where
    tokens lie between them, as in transformers' layout: those are copied, once a call."""
    return x.flatten(0, 1)[None]


def _views(
    problem: _Problem, rows: tuple[Tensor, ...], keys: tuple[Tensor, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What a problem concerns of `rows` and `keys`, `(1, heads, sequence, width)` each."""
    if problem.whole:
        return rows, keys
    views = []
    sides = (
        (rows, problem.first_query, problem.lists.n),
        (keys, problem.first_key, problem.lists.m),
    )
    for tensors, first, size in sides:
        some = []
        for x in tensors:
            _, sh, sn, sd = x.stride()
            shape = problem.count, x.shape[1], size, x.shape[3]
            start = x.storage_offset() + first * sn
            some.append(x.as_strided(shape, (sn, sh, problem.step * sn, sd), start))
        views.append(tuple(some))
    return views[0], views[1]
