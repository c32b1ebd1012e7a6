"""`ring_attention`: one sequence over many processes, exactly what one process would compute."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial as partially
from typing import Any, Literal, overload

import torch
from torch import Tensor

from attnspan.kernels.merge import with_sink
from attnspan.patterns import Causal, Pattern
from attnspan.planner.ring import Choice, Heads
from attnspan.ring import flow
from attnspan.ring.choice import cheapest
from attnspan.ring.groups import transport_of
from attnspan.ring.layout import Contiguous, Layout
from attnspan.ring.measure import measured
from attnspan.ring.options import Options, agree, gradients_wanted, task_of
from attnspan.ring.transport import Transport, together
from attnspan.ring.ulysses import Members


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = ...,
    *,
    group: Any = ...,
    layout: Layout = ...,
    schedule: str = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sink_logits: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    impl: str = ...,
    wire: str | None = ...,
    deadline: float | None = ...,
    layer: int | None = ...,
) -> Tensor: ...
@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = ...,
    *,
    group: Any = ...,
    layout: Layout = ...,
    schedule: str = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sink_logits: Tensor | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
    wire: str | None = ...,
    deadline: float | None = ...,
    layer: int | None = ...,
) -> tuple[Tensor, Tensor]: ...
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = Causal(),
    *,
    group: Any = None,
    layout: Layout = Contiguous(),
    schedule: str = "auto",
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    wire: str | None = None,
    deadline: float | None = None,
    layer: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention of one sequence whose tokens lie over the processes of a group; differentiable.

    Every process calls it with its shard, and gets its shard of what `attention` gives for the
    whole. Which keys go where follows from the pattern: of a window, the tokens before a shard's
    edge; nothing that no query sees. Before anything is exchanged the processes compare what they
    were called with. Call `backward` on every process as well; gradients of gradients are refused.

    Args:
        q: `(batch, Hq, n / N, head_dim)`, the process's shard of n tokens over N processes;
            float64, float32, bfloat16 or float16. Or q, k and v are DTensors of the whole, of the
            placement `Shard(2)` on a mesh of one dimension, which is then the group; so are the
            results.
        k: `(batch, Hkv, n / N, head_dim)`, `Hq % Hkv == 0`.
        v: `(batch, Hkv, n / N, value_dim)`.
        pattern: of the whole sequence.
        group: a `torch.distributed` process group, a one-dimensional `DeviceMesh`, or None, which
            is the default group.
        layout: which tokens a process holds: `Contiguous()`, `ZigZag()` (equal work under causal
            patterns) or `Striped()`. `layout.shard(x, dim, rank, size)` cuts a tensor.
        schedule: "ring" (rounds of about a shard, the next one under way while one is computed),
            "allgather" (all that is needed at once), "ulysses" (all-to-all over heads, whole
            sequences), "RxU" such as "2x4" (Ulysses among U neighbours, a ring over R), or "auto".
        scale: factor of the scores; None is `head_dim ** -0.5`.
        softcap: as in `attention`.
        sink_logits: `(Hq,)`, the same on all processes; as in `attention`. Their gradients are
            those of what a process computes: they add up to the whole's.
        return_lse: give the log-sum-exp as well.
        impl: what computes each part: "auto", "reference", "native", "cpu", "hopper" or "triton".
        wire: None: keys and values travel as they are. "int8": as codes of 8 bits, made once at
            their source; approximate, as is then the result.
        deadline: seconds that a process waits for another before it takes it for lost; they hold
            for the group until others are given. None leaves them: 10 at first.
        layer: what errors name.

    Returns:
        `out (batch, Hq, n / N, value_dim)` in the dtype of `q`; with `return_lse` also
        `lse (batch, Hq, n / N)` in float32 (float64 for float64 input).

    Raises:
        ValueError: as in `attention`; a sequence that doesn't divide; a layout that doesn't suit
            the pattern; heads that Ulysses can't deal out.
        RingMismatch: processes that call with different arguments; on all of them.
        RingPeerLost: a process that died, hangs or left.

    A ring of one process is `attention`; among threads, `ring.simulated.simulate` shows the rest:

    >>> from attnspan.ring.layout import ZigZag
    >>> from attnspan.ring.simulated import simulate
    >>> whole, layout = torch.randn(3, 1, 2, 8, 4), ZigZag()
    >>> def work(t):
    ...     q, k, v = layout.shard(whole, 3, t.rank, t.size)
    ...     return ring_attention(q, k, v, group=t, layout=layout)
    >>> from attnspan import attention
    >>> torch.allclose(layout.unshard(simulate(2, work), 2), attention(*whole), atol=1e-6)
    True
    """
    if torch.compiler.is_compiling():
        # Exchanges are the host's business: the call breaks the graph, and runs as it is.
        eager: Any = torch.compiler.disable(ring_attention)
        call = partially(eager, group=group, layout=layout, schedule=schedule, scale=scale)
        call = partially(call, softcap=softcap, sink_logits=sink_logits, return_lse=return_lse)
        call = partially(call, impl=impl, wire=wire, deadline=deadline, layer=layer)
        return call(q, k, v, pattern)
    if any(map(_is_dtensor, (q, k, v))):
        from attnspan.ring.dtensor import of_dtensors

        call: Any = partially(ring_attention, pattern=pattern, layout=layout, schedule=schedule)
        call = partially(call, scale=scale, softcap=softcap, return_lse=return_lse, impl=impl)
        call = partially(call, wire=wire, deadline=deadline, layer=layer)
        return of_dtensors(call, q, k, v, sink_logits, group)
    transport = transport_of(group, deadline, getattr(q, "device", None))
    transport.layer = layer
    options = Options(pattern, layout, schedule, scale, softcap, return_lse, impl, wire)
    agree(q, k, v, sink_logits, transport, options)
    if options.schedule == "auto":
        with together(transport):
            chosen = _chosen(q, k, v, transport, options).schedule
        options = replace(options, schedule=chosen)
    out, lse = _Ring.apply(q, k, v, sink_logits, transport, options)  # type: ignore[misc]
    return (out, lse) if return_lse else out


