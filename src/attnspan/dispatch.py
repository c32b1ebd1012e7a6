"""The front door: validate, choose an implementation, call it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from reprlib import repr as _short
from typing import Any, Literal, overload

import torch
from torch import Tensor

from attnspan import gpu, ops
from attnspan.kernels import cpu, fa4, flex, fused_cuda, gpu_received, native
from attnspan.kernels import sdpa as fused
from attnspan.kernels.merge import with_sink
from attnspan.kernels.reference import reference
from attnspan.patterns.algebra import Pattern
from attnspan.patterns.library import MOST, Causal
from attnspan.views import FEW_QUERIES

IMPLS = (
    *("auto", "reference", "native", "cpu", "hopper", "triton", "decode"),
    *("fa4", "cudnn", "flash", "sdpa", "flex"),
)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# Pairs of a query and a key up to which a dense mask may be made on a GPU: 512 MB in bfloat16.
_MOST_MASK = 2**28


@dataclass(frozen=True)
class Explanation:
    """Which implementation runs, and why.

    Attributes:
        impl: its name.
        reasons: half sentences.
        figures: on a GPU, what was measured for the nearest case: (implementation, TFLOP/s),
            fastest first, whether or not they can do this call.
    """

    impl: str
    reasons: tuple[str, ...]
    figures: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return f"{self.impl}: {'; '.join(self.reasons)}"


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = ...,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    sink_logits: Tensor | None = ...,
    q_offset: int | None = ...,
    return_lse: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = ...,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    sink_logits: Tensor | None = ...,
    q_offset: int | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = Causal(),
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    q_offset: int | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exactly the attention that `pattern` says, differentiable, GQA without copies of K and V.

    Args:
        q: `(batch, Hq, n, head_dim)`; float64, float32, bfloat16 or float16.
        k: `(batch, Hkv, m, head_dim)`, `Hq % Hkv == 0`; query head `h` reads KV head
            `h // (Hq // Hkv)`.
        v: `(batch, Hkv, m, value_dim)`.
        pattern: which (query position, key position) pairs see each other.
        scale: factor of the scores; None is `head_dim ** -0.5`.
        softcap: scores become `softcap * tanh(score / softcap)`, after the scale (Gemma 2,
            https://arxiv.org/abs/2408.00118).
        sink_logits: `(Hq,)`, one learned score more per head, whose value is zero (gpt-oss).
        q_offset: the position of the first query; keys stand at 0 to m-1. None is `m - n`: the
            queries are the last ones of the keys. A query before the first key sees none of them
            in a causal pattern.
        return_lse: give the log-sum-exp as well.
        impl: "reference" (the definition, in float64), "native" (C++ for CPUs), "cpu" (torch's CPU
            kernels by tiles), "hopper" (ours for NVIDIA's Hopper GPUs), "triton" (ours for others),
            "decode" (ours for a few queries on Hopper), "fa4" (FlashAttention-4, an extra), "cudnn"
            and "flash" (torch's kernels without a mask), "sdpa" (torch's fused kernels with a dense
            mask), "flex" (torch's compiled FlexAttention), or "auto": the fastest that can do it,
            on a GPU by what was measured there (`explain` says it).

    Returns:
        `out (batch, Hq, n, value_dim)`, in the dtype of `q`; with `return_lse` also
        `lse (batch, Hq, n)`: the natural logarithm of the softmax's denominator, the sink logit
        included, in float32 (float64 for float64 input). A query that sees no key gives zeros and
        minus infinity (with a sink logit: that logit), never NaN.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that don't fit, or an `impl` that can't do
            this.
        TypeError: an argument of a wrong type.

    >>> q, k, v = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4), torch.eye(3, 4)[None, None]
    >>> attention(q, k, v)[0, 0, 0]
    tensor([0.3333, 0.3333, 0.3333, 0.0000])
    """
    check_tensors(q, k, v, sink_logits)
    check_options(pattern, scale, softcap, q_offset, impl, return_lse)
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if factor <= 0:  # which torch's kernels mask wrongly
        q, factor = (-q, -factor) if factor else (q * 0, 1.0)
    sinks = sink_logits
    wants_lse = return_lse or sinks is not None
    if q.device.type == "cuda" and torch.compiler.is_compiling() and impl in ("auto", *gpu.IMPLS):
        name = impl  # what runs is settled when it runs, by tensors of known lengths
        if impl == "decode" and _has_gradients(q, k, v):
            raise ValueError("attention: impl 'decode' can't do this: it has no backward")
    else:
        name = _choose(q, k, v, pattern, offset, softcap, wants_lse, impl)[0]
    match name:
        case "native" | "cpu" | "hopper" | "triton" | "decode" | "auto":
            ops.check_tangents(q, k, v)
            out, lse = ops.run(q, k, v, _text(pattern), offset, factor, softcap, name)
        case "fa4":
            ops.check_tangents(q, k, v)
            out, lse = fa4.forward(q, k, v, pattern, factor)
        case "cudnn" | "flash":
            ops.check_tangents(q, k, v)
            return fused_cuda.forward(name, q, k, v, pattern, factor)
        case "flex":
            out, lse = flex.flex(
                q,
                k,
                v,
                pattern,
                q_offset=offset,
                scale=factor,
                softcap=softcap,
                return_lse=wants_lse,
            )
            if lse is None:
                return out
        case "sdpa":
            out, lse = fused.sdpa(
                q, k, v, pattern, q_offset=offset, scale=factor, sink_logits=sinks
            )
            sinks = None
        case _:
            out, lse = reference(
                q,
                k,
                v,
                pattern,
                q_offset=offset,
                scale=factor,
                softcap=softcap,
                sink_logits=sinks,
            )
            sinks = None
    if sinks is not None:
        out, lse = with_sink(out, lse, sinks)
    return (out, lse) if return_lse else out


