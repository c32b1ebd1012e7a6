"""The oracle: attention as its definition says, in float64. Slow, quadratic memory, exact."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspan.patterns.algebra import Pattern


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Pattern | Tensor,
    *,
    q_offset: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    compute: torch.dtype = torch.float64,
    cast: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, by the definition, differentiable in every tensor.

    Args:
        q: `(batch, Hq, n, head_dim)`.
        k: `(batch, Hkv, m, head_dim)`, `Hq % Hkv == 0`; query head `h` reads KV head
            `h // (Hq // Hkv)`.
        v: `(batch, Hkv, m, value_dim)`.
        seen: a pattern, or a bool mask that is True where a query sees a key: `(n, m)` or
            `(1 or batch, 1 or Hq, n, m)`.
        q_offset: the position of the first query when the first key stands at 0; a mask is taken
            as it is.
        scale: factor of the scores; None is `head_dim ** -0.5`.
        softcap: scores become `softcap * tanh(score / softcap)`, after the scale (Gemma 2,
            https://arxiv.org/abs/2408.00118).
        sink_logits: `(Hq,)`, one more score per head, with a value of zero (gpt-oss).
        compute: the dtype of the arithmetic; another than float64 shows the error that the
            definition itself makes in it.
        cast: give `out` the dtype of `q`, and `lse` float32 unless `q` is float64; False leaves
            both in `compute`.

    Returns:
        `out (batch, Hq, n, value_dim)` and `lse (batch, Hq, n)`, the natural logarithm of the
        denominator, the sink logit included. A query that sees no key gives zeros and minus
        infinity (with a sink logit: that logit), and no gradient.
    """
    batch, q_heads, n, head_dim = q.shape
    kv_heads, m = k.shape[1], k.shape[2]
    groups = q_heads // kv_heads
    if isinstance(seen, Pattern):
        i = torch.arange(n, device=q.device)[:, None] + q_offset
        j = torch.arange(m, device=q.device)
        mask = seen.sees(i, j)
    else:
        mask = seen
    if mask.dim() == 4:
        mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, groups))

    wide_q, wide_k, wide_v = (x.to(compute) for x in (q, k, v))
    grouped = wide_q.reshape(batch, kv_heads, groups, n, head_dim)
    scores = torch.einsum("bhgnd,bhmd->bhgnm", grouped, wide_k)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    # The sink is one more column; without one it is minus infinity, so that no row is empty of
    # columns even when there are no keys.
    if sink_logits is None:
        sink = scores.new_full((1, kv_heads, groups, 1, 1), -torch.inf)
    else:
        sink = sink_logits.to(compute).reshape(1, kv_heads, groups, 1, 1)
    scores = torch.cat([scores, sink.expand(batch, -1, -1, n, 1)], dim=-1)

    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    dead = total == 0
    total = torch.where(dead, 1, total)
    out = torch.einsum("bhgnm,bhmd->bhgnd", weights[..., :m], wide_v) / total
    lse = torch.where(dead, -torch.inf, top + torch.log(total))
    out, lse = out.reshape(batch, q_heads, n, v.shape[-1]), lse.reshape(batch, q_heads, n)
    if not cast:
        return out, lse
    return out.to(q.dtype), lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
