"""The front door for caches: attention over what they hold, and what goes into them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnspan.kernels import gpu_append, gpu_decode, native
from attnspan.kernels import sdpa as fused
from attnspan.kernels.joint import joint
from attnspan.kernels.merge import merge
from attnspan.kernels.view import KVView, Part, RawPart

# Up to so many scores in one head, a plain softmax over them beats a fused kernel for each part
# and their merge.
FEW = 4096
# Up to so many queries of a KV head, the kernels for decoding beat those for prefill.
FEW_QUERIES = 64


def reads_stored(query: Tensor, kv_heads: int) -> bool:
    """Whether `attend` takes a `RawPart` for these queries: keys and values as they are stored."""
    rows = query.shape[1] // kv_heads * query.shape[2]
    if rows > FEW_QUERIES:
        return False
    if query.device.type == "cpu":
        return not native.lacks(query, query, query)
    some = query[:, :kv_heads]
    return not gpu_decode.lacks(query, some, some)


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fields: dict[str, Tensor],
    slot: Tensor,
    angles: tuple[Tensor, Tensor],
) -> Tensor | None:
    """One token turned, encoded and written to where a cache holds it, in one launch.

    Args:
        q: `(batch, num_heads, 1, head_dim)`, un-rotated.
        k: `(batch, num_kv_heads, 1, head_dim)`, un-rotated.
        v: as `k`.
        fields: of a dense or an int8 storage, `(batch, num_kv_heads, slots, width)` each; written.
        slot: int64 `(1,)` on the device: which slot they go to.
        angles: cos and sin of the halves, `(1, head_dim)`, as `Rope.spread` gives them.

    Returns:
        The queries, turned; None where no kernel does this, and then nothing is written.
    """
    if gpu_append.lacks(q, fields, angles):
        return None
    return gpu_append.append(q, k, v, fields, slot, *angles)


def _is_small(view: KVView) -> bool:
    return all(
        isinstance(part, Part) and part.query.shape[2] * part.key.shape[2] <= FEW
        for part in view.parts
    )


def _key(part: Part | RawPart) -> Tensor:
    return part.key if isinstance(part, Part) else part.stored.fields["key"]


def _kv_heads(part: Part | RawPart) -> int:
    return _key(part).shape[1]


def _masked(part: Part | RawPart) -> Part | RawPart:
    """A part whose length is a mask; all rows of a batch are as long."""
    if part.length is None:
        return part
    there = torch.arange(_key(part).shape[2], device=part.query.device) < part.length[:1]
    mask = torch.where(there, 0.0, -torch.inf).to(part.query.dtype).expand(part.query.shape[2], -1)
    return replace(part, mask=mask if part.mask is None else mask + part.mask, length=None)


def attend(
    view: KVView,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_scores: bool = False,
    counters: Tensor | None = None,
) -> tuple[Tensor, list[Tensor] | None]:
    """Attention over what a cache holds: one softmax over all parts of the view.

    Every query must see a key of every part. The arguments are those of `attention`; a view comes
    from a cache and isn't checked again.

    Args:
        return_scores: give, for each part, the attention that its keys received, summed over the
            queries and the query heads of a KV head, float32 `(batch, num_kv_heads, n)`.
        counters: int32 zeros on the device, at least `batch * num_kv_heads`, that are zeros again
            afterwards; with them a GPU needs a launch less. Attentions that may run at the same
            time need each its own, and so does each captured graph.

    Returns:
        `out (batch, num_heads, m, head_dim)` and the scores, or None.
    """
    out, _, scores = _attend(view, scale, softcap, sink_logits, return_scores, counters)
    return out, scores


def attend_share(
    view: KVView, *, scale: float | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over a share of the keys, in float32 at least: what merges with other shares.

    As `attend`, but a query may see no key of the view, and a part may have none. Where a kernel
    gives 16 bits, those are what is widened.

    Returns:
        `out (batch, num_heads, m, head_dim)` and its natural log-sum-exp `(batch, num_heads, m)`,
        both in float32, or float64 where the queries are. A query that sees no key gives zeros and
        minus infinity.
    """
    query, some = view.parts[0].query, [part for part in view.parts if _key(part).shape[2]]
    wide = torch.promote_types(query.dtype, torch.float32)
    if not some:
        out = torch.zeros_like(query, dtype=wide)
        return out, query.new_full(query.shape[:3], -torch.inf, dtype=wide)
    out, lse, _ = _attend(KVView(tuple(some)), scale, softcap, None, False, None, share=True)
    assert lse is not None
    return out.to(wide), lse.to(wide)


def _attend(
    view: KVView,
    scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    return_scores: bool,
    counters: Tensor | None,
    share: bool = False,
) -> tuple[Tensor, Tensor | None, list[Tensor] | None]:
    """Output, log-sum-exp (with `share`; else what comes by itself) and scores."""
    query = view.parts[0].query
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    stored = reads_stored(query, _kv_heads(view.parts[0]))
    if stored and query.device.type != "cpu":
        return gpu_decode.decode(view, scale, softcap, sink_logits, return_scores, counters)
    view = KVView(tuple(map(_masked, view.parts)))
    if stored:
        dtype = torch.float32 if share else None
        return native.decode(view, scale, softcap, sink_logits, return_scores, dtype)
    parts = [part for part in view.parts if isinstance(part, Part)]
    assert len(parts) == len(view.parts), "ask `reads_stored` before handing over a RawPart"
    # A few queries on a GPU: keys repeated for every query head would cost more than the scores.
    few = query.device.type != "cpu" and query.shape[2] <= FEW_QUERIES
    fusible = not (few or return_scores or fused.lacks(query, query, query, softcap))
    if not fusible or (len(view.parts) > 1 and _is_small(view)):
        return joint(
            parts,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
            return_scores=return_scores,
            return_lse=share,
        )
    results = [
        fused.partial(p.query, p.key, p.value, p.mask, scale, _blind(p.mask) if share else None)
        for p in parts
    ]
    outs, lses = [out for out, _ in results], [lse for _, lse in results]
    if sink_logits is not None:
        # A learned sink is a part of its own: one key of that score whose value is zero.
        lses.append(sink_logits.to(lses[0].dtype)[:, None].expand_as(lses[0]))
        outs.append(torch.zeros_like(outs[0]))
    if len(outs) == 1:
        return outs[0], lses[0], None
    wide = [out.float() for out in outs] if share and outs[0].itemsize < 4 else outs
    return *merge(wide, lses), None


def _blind(mask: Tensor | None) -> Tensor | None:
    """Which queries see no key of a part, bool `(m,)`."""
    return None if mask is None else (mask == -torch.inf).all(-1)