@torch.no_grad()
def received(
    q: Tensor,
    k: Tensor,
    pattern: Pattern = Causal(),
    *,
    lse: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    q_offset: int | None = None,
) -> Tensor:
    """The attention that each key receives: the score by which H2O keeps heavy hitters.

    Exact, in memory linear in n and m, without gradients (https://arxiv.org/abs/2306.14048).

    Args:
        q: as in `attention`, with k, pattern, scale, softcap, sink_logits and q_offset.
        k: see q.
        pattern: see q.
        lse: `(batch, Hq, n)`, from `attention(..., return_lse=True)`; None computes it here.
        scale: see q.
        softcap: see q.
        sink_logits: see q; without use where `lse` is given, which holds them.
        q_offset: see q.

    Returns:
        `(batch, Hkv, m)`, float32 (float64 for float64 input): the softmax's weights, summed over
        the queries and over the query heads of a KV head.

    Raises:
        ValueError: as in `attention`; or an `lse` of another shape.

    >>> q, k = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
    >>> received(q, k)[0, 0]
    tensor([1.8333, 0.8333, 0.3333])
    """
    check_tensors(q, k, k, sink_logits, "received")
    check_options(pattern, scale, softcap, q_offset, by="received")
    if lse is None:
        _, lse = attention(
            q,
            k,
            k,
            pattern,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
            q_offset=q_offset,
            return_lse=True,
        )
    elif (
        not isinstance(lse, Tensor)
        or lse.shape != q.shape[:3]
        or lse.device != q.device
        or lse.dtype not in _DTYPES
        or lse.layout != torch.strided
    ):
        got = f"{lse.dtype} {tuple(lse.shape)}" if isinstance(lse, Tensor) else _short(lse)
        raise ValueError(
            f"received: lse is {got}; None or a dense float tensor of shape {tuple(q.shape[:3])} "
            f"on {q.device} is allowed"
        )
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    lengths = q.shape[2], k.shape[2], offset
    in_memory = all(ops.lies_in_memory(x) for x in (q, k, lse))
    if in_memory and gpu_received.lacks(q, k) is None:
        text = _text(pattern)
        if gpu.lacks_lists(text, *lengths, q.device) is None:
            return gpu.received(q, k, lse, text, offset, factor, softcap)
    kernel = native if in_memory and _native_lacks(q, k, k, softcap) is None else cpu
    passes = ops.passes(_text(pattern), *lengths, kernel.TILE)
    return kernel.received(q, k, lse, passes, factor, softcap)


