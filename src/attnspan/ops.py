"""The custom operator behind our kernels: what autograd, torch.compile and vmap see of them.

It takes its pattern as text, since an operator's arguments are tensors, numbers and strings. To
call one takes torch as long as all else on the host; where no transform, mode or trace is there to
see it, `run` does without.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnspan import gpu
from attnspan.kernels import cpu, native
from attnspan.kernels.reference import reference
from attnspan.patterns.text import parse
from attnspan.patterns.tiles import Pass, plan

# Implementations whose results lie in memory as their inputs do.
_LAID_OUT = ("auto", *gpu.IMPLS)
_MOST_SCORES = 2**26  # half a gibibyte in float64


@lru_cache(maxsize=16)
def passes(pattern: str, n: int, m: int, q_offset: int, tile: int) -> tuple[Pass, ...]:
    """The plan of a pattern, made once for equal questions."""
    return plan(parse(pattern), n, m, q_offset, tile)


@torch.library.custom_op("attnspan::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    q_offset: int,
    scale: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`out (batch, Hq, n, value_dim)` and its log-sum-exp; arguments as in `attnspan.attention`.

    With `impl` "auto", which tensors on GPUs may have, it chooses when it runs: one graph that
    `torch.compile` made serves any length.
    """
    if impl == "auto":
        impl = gpu.choose(q, k, v, pattern, q_offset, softcap) or _definition(q, k)
    if impl == "reference":
        given = {"q_offset": q_offset, "scale": scale, "softcap": softcap}
        out, lse = reference(q, k, v, parse(pattern), **given)
        return gpu.laid_out(out, q) if v.shape[3] == q.shape[3] else out, lse
    if impl in gpu.IMPLS and (lack := gpu.lacks(impl, q, k, v, pattern, q_offset, softcap)):
        raise ValueError(f"attention: impl {impl!r} can't do this: {lack}")
    return _forward(q, k, v, pattern, q_offset, scale, softcap, impl)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    q_offset: int,
    scale: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if impl in gpu.IMPLS:
        return gpu.forward(impl, q, k, v, pattern, q_offset, scale, softcap)
    lengths = q.shape[2], k.shape[2], q_offset
    if impl == "native":
        return native.forward(q, k, v, passes(pattern, *lengths, native.TILE), scale, softcap)
    return cpu.forward(q, k, v, passes(pattern, *lengths, cpu.TILE), scale)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    if options[-1] in _LAID_OUT and v.shape[3] == q.shape[3]:
        out = torch.empty_like(q)
    return out, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _backward(
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtype, from those of `attention`'s results."""
    given = grad_out, grad_lse, q, k, v, out, lse
    chosen = impl
    if impl == "auto":
        chosen = gpu.choose(q, k, v, pattern, q_offset, softcap, True) or _definition(q, k)
    grads = wide_backward(*given, pattern, q_offset, scale, softcap, chosen)
    if impl in _LAID_OUT:
        laid = [gpu.laid_out(x, like) for x, like in zip(grads, (q, k, v), strict=True)]
        return laid[0], laid[1], laid[2]
    grad_q, grad_k, grad_v = (x.to(q.dtype).contiguous() for x in grads)
    return grad_q, grad_k, grad_v


def wide_backward(
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v as the implementation has them, in float32 where it adds up so."""
    given = grad_out, grad_lse, q, k, v, out, lse
    if impl == "reference":
        return _reference_backward(*given, pattern, q_offset, scale, softcap)
    if impl in gpu.IMPLS:
        return gpu.backward(impl, *given, pattern, q_offset, scale, softcap)
    lengths = q.shape[2], k.shape[2], q_offset
    if impl == "native":
        return native.backward(*given, passes(pattern, *lengths, native.TILE), scale, softcap)
    return cpu.backward(*given, passes(pattern, *lengths, cpu.TILE), scale)


attention_backward = torch.library.custom_op("attnspan::attention_backward", mutates_args=())(
    _backward
)


def _definition(q: Tensor, k: Tensor) -> str:
    """The reference, where its scores are few enough; it isn't fallen back on in silence."""
    if q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= _MOST_SCORES:
        return "reference"
    raise ValueError(
        f"attention: within torch.compile no kernel of ours can do q {tuple(q.shape)} and k "
        f"{tuple(k.shape)} in {q.dtype} under this pattern; outside of it, `explain` says what can"
    )


def _reference_backward(
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
    # By hand: within an operator there is no autograd.
    place = torch.arange(q.shape[2], device=q.device)[:, None] + q_offset
    mask = parse(pattern).sees(place, torch.arange(k.shape[2], device=q.device))
    wide_q, wide_k, wide_v, wide_grad, wide_out = (x.double() for x in (q, k, v, grad_out, out))
    wide_q, wide_grad, wide_out, some_lse = (
        x.unflatten(1, (k.shape[1], -1))
        for x in (wide_q, wide_grad, wide_out, lse.double()[..., None])
    )
    scores = torch.einsum("bhgnd,bhmd->bhgnm", wide_q, wide_k) * scale
    slope = 1.0
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent**2
    weights = torch.exp(scores - some_lse).masked_fill(~mask, 0)
    pull = (wide_grad * wide_out).sum(-1, keepdim=True)
    if grad_lse is not None:
        pull = pull - grad_lse.double()[..., None].unflatten(1, (k.shape[1], -1))
    moved = weights * (torch.einsum("bhgnd,bhmd->bhgnm", wide_grad, wide_v) - pull) * slope * scale
    return (
        torch.einsum("bhgnm,bhmd->bhgnd", moved, wide_k).flatten(1, 2),
        torch.einsum("bhgnm,bhgnd->bhmd", moved, wide_q),
        torch.einsum("bhgnm,bhgnd->bhmd", weights, wide_grad),
    )


@attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if rest[-1] in _LAID_OUT:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    grad_out = torch.zeros_like(saved[3]) if grad_out is None else grad_out
    # With gradients on, a graph of the gradient is asked for: the operator refuses that.
    direct = not torch.is_grad_enabled() and _is_plain(grad_out, grad_lse, *saved)
    backward = _backward if direct else attention_backward
    return *backward(grad_out, grad_lse, *saved, *ctx.options), *(None for _ in ctx.options)


attention.register_autograd(_gradients, setup_context=_save)


class _Attention(torch.autograd.Function):
    """What `attention` is to autograd, without the operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        results = _forward(*inputs)
        _save(ctx, inputs, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return _gradients(ctx, *grads)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    q_offset: int,
    scale: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`attention` by an `impl` that lacks nothing, through the operator only where torch sees it.

    It sees it in `torch.compile`, transforms, modes and traces, and for tensors of a kind of their
    own; then it must be the operator, which has rules for all of them.
    """
    given = q, k, v, pattern, q_offset, scale, softcap, impl
    if not _is_plain(q, k, v):
        return attention(*given)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(*given)
    return _forward(*given)


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd would see an operator on these tensors."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None  # pyright: ignore
        or any(type(x) not in _PLAIN for x in tensors)
        or not all(x is None or lies_in_memory(x) for x in tensors)
    )


_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def lies_in_memory(x: Tensor) -> bool:
    """Whether a kernel finds the tensor's numbers where its address and strides say."""
    return not (
        # A subclass that computes by itself, as fake tensors do, need not have any.
        type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__  # pyright: ignore
        or x.is_neg()
        or x._is_zerotensor()
        # What torch.autograd maps over, of which the interpreters' stack tells nothing.
        or torch._C._functorch.is_legacy_batchedtensor(x)  # pyright: ignore
    )


def check_tangents(*tensors: Tensor) -> None:
    """Refuses forward-mode derivatives: the operator has none, and torch would take them for zero.

    Raises:
        ValueError: one of the tensors carries a tangent.
    """
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise ValueError(
            "attention: an input carries a forward-mode tangent (torch.func.jvp); gradients "
            "backward are allowed, or impl='reference'"
        )


def _folded(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> list[Any]:
    """Arguments with the mapped axis of their tensors folded into the batch."""
    folded = []
    for x, axis in zip(arguments, in_dims, strict=True):
        if isinstance(x, Tensor):
            x = x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
            x = x.flatten(0, 1)
        folded.append(x)
    return folded


def _mapped(operator: Any) -> Any:
    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        results = operator(*_folded(info, in_dims, *arguments))
        axes = (0,) * len(results)
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), axes

    return rule


attention.register_vmap(_mapped(attention))
attention_backward.register_vmap(_mapped(attention_backward))
