"""The front door for a part of an attention: queries over some of their keys, and the gradients.

Unlike `attention` it has no graph of its own: the gradients come from the whole attention's result
and log-sum-exp, wherever the other keys were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnspan import gpu, ops
from attnspan.kernels import cpu, gpu_merge, native
from attnspan.kernels.reference import reference
from attnspan.patterns import Pattern

IMPLS = ("auto", "reference", "native", "cpu", "hopper", "triton")
_MOST_SCORES = 2**26  # half a gibibyte in float64


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    q_offset: int,
    softcap: float | None,
    impl: str = "auto",
    backward: bool = False,
) -> str:
    """Which of `IMPLS` computes this.

    Raises:
        ValueError: the one that is asked for, or all of them, can't.
    """
    if impl == "reference":
        return impl
    order = ("hopper", "triton") if q.device.type == "cuda" else ("native", "cpu")
    lacking = []
    for name in order if impl == "auto" else (impl,):
        lack = _lacks(name, q, k, v, pattern, q_offset, softcap, backward)
        if lack is None:
            return name
        lacking.append(f"{name}: {lack}")
    if impl == "auto" and q.shape[:3].numel() * k.shape[2] <= _MOST_SCORES:
        return "reference"
    raise ValueError(f"a part of an attention: no impl can do this: {'; '.join(lacking)}")


def _lacks(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    q_offset: int,
    softcap: float | None,
    backward: bool,
) -> str | None:
    if impl == "native":
        if softcap is not None and not 2**-10 <= softcap <= 2**10:
            return f"its logit soft caps lie between 2**-10 and 2**10, not at {softcap}"
        return native.lacks(q, k, v)
    if impl == "cpu":
        return cpu.lacks(q, k, v, softcap)
    lack = gpu.lacks(impl, q, k, v, pattern.text, q_offset, softcap)
    return gpu.lacks_backward(impl, q, k, v) if lack is None and backward else lack


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    q_offset: int,
    scale: float,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`out (batch, Hq, n, value_dim)` and `lse (batch, Hq, n)`; arguments as in `attention`."""
    name = choose(q, k, v, pattern, q_offset, softcap, impl)
    if name == "reference":
        return reference(q, k, v, pattern, q_offset=q_offset, scale=scale, softcap=softcap)
    return ops.run(q, k, v, pattern.text, q_offset, scale, softcap, name)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: Pattern,
    q_offset: int,
    scale: float,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys give to the gradients of q, k and v, unrounded where the kernel has it so.

    Args:
        grad_out: `(batch, Hq, n, value_dim)`, that of the whole attention's result.
        grad_lse: `(batch, Hq, n)`, that of its log-sum-exp; None is zero.
        q: with k, v, pattern, q_offset, scale, softcap and impl as in `forward`.
        k: see q.
        v: see q.
        out: the whole attention's result, for these queries.
        lse: its log-sum-exp.
        pattern: see q.
        q_offset: see q.
        scale: see q.
        softcap: see q.
        impl: see q.
    """
    name = choose(q, k, v, pattern, q_offset, softcap, impl, backward=True)
    given = grad_out, grad_lse, q, k, v, out, lse
    return ops.wide_backward(*given, pattern.text, q_offset, scale, softcap, name)


def join(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Takes one more part of an attention into the others' `out` and `lse`, in place.

    `out -= sigmoid(part_lse - lse) * (out - part)`, and `lse` becomes that of both; a part whose
    log-sum-exp is minus infinity leaves a row unchanged to the bit.

    Args:
        out: `(batch, heads, n, value_dim)`, float32 or float64; overwritten.
        lse: `(batch, heads, n)`, of the same dtype; overwritten.
        part: as `out`, of any dtype.
        part_lse: as `lse`.
    """
    if out.device.type == "cuda" and out.dtype == torch.float32:
        gpu_merge.merge_into(out, lse, part, part_lse)
        return
    weight = torch.sigmoid(part_lse - lse)
    weight.masked_fill_(part_lse == -torch.inf, 0)
    out.lerp_(part.to(out.dtype), weight[..., None])
    lse.copy_(torch.logaddexp(lse, part_lse))