def _is_dtensor(x: Any) -> bool:
    """Without loading what defines them."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(x, loaded.DTensor)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = Causal(),
    *,
    group: Any = None,
    layout: Layout = Contiguous(),
    wire: str | None = None,
    deadline: float | None = None,
) -> Choice:
    """Which schedule `ring_attention` takes by itself, and why: seconds of each, predicted.

    Collective, as `ring_attention`, whose arguments these are; raises as it. The seconds come from
    the planner's cost model with this group's link and rate, which are measured once. Where the
    tensors want gradients, they hold a backward too. Of DTensors it takes `to_local()`.
    """
    transport = transport_of(group, deadline, getattr(q, "device", None))
    options = Options(pattern, layout, "auto", None, None, False, "auto", wire)
    agree(q, k, v, None, transport, options, "ring.explain")
    return _chosen(q, k, v, transport, options)


def _chosen(q: Tensor, k: Tensor, v: Tensor, transport: Transport, options: Options) -> Choice:
    if transport.size == 1:
        return Choice("ring", "one process has nobody to send to", (("ring", 0.0),), ())
    n = q.shape[2] * transport.size
    dim = (q.shape[3] + v.shape[3]) // 2
    coded = options.wire is not None
    heads = Heads(q.shape[1], k.shape[1], dim, 1 if coded else q.dtype.itemsize)
    holdings = options.layout.chunks(n, transport.size)
    machine = measured(transport, q)
    wanted = gradients_wanted(q, k, v)
    among = ("ring", "allgather") if coded else None
    return cheapest(options.pattern, n, holdings, heads, machine, wanted, among)


class _Ring(torch.autograd.Function):
    """The exchange is planned, run and, for gradients, run again backwards."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink_logits: Tensor | None,
        transport: Transport,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        # Not around `apply`: where a checkpointed region ends, torch stops it by an exception.
        with together(transport):
            return _forward(ctx, q, k, v, sink_logits, transport, options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads_of_results: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        transport = ctx.ring.transport
        transport.layer = ctx.layer
        if transport.size > 1:
            # Autograd may have come to another call's gradients on another rank.
            facts = {"gradients": f"those of call {ctx.call}"}
            transport.agree(facts, "the backward of ring_attention")
        with together(transport):
            return _gradients(ctx, *grads_of_results)


def _forward(
    ctx: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    transport: Transport,
    options: Options,
) -> tuple[Tensor, Tensor]:
    scale = q.shape[3] ** -0.5 if options.scale is None else float(options.scale)
    ctx.sign = float((scale > 0) - (scale < 0))
    ctx.layer = transport.layer
    transport.calls += 1
    ctx.call = transport.calls
    planned = task_of(options, q.shape, k.shape, transport)
    ctx.members = None
    ctx.counts = q.shape[1], k.shape[1]
    if scale <= 0:  # which torch's kernels mask wrongly
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    if planned.members is not None:
        ctx.members = Members(transport, planned.members, planned.places)
        q, k, v = ctx.members.join((q, k, v), "heads and tokens")
    ring = flow.Task(
        transport,
        planned.ranks,
        planned.exchange,
        scale,
        options.softcap,
        options.impl,
        options.wire,
    )
    wide_out, lse = flow.forward(q, k, v, ring)
    sinks = sink_logits
    if sinks is not None:
        if ctx.members is not None:
            own = ctx.members.part(ctx.counts[0], ctx.members.ranks.index(transport.rank))
            sinks = sinks[own]
        wide_out, lse = with_sink(wide_out, lse, sinks)
    out = wide_out.to(q.dtype)
    del wide_out
    ctx.ring = ring
    ctx.save_for_backward(q, k, v, out, lse, sinks)
    ctx.set_materialize_grads(False)
    if ctx.members is None:
        return out, lse
    heads = ctx.counts[0]
    # Float32 first: what lies behind an odd number of 16-bit elements can't be read as such.
    given_lse, given_out = ctx.members.split((lse, out), (heads, heads), "results")
    return given_out, given_lse


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, sinks = ctx.saved_tensors
    ring, members = ctx.ring, ctx.members
    heads, kv_heads = ctx.counts
    if members is not None:
        # Which gradients come is a rank's own matter; those that don't travel as zeros.
        shape = q.shape[0], heads, len(members.places[0])
        full_out = q.new_zeros((*shape, v.shape[3])) if grad_out is None else grad_out
        full_lse = lse.new_zeros(shape) if grad_lse is None else grad_lse
        grad_lse, grad_out = members.join((full_lse, full_out), "gradients")
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = flow.backward(grad_out, grad_lse, q, k, v, out, lse, ring)
    grad_sinks = None
    if sinks is not None:
        pull = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        pull = pull if grad_lse is None else pull - grad_lse
        share = torch.exp(sinks.to(lse.dtype)[:, None] - lse).masked_fill(lse == -torch.inf, 0)
        grad_sinks = -(share * pull).sum((0, 2))
    if members is not None:
        grads = members.split(grads, (heads, kv_heads, kv_heads), "gradients")
        if grad_sinks is not None:
            whole = grad_sinks.new_zeros(heads)
            me = members.ranks.index(ring.transport.rank)
            whole[members.part(heads, me)] = grad_sinks
            grad_sinks = whole
    grad_q, grad_k, grad_v = (x.to(q.dtype) for x in grads)
    grad_q = grad_q if ctx.sign == 1 else grad_q * ctx.sign
    if sinks is not None and grad_sinks is not None:
        grad_sinks = grad_sinks.to(sinks.dtype)
    return grad_q, grad_k, grad_v, grad_sinks, None, None
