"""Partial results of one attention over disjoint sets of keys, merged into the whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint key sets, from the attention over each.

    Part `p` carries the weight `exp(lses[p] - lse)`, with `lse` the log-sum-exp of all `lses`; the
    sum runs in float32, or float64 where a part is. A part that saw no key (minus infinity) leaves
    the others unchanged to the bit, and its `out` isn't read. A learned sink logit belongs to
    exactly one part. Differentiable in all arguments. The identity is that of FlashAttention
    (https://arxiv.org/abs/2205.14135, section 3.1).

    Args:
        outs: tensors `(..., value_dim)` of one shape and dtype.
        lses: for each, the natural log-sum-exp of its scores, `(...)`.

    Returns:
        `out (..., value_dim)` in the dtype of `outs`, and `lse (...)` in float32 or float64. Where
        no part saw a key, zeros and minus infinity.

    Raises:
        ValueError: no parts, not one `lse` for each `out`, or shapes that differ.

    >>> outs = [torch.tensor([[1.0]]), torch.tensor([[3.0]])]
    >>> out, lse = merge(outs, [torch.tensor([0.0]), torch.tensor([0.0])])
    >>> out.item(), round(lse.exp().item(), 4)
    (2.0, 2.0)
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"merge: {len(outs)} outs and {len(lses)} lses; one lse for each of at least one out "
            "is allowed"
        )
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"merge: an out of shape {tuple(out.shape)} with an lse of shape "
                f"{tuple(lse.shape)}; all outs (..., value_dim) of one shape, here "
                f"{tuple(outs[0].shape)}, each with an lse (...) are allowed"
            )
    wide = torch.float64 if torch.float64 in {x.dtype for x in (*outs, *lses)} else torch.float32
    stacked = torch.stack([lse.to(wide) for lse in lses])
    empty = stacked == -torch.inf
    top = stacked.detach().amax(0)
    top = torch.where(top == -torch.inf, 0, top)
    weights = torch.exp(stacked - top)
    total = weights.sum(0)
    dead = empty.all(0)
    total = torch.where(dead, 1, total)
    merged = torch.zeros_like(outs[0], dtype=wide)
    for part, weight, skip in zip(outs, weights, empty, strict=True):
        # 0 * NaN is NaN: what stands in an empty part must not come in.
        seen = torch.where(skip[..., None], 0, part.to(wide))
        merged = merged + (weight / total)[..., None] * seen
    lse = torch.where(dead, -torch.inf, top + torch.log(total))
    return merged.to(outs[0].dtype), lse


def with_sink(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Takes in one more key per head whose score is learned and whose value is zero.

    Args:
        out: `(batch, heads, n, value_dim)`.
        lse: its log-sum-exp `(batch, heads, n)`.
        sink_logits: `(heads,)`.

    Differentiable in all arguments; a query that saw no key keeps zeros, and gets the sink logit.
    """
    sink = sink_logits.to(lse.dtype)[:, None]
    top = torch.maximum(lse, sink).detach()
    top = torch.where(top == -torch.inf, 0, top)
    rest = torch.exp(lse - top)
    total = rest + torch.exp(sink - top)
    dead = total == 0
    total = torch.where(dead, 1, total)
    share = (rest / total)[..., None]
    return (out * share).to(out.dtype), torch.where(dead, -torch.inf, top + torch.log(total))
