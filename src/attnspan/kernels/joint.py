"""One softmax over all parts of a view, with the scores in memory: for few queries, and for H2O.

The arithmetic is that of the definition, in float32 for 16-bit input, rounded once at the end. The
attention that each key
received comes out as a by-product, so heavy hitters cost no second pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnspan.kernels.view import Part


def joint(
    parts: Sequence[Part],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_scores: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None, list[Tensor] | None]:
    """Attention of the same queries over disjoint parts of the keys.

    Every query must see a key, unless `return_lse` is set: one that sees none then gives zeros and
    minus infinity.

    Returns:
        `out (batch, num_heads, m, head_dim)` in the dtype of the queries; with `return_lse` in
        float32 or float64, with its log-sum-exp `(batch, num_heads, m)`; and with `return_scores`,
        for each part, the attention that its keys received, summed over the queries and the query
        heads of a KV head, float32 `(batch, num_kv_heads, n)`.
    """
    query = parts[0].query
    batch, heads, m, head_dim = query.shape
    kv_heads = parts[0].key.shape[1]
    packed = (batch, kv_heads, heads // kv_heads * m, head_dim)  # K is read once for its group
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = []
    for part in parts:
        x = torch.matmul(part.query.to(wide).reshape(packed), part.key.to(wide).mT) * scale
        if softcap is not None:
            x = softcap * torch.tanh(x / softcap)
        if part.mask is not None:
            x = (x.unflatten(2, (-1, m)) + part.mask.to(wide)).flatten(2, 3)
        logits.append(x)
    if sink_logits is not None:
        sink = sink_logits.to(wide).view(1, kv_heads, -1, 1, 1)
        logits.append(sink.expand(batch, -1, -1, m, 1).flatten(2, 3))
    x, lse = torch.cat(logits, -1) if len(logits) > 1 else logits[0], None
    if return_lse:
        lse = torch.logsumexp(x, -1, keepdim=True)
        weights = torch.exp(x - lse.masked_fill(lse == -torch.inf, 0))
        lse = lse.view(batch, heads, m)
    else:
        weights = torch.softmax(x, dim=-1)
    out, scores, start = None, [], 0
    for part in parts:
        n = part.key.shape[2]
        weight = weights.narrow(-1, start, n)
        if return_scores:
            scores.append(weight.sum(2, dtype=torch.float32))
        term = torch.matmul(weight, part.value.to(wide))
        out = term if out is None else out + term
        start += n
    assert out is not None, "a view has at least one part"
    out = out.view(batch, heads, m, head_dim)
    return out if return_lse else out.to(query.dtype), lse, scores if return_scores else None
