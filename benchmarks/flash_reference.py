"""FlashAttention's calls on a CPU, by the definition, for peers that are written against them.

Names, arguments and results are those of flash-attn 2.8 (`flash_attn/flash_attn_interface.py`), as
far as ring-flash-attn 0.1.8 uses them. Slow: it is here to run a peer's exchange, not its kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspan.kernels.reference import reference


def seen(n: int, m: int, causal: bool, left: int, right: int) -> Tensor:
    """Which keys n queries see of m, bool `(n, m)`: the last query stands at the last key.

    A query sees `left` keys before its own place and `right` after; -1: all.

    >>> seen(2, 4, True, 1, -1).int().tolist()
    [[0, 1, 1, 0], [0, 0, 1, 1]]
    """
    after = torch.arange(m) - torch.arange(n)[:, None] - (m - n)
    right = 0 if causal else right
    mask = torch.ones(n, m, dtype=torch.bool)
    if left >= 0:
        mask &= after >= -left
    if right >= 0:
        mask &= after <= right
    return mask


def block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp in float32; `(batch, heads, sequence, head_dim)`."""
    out, lse = reference(q, k, v, mask, scale=scale, cast=False)
    return out.to(q.dtype), lse.float()


def block_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, when `out` and `lse` are those over all blocks."""
    groups = q.shape[1] // k.shape[1]
    dout64, q64, k64, v64, out64 = (x.double() for x in (dout, q, k, v, out))
    k64, v64 = (x.repeat_interleave(groups, 1) for x in (k64, v64))
    scores = (q64 @ k64.mT * scale).masked_fill(~mask, -torch.inf)
    weights = torch.exp(scores - lse.double()[..., None])
    dweights = dout64 @ v64.mT - (dout64 * out64).sum(-1, keepdim=True)
    dscores = weights * dweights * scale
    dk, dv = dscores.mT @ q64, weights.mT @ dout64
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return (dscores @ k64).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Any,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, None]:
    mask = seen(q.shape[1], k.shape[1], causal, window_size_left, window_size_right)
    out, lse = block(*_heads_first(q, k, v), mask, softmax_scale)
    # A query without a key has plus infinity there (its `softmax.h`), where others have minus.
    return out.transpose(1, 2), lse.masked_fill(lse == -torch.inf, torch.inf), None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Any,
    deterministic: bool,
    rng_state: Any = None,
) -> None:
    mask = seen(q.shape[1], k.shape[1], causal, window_size_left, window_size_right)
    dout, q, k, v, out = _heads_first(dout, q, k, v, out)
    grads = block_backward(dout, q, k, v, out, softmax_lse, mask, softmax_scale)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad.transpose(1, 2))


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Any,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, None]:
    out, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
    for a, b in _pieces(cu_seqlens_q, cu_seqlens_k):
        part, part_lse, _, _ = _flash_attn_forward(
            q[None, a],
            k[None, b],
            v[None, b],
            dropout_p,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            alibi_slopes,
            return_softmax,
        )
        out[a], lse[:, a] = part[0], part_lse[0]
    return out, lse, None, None


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Any,
    deterministic: bool,
) -> None:
    for a, b in _pieces(cu_seqlens_q, cu_seqlens_k):
        _flash_attn_backward(
            dout[None, a],
            q[None, a],
            k[None, b],
            v[None, b],
            out[None, a],
            softmax_lse[None, :, a],
            dq[None, a],
            dk[None, b],
            dv[None, b],
            dropout_p,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            alibi_slopes,
            deterministic,
        )


def install() -> None:
    """Makes `import ring_flash_attn` work without flash-attn, which it would call on a GPU.

    Its adapter for Hugging Face is left out: it wants an older transformers, and isn't asked for.
    """
    here = sys.modules[__name__]
    interface = ModuleType("flash_attn.flash_attn_interface")
    for name in ("", "_varlen"):
        for way in ("forward", "backward"):
            call = f"_flash_attn{name}_{way}"
            setattr(interface, call, getattr(here, call))
    adapters: Any = ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules["flash_attn"] = ModuleType("flash_attn")
    sys.modules["flash_attn.flash_attn_interface"] = interface
    sys.modules["ring_flash_attn.adapters"] = adapters


def _heads_first(*given: Tensor) -> Iterator[Tensor]:
    return (x.transpose(1, 2) for x in given)


def _pieces(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    ranges = ([slice(*ends) for ends in pairwise(cu.tolist())] for cu in (cu_q, cu_k))
    return list(zip(*ranges, strict=True))
