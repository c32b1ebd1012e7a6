"""The fused kernels behind torch's `scaled_dot_product_attention`, called where they give the LSE.

On a CPU that is the flash kernel, which takes GQA; on CUDA the memory-efficient one, which takes a
mask and gives the log-sum-exp, with K and V repeated for GQA. A pattern becomes a dense mask unless
it is all seen, or causal from position 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attnspan.patterns.algebra import Pattern
from attnspan.patterns.library import Causal

_CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def lacks(q: Tensor, k: Tensor, v: Tensor, softcap: float | None = None) -> str | None:
    """What this implementation lacks for these inputs, as the end of a sentence; None: nothing."""
    if softcap is not None:
        return "it has no logit soft cap"
    if v.shape[-1] != q.shape[-1]:
        return f"it needs values as wide as keys, not {v.shape[-1]} beside {q.shape[-1]}"
    if q.device.type not in ("cpu", "cuda"):
        return f"it has no kernel with a log-sum-exp for {q.device.type} tensors"
    if q.dtype not in (_CPU_DTYPES if q.device.type == "cpu" else _CUDA_DTYPES):
        return f"it has no {str(q.dtype).removeprefix('torch.')} kernel on {q.device.type}"
    if q.device.type == "cuda" and q.shape[-1] * q.element_size() % 16:
        return f"on CUDA it needs a head_dim of whole 16 bytes, not {q.shape[-1]} of {q.dtype}"
    return None


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Pattern | Tensor,
    *,
    q_offset: int = 0,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp; arguments and results as in `kernels.reference`.

    Gradients reach q, k, v and the sink logits from both `out` and `lse`, once (no second
    derivative). Ask `lacks` first: what it names is not checked here.
    """
    n, m = q.shape[2], k.shape[2]
    causal, mask = False, None
    if isinstance(seen, Tensor):
        mask = seen
    elif n and m:
        first = np.array([q_offset])
        some, all_ = seen.spans(first, first + n - 1, m)
        if not some.sizes:
            k, v = k[:, :, :0], v[:, :, :0]
        elif isinstance(seen, Causal) and q_offset == 0:
            causal = True
        elif all_.sizes < m:
            # Positions in 32 bits halve the time that the mask takes.
            small = abs(q_offset) + n + m < 2**31
            dtype = torch.int32 if small else torch.int64
            i = torch.arange(q_offset, q_offset + n, dtype=dtype, device=q.device)
            mask = seen.sees(i[:, None], torch.arange(m, dtype=dtype, device=q.device))
    bias = blind = None
    if mask is not None and n and m:
        bias, blind = _bias(mask, q.dtype), mask.view(torch.uint8).amax(-1) == 0
        if q.device.type == "cpu" and not blind.any():
            blind = None
    # The CPU kernel reads wrong values, in silence, where the last dimension has a stride.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (q, k, v, sink_logits, bias, blind, causal, factor)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, sink_logits)
    ):
        return _Sdpa.apply(*arguments)
    return _forward(*arguments)


def partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    blind: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys and its log-sum-exp, without gradients.

    `bias` is additive, `(n, m)`, in the dtype of `q`. Queries that see no key must be marked by
    `blind`, bool `(n,)`: they give zeros and minus infinity.
    """
    if bias is not None:
        if bias.device.type != "cpu" and bias.stride(0) * bias.element_size() % 16:
            bias = F.pad(bias, (0, -bias.shape[1] % 8))[:, : bias.shape[1]]
        bias = bias.expand(1, 1, *bias.shape)
    if q.shape[2] > 1 or q.shape[1] == k.shape[1]:
        return _forward(q, k, v, None, bias, blind, False, scale)
    # The query heads of a KV head stand as its queries, so that K and V are read once for them.
    packed = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
    out, lse = _forward(packed, k, v, None, bias, blind, False, scale)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


class _Sdpa(torch.autograd.Function):
    """Backward from the global `out` and `lse`, sink logits included.

    With P = exp(score - lse), the gradient of a score is P * (dout . v - dout . out + dlse). The
    fused backward computes that without dlse; one more channel, of ones in v, dlse in dout and
    zeros in out, q and k, adds it.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, sink_logits, bias, _, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, sink_logits, bias, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: the decorator hides names
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Any, ...]:
        grad_out, grad_lse = grad_outputs
        q, k, v, sink_logits, bias, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        # A query that sees nothing has a lse of minus infinity, and exp(-inf - -inf) is NaN; with
        # any finite lse its P is zero.
        lse = torch.where(lse == -torch.inf, 0, lse)
        grad_sink = None
        if sink_logits is not None and ctx.needs_input_grad[3]:
            share = torch.exp(sink_logits.to(lse.dtype)[:, None] - lse)
            pull = -(grad_out.to(lse.dtype) * out).sum(-1)
            pull = pull if grad_lse is None else pull + grad_lse
            grad_sink = (share * pull).sum((0, 2)).to(sink_logits.dtype)
        if grad_lse is None:
            grads = _backward(grad_out, q, k, v, bias, out, lse, ctx.causal, ctx.scale)
        else:
            head_dim, extra = q.shape[-1], (0, 8)  # 8 channels keep 16 bytes whole on CUDA
            wide_grad, wide_v = F.pad(grad_out, extra), F.pad(v, extra)
            wide_grad[..., head_dim], wide_v[..., head_dim] = grad_lse, 1
            padded = F.pad(q, extra), F.pad(k, extra), wide_v, bias, F.pad(out, extra)
            grads = _backward(wide_grad, *padded, lse, ctx.causal, ctx.scale)
            grads = tuple(grad[..., :head_dim] for grad in grads)
        return *grads, grad_sink, None, None, None, None


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, minus infinity elsewhere."""
    if mask.device.type == "cpu":
        bias = torch.where(mask, 0.0, -torch.inf)
        return bias if bias.dtype == dtype else bias.to(dtype)
    # CUDA's kernel wants rows that start at whole 16 bytes.
    rows = mask.new_full((*mask.shape[:-1], -(-mask.shape[-1] // 8) * 8), -torch.inf, dtype=dtype)
    return rows[..., : mask.shape[-1]].masked_fill_(mask, 0)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    bias: Tensor | None,
    blind: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if not q.numel() or not k.shape[2]:
        # The CPU kernel divides by zero here, and takes the process with it.
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    elif q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    else:
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, *_repeated(q, k, v), _expanded(bias, q, k), True, 0.0, causal, scale=scale
        )
        lse = lse[:, :, : q.shape[2]]
    if blind is not None:
        out, lse = out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, -torch.inf)
    if sink_logits is not None:
        total = torch.logaddexp(lse, sink_logits.to(lse.dtype)[:, None])
        # The clamp keeps minus infinity less minus infinity from being NaN.
        share = torch.exp(lse - total.clamp_min(torch.finfo(lse.dtype).min))
        out, lse = (out * share[..., None]).to(q.dtype), total
    return out, lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    if not q.numel() or not k.shape[2]:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    grad_q, grad_k, grad_v, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad_out,
        q,
        *_repeated(q, k, v),
        _expanded(bias, q, k),
        # The kernel takes it for granted that heads lie within rows here, whatever the strides say.
        out.transpose(1, 2).contiguous().transpose(1, 2),
        # The kernel reads whole groups of 32 rows; infinity gives the rows past the end no weight.
        F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf),
        seed,
        seed,
        0.0,
        [True, True, True, False],
        causal,
        scale=scale,
    )
    groups = k.shape[1], q.shape[1] // k.shape[1]
    return grad_q, grad_k.unflatten(1, groups).sum(2), grad_v.unflatten(1, groups).sum(2)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def _expanded(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