def _text(pattern: Pattern) -> str:
    # Dynamo follows what makes a text, and so guards the numbers in it; a kept one it would not.
    return str(pattern) if torch.compiler.is_compiling() else pattern.text


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = Causal(),
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    q_offset: int | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Explanation:
    """Which implementation `attention` would run for the same arguments, and why; raises as it.

    >>> x = torch.zeros(1, 1, 2, 4)
    >>> print(explain(x.double(), x.double(), x.double(), softcap=30.0))
    reference: native can't: it has no float64; cpu can't: it has no logit soft cap
    """
    check_tensors(q, k, v, sink_logits)
    check_options(pattern, scale, softcap, q_offset, impl, return_lse)
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    wants_lse = return_lse or sink_logits is not None
    name, lacking = _choose(q, k, v, pattern, offset, softcap, wants_lse, impl)
    ranking = None
    if q.device.type == "cuda":
        ranking = gpu.ranking(q, _text(pattern), wants_lse, _has_gradients(q, k, v))
    figures = ranking.figures if ranking else ()
    reasons = [f"{other} can't: {lack}" for other, lack in lacking]
    if impl != "auto":
        reasons.append("it was asked for")
    elif name == "decode":
        reasons.append("a few queries are read through once, whatever they see")
    elif ranking and name in dict(figures):
        reasons.append(f"it is the fastest measured of those that can do this: {ranking}")
    elif name != "reference":
        reasons.append("it is the fastest of those that can do this")
    return Explanation(name, tuple(reasons), figures)


def _has_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    offset: int,
    softcap: float | None,
    wants_lse: bool,
    impl: str,
) -> tuple[str, list[tuple[str, str]]]:
    """The implementation that runs, and what faster ones lack."""
    if impl == "reference":
        return impl, []
    if impl != "auto":
        lack = _lacks(impl, q, k, v, pattern, offset, softcap, wants_lse)
        if lack is not None:
            raise ValueError(f"attention: impl {impl!r} can't do this: {lack}; 'reference' can")
        return impl, []
    if q.device.type == "cuda":
        order = _gpu_order(q, k, v, pattern, wants_lse)
    elif q.dtype == torch.bfloat16 and q.shape[2] > FEW_QUERIES and native.has_matrix_units():
        # Torch's products use them, the C++ kernels don't: 1.3 times as fast there.
        order = ("cpu", "native")
    else:
        order = ("native", "cpu") if q.device.type == "cpu" else ("sdpa",)
    lacking = []
    for name in order:
        lack = _lacks(name, q, k, v, pattern, offset, softcap, wants_lse)
        if lack is None:
            return name, lacking
        lacking.append((name, lack))
    return "reference", lacking


def _gpu_order(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, wants_lse: bool
) -> tuple[str, ...]:
    """Implementations for GPUs, the fastest first: as measured, where that was done.

    FlexAttention compiles for every length, up to a limit, so it comes after what doesn't.
    """
    ranking = gpu.ranking(q, _text(pattern), wants_lse, _has_gradients(q, k, v))
    return _order(ranking.figures if ranking else (), q.shape[2] * k.shape[2] <= _MOST_MASK)


@lru_cache(maxsize=256)
def _order(figures: tuple[tuple[str, float], ...], can_mask: bool) -> tuple[str, ...]:
    measured = (impl for impl, _ in figures if impl not in ("flex", "sdpa"))
    # A dense mask is slow, but needs no compiling.
    masked = ("sdpa", "flex") if can_mask else ("flex", "sdpa")
    return tuple(dict.fromkeys(("decode", *measured, "hopper", "triton", *masked)))


def _lacks(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    offset: int,
    softcap: float | None,
    wants_lse: bool,
) -> str | None:
    match impl:
        case "hopper" | "triton" | "decode":
            return gpu.lacks(impl, q, k, v, _text(pattern), offset, softcap)
        case "native":
            return _native_lacks(q, k, v, softcap)
        case "cpu":
            return cpu.lacks(q, k, v, softcap)
        case "fa4" | "cudnn" | "flash":
            if impl == "fa4":
                lack = fa4.lacks(q, k, v, pattern, offset)
            else:
                lack = fused_cuda.lacks(impl, q, k, v, pattern, offset, wants_lse)
            if lack is None and softcap is not None:
                lack = "it is called without a logit soft cap"
            return lack
        case "flex":
            return flex.lacks(q, k, v, wants_lse)
        case _:
            return fused.lacks(q, k, v, softcap)


