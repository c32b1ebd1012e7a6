"""Attention over keys and values that lie on many processes, for queries that all of them have.

Each process attends to what it holds; one packed all-gather of outputs and their log-sum-exps then
merges the parts into the exact whole (tree decoding, https://arxiv.org/abs/2408.04093, with one hop
for the tree). A process sends `num_heads * (value_dim + 1) * 4 * (N - 1)` bytes for a query,
however many keys there are.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from attnspan.dispatch import check_options, check_tensors
from attnspan.kernels.merge import merge, with_sink
from attnspan.kernels.view import KVView, Part
from attnspan.patterns import Full, Pattern
from attnspan.ring.groups import transport_of
from attnspan.ring.transport import Transport, together
from attnspan.views import attend_share


def merge_shares(
    transport: Transport, out: Tensor, lse: Tensor, sink_logits: Tensor | None, step: str
) -> tuple[Tensor, Tensor]:
    """The attention over all ranks' keys, from what each found over its own.

    Args:
        transport: of the ring; every rank calls this with tensors of the same shapes.
        out: `(batch, num_heads, m, value_dim)`, float32 or float64.
        lse: its log-sum-exp `(batch, num_heads, m)`, minus infinity where a query saw no key here.
        sink_logits: `(num_heads,)`, one more score per head with a value of zero, counted once.
        step: what this is, for errors.

    Returns:
        The merged `out` and `lse`, the same bits on every rank.
    """
    if transport.size > 1:
        parts = transport.gather(torch.cat((out, lse[..., None]), -1), step)
        out, lse = merge(parts[..., :-1].unbind(), parts[..., -1].unbind())
    return (out, lse) if sink_logits is None else with_sink(out, lse, sink_logits)


def ring_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | None = None,
    *,
    group: Any = None,
    positions: Tensor | None = None,
    q_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    agreed: bool = False,
    deadline: float | None = None,
    layer: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of a few queries over keys and values that are spread over a ring.

    Every process of the ring calls it, with the same queries and its own keys and values: as many
    as it happens to hold, or none, each key on one rank alone. It has no gradient.

    Args:
        q: `(batch, Hq, m, head_dim)`, the same on all ranks, rotated already.
        k: `(batch, Hkv, n, head_dim)`, this rank's share; `Hq % Hkv == 0`. `n` may differ.
        v: as `k`.
        pattern: which pairs of positions see each other; None: every query sees every key.
        group: the ring: None for the default group, a ProcessGroup, a DeviceMesh of one dimension
            or a `Transport`.
        positions: with a pattern, int64 `(n,)`: where this rank's keys stand in the sequence.
        q_offset: with a pattern, where the first query stands; the others follow it.
        scale: factor of the scores; None is `head_dim ** -0.5`.
        softcap: scores become `softcap * tanh(score / softcap)`, after the scale.
        sink_logits: `(Hq,)`, one more score per head with a value of zero; the same on all ranks.
        return_lse: give the log-sum-exp too.
        agreed: the caller has made sure that all ranks bring the same queries and settings, say
            once for all layers of a token. Otherwise this costs one more small exchange, which
            brings the queries' checksum to the host.
        deadline: seconds that a process waits for another before it takes it for lost.
        layer: named in errors.

    Returns:
        `out (batch, Hq, m, head_dim)` in the dtype of `q`, the same bits on every rank; with
        `return_lse` also `lse (batch, Hq, m)`, float32 or float64. A query that sees no key on any
        rank gives zeros and minus infinity (with a sink logit: that logit).

    Raises:
        ValueError, TypeError: the arguments are wrong; one sentence says how.
        RingMismatch: the ranks' arguments differ, or are wrong on some; on every rank alike, before
            the exchange.
        RingPeerLost: a process is gone or hangs.

    >>> q, k = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 3, 4)
    >>> from attnspan.ring.simulated import simulate
    >>> simulate(2, lambda ring: ring_decode(q, k, k * ring.rank, group=ring)[0, 0, 0, 0].item())
    [0.5, 0.5]
    """
    transport = transport_of(group, deadline, q.device if isinstance(q, Tensor) else None)
    transport.layer = layer
    refused: ValueError | TypeError | None = None
    try:
        check_tensors(q, k, v, sink_logits, "ring_decode")
        check_options(
            Full() if pattern is None else pattern, scale, softcap, q_offset or 0, by="ring_decode"
        )
        _check(q, k, v, pattern, positions, q_offset)
    except (ValueError, TypeError) as error:
        refused = error
    if not agreed:
        facts = {
            # What is wrong here alone is told to all, so that none is left waiting.
            "arguments": f"that it refuses ({refused})" if refused else "that are allowed",
            "q": digest(q),
            "pattern": repr(pattern),
            "q_offset": repr(q_offset),
            "scale": repr(scale),
            "softcap": repr(softcap),
            "sink_logits": digest(sink_logits),
        }
        transport.agree(facts, "ring_decode")
    if refused is not None:
        raise refused
    with together(transport), torch.no_grad():
        mask = None
        if pattern is not None and positions is not None and q_offset is not None:
            at = torch.arange(q_offset, q_offset + q.shape[2], device=q.device)
            seen = pattern.sees(at[:, None], positions.to(q.device))
            mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
            mask.masked_fill_(~seen, -torch.inf)
        out, lse = attend_share(KVView((Part(q, k, v, mask),)), scale=scale, softcap=softcap)
        out, lse = merge_shares(transport, out, lse, sink_logits, "merge of shares")
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, pattern: Any, positions: Any, q_offset: Any) -> None:
    """What `ring_decode` asks for beyond `attention`."""
    if v.shape != k.shape:
        raise ValueError(
            f"ring_decode: k is {tuple(k.shape)} and v {tuple(v.shape)}; one shape is allowed"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "ring_decode: a gradient is required, and it has none; under torch.no_grad() it is "
            "allowed"
        )
    if (pattern is None) != (positions is None) or (pattern is None) != (q_offset is None):
        raise ValueError(
            "ring_decode: a pattern, positions of the keys and q_offset are allowed together or "
            "not at all"
        )
    if positions is not None and not (
        isinstance(positions, Tensor)
        and positions.shape == k.shape[2:3]
        and positions.dtype == torch.int64
    ):
        got = tuple(positions.shape) if isinstance(positions, Tensor) else repr(positions)
        raise ValueError(
            f"ring_decode: positions is {got}; an int64 tensor ({k.shape[2]},), one for each key, "
            "is allowed"
        )


def digest(x: Any) -> str:
    """A short text that differs where the values do: a tensor's shape, dtype and checksum."""
    if not isinstance(x, Tensor):
        return repr(x)
    dtype = str(x.dtype).removeprefix("torch.")
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tuple(x.shape)} {dtype} {blake2b(data.tobytes(), digest_size=8).hexdigest()}"