def _native_lacks(q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> str | None:
    # Beyond, float32 rounds what is capped away, or takes the cap for none.
    if softcap is not None and not 2**-10 <= softcap <= 2**10:
        return f"its logit soft caps lie between 2**-10 and 2**10, not at {softcap}"
    return native.lacks(q, k, v)


def check_tensors(q: Any, k: Any, v: Any, sink_logits: Any, by: str = "attention") -> None:
    """Raises what `attention` documents, in the name of `by`, for tensors that don't fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{by}: {name} is a {type(x).__name__}; a tensor is allowed")
        if x.layout != torch.strided:
            raise ValueError(f"{by}: {name} is {x.layout}; a dense tensor is allowed")
        if x.dim() != 4 or not x.shape[3]:
            raise ValueError(
                f"{by}: {name} has the shape {tuple(x.shape)}; (batch, heads, sequence, "
                "head_dim) with a head_dim of at least 1 is allowed"
            )
        if x.dtype not in _DTYPES or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{by}: {name} is {x.dtype} on {x.device}; one of float64, float32, bfloat16 "
                "and float16 is allowed, the same for q, k and v, on one device"
            )
    batch, q_heads, _, width = q.shape
    (*outer, key_width), (*value_outer, _) = k.shape, v.shape
    if outer != value_outer or batch != outer[0] or width != key_width:
        raise ValueError(
            f"{by}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} don't fit; "
            "q (batch, Hq, n, head_dim), k (batch, Hkv, m, head_dim) and v (batch, Hkv, m, "
            "value_dim) are allowed"
        )
    if not outer[1] or q_heads % outer[1]:
        raise ValueError(
            f"{by}: {q.shape[1]} query heads and {k.shape[1]} KV heads; a multiple of at "
            "least one KV head is allowed"
        )
    if sink_logits is not None and not (
        isinstance(sink_logits, Tensor)
        and sink_logits.shape == q.shape[1:2]
        and sink_logits.dtype in _DTYPES
        and sink_logits.device == q.device
    ):
        got = tuple(sink_logits.shape) if isinstance(sink_logits, Tensor) else _short(sink_logits)
        raise ValueError(
            f"{by}: sink_logits is {got}; None or a float tensor of shape "
            f"({q.shape[1]},), one for each query head, on {q.device} is allowed"
        )


def check_options(
    pattern: Any,
    scale: Any,
    softcap: Any,
    q_offset: Any,
    impl: Any = "auto",
    return_lse: Any = False,
    by: str = "attention",
) -> None:
    """Raises what `attention` documents, in the name of `by`, for options that aren't allowed."""
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"{by}: pattern is {_short(pattern)}; a Pattern such as Causal() is allowed"
        )
    if scale is not None and not _is_finite(scale):
        raise ValueError(f"{by}: scale is {_short(scale)}; None or a finite number is allowed")
    if scale is not None and abs(scale) > 2**64:
        raise ValueError(f"{by}: scale is {_short(scale)}; a number up to 2**64 in size is allowed")
    if softcap is not None and not (_is_finite(softcap) and softcap > 0):
        raise ValueError(
            f"{by}: softcap is {_short(softcap)}; None or a finite number above 0 is allowed"
        )
    if q_offset is not None and (isinstance(q_offset, bool) or not isinstance(q_offset, int)):
        raise ValueError(f"{by}: q_offset is {_short(q_offset)}; None or a whole number is allowed")
    if q_offset is not None and abs(q_offset) > MOST:
        raise ValueError(
            f"{by}: q_offset is {q_offset}; None or a number from {-MOST} to {MOST} is allowed"
        )
    if not isinstance(return_lse, bool):
        raise ValueError(f"{by}: return_lse is {_short(return_lse)}; True or False is allowed")
    if impl not in IMPLS:
        raise ValueError(f"{by}: impl is {_short(impl)}; one of {', '.join(IMPLS)} is allowed")


_LARGEST = sys.float_info.max


def _is_finite(x: Any) -> bool:
    # Compared, not converted: a whole number may be too large for a float.
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= _LARGEST
