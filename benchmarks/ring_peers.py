"""What else spreads one sequence over processes, each called as its own documentation says.

`PEERS` gives for each a layout for every pattern and a closure from shards to a shard. What a peer
doesn't offer raises `Lacking`; what it refuses when called is its own error. Tensors are
`(batch, heads, sequence, head_dim)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flash_reference as flash
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

from attnspan import Contiguous, Striped, ZigZag, ring_attention
from attnspan.patterns import Causal, Documents, Pattern, Sinks, SlidingWindow
from attnspan.ring import Layout

WINDOW, SINKS = 96, 4
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Lacking(Exception):
    """The peer has no such thing; the message says so."""


@dataclass(frozen=True)
class Peer:
    """One way to call one library.

    Attributes:
        name: as the tables call it.
        over: what computes the blocks; "its own" unless that needs a GPU.
        dtypes: what it takes.
        prepared: for a pattern the layout of the shards and what attends, on this rank.
    """

    name: str
    over: str
    dtypes: tuple[torch.dtype, ...]
    prepared: Callable[[Pattern, int], tuple[Layout, Attend]]


def patterns(n: int) -> dict[str, Pattern]:
    """What all are asked for: n tokens, documents whose edges are no rank's."""
    return {
        "causal": Causal(),
        "window": SlidingWindow(WINDOW),
        "window + sinks": SlidingWindow(WINDOW) | Sinks(SINKS),
        "documents": Documents((n // 8 + 3, n // 2 - 1, n - n // 8 - n // 2 - 2)),
    }


def ours(pattern: Pattern, n: int) -> tuple[Layout, Attend]:
    windowed = not isinstance(pattern, Causal | Documents)
    layout = Contiguous() if windowed else ZigZag()
    return layout, lambda q, k, v: ring_attention(q, k, v, pattern, layout=layout, schedule="ring")


def torch_sdpa(pattern: Pattern, n: int) -> tuple[Layout, Attend]:
    """https://docs.pytorch.org/tutorials/unstable/context_parallel.html"""
    from torch.distributed.tensor.experimental import context_parallel

    if not isinstance(pattern, Causal):
        raise Lacking("SDPA has no such argument, and its handlers take no mask")
    mesh = _mesh()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        # In a model the buffers are its inputs; shards of what it makes of them come to SDPA.
        places = torch.arange(n)
        with context_parallel(mesh, buffers=[places], buffer_seq_dims=[0]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return ZigZag(), attend


def torch_flex(pattern: Pattern, n: int) -> tuple[Layout, Attend]:
    """The same with FlexAttention, through the parallel style that the tutorial uses for it.

    Masks are built by torch's own function uncompiled: compiled it takes half a minute a mask.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp
    from torch.distributed.tensor.parallel import parallelize_module
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Any:
            return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)

    cp._compiled_create_block_mask = create_block_mask
    mesh = _mesh()
    style = cp._ContextParallel(seq_dim=2, attention_type=cp._ContextParallel.AttentionType.FLEX)
    module = parallelize_module(Attention(), mesh, style)
    places = torch.arange(n)
    table = torch.as_tensor(pattern.sees(places[:, None], places))
    mask = create_block_mask(lambda b, h, i, j: table[i, j], 1, 1, n, n, device="cpu")
    (mask,) = cp._context_parallel_shard(mesh, (mask,), (2,))
    return Contiguous(), lambda q, k, v: module(q, k, v, block_mask=mask)


def torch_ring(pattern: Pattern, n: int) -> tuple[Layout, Attend]:
    """What `context_parallel` runs under SDPA on a GPU: its ring, by torch's private functions."""
    if not isinstance(pattern, Causal):
        raise Lacking("it takes causal or no mask")
    return ZigZag(), lambda q, k, v: _TorchRing.apply(q, k, v)  # type: ignore[return-value]


class _TorchRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.distributed.tensor.experimental._context_parallel import _attention as cp

        def op(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
            mask = flash.seen(q.shape[2], k.shape[2], is_causal, -1, -1)
            return flash.block(q, k, v, mask, q.shape[3] ** -0.5)

        cp._cp_options.enable_load_balance = True
        out, lse = cp._templated_ring_attention(_world(), 2, op, q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from torch.distributed.tensor.experimental._context_parallel import _attention as cp

        def op(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            out: Tensor,
            logsumexp: Tensor,
            is_causal: bool,
            grad_out: Tensor,
        ) -> tuple[Tensor, Tensor, Tensor]:
            mask = flash.seen(query.shape[2], key.shape[2], is_causal, -1, -1)
            scale = query.shape[3] ** -0.5
            return flash.block_backward(grad_out, query, key, value, out, logsumexp, mask, scale)

        cp._cp_options.enable_load_balance = True
        return cp._templated_ring_attention_backward(
            _world(), 2, op, grads[0], "grad_out", *ctx.saved_tensors, is_causal=True
        )[:3]


def _ring_flash(name: str, layout: Layout) -> Callable[[Pattern, int], tuple[Layout, Attend]]:
    """One of ring-flash-attn's functions for batches; it takes FlashAttention's `window_size`."""

    def prepared(pattern: Pattern, n: int) -> tuple[Layout, Attend]:
        window = _window_size(pattern)
        if isinstance(pattern, Documents):
            raise Lacking("documents are for its varlen functions")
        call = getattr(_ring_flash_attn(), name)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
            return call(q, k, v, causal=True, window_size=window).transpose(1, 2)

        return layout, attend

    return prepared


def ring_flash_llama3(pattern: Pattern, n: int) -> tuple[Layout, Attend]:
    """Its all-gather of a KV head at a time, which its README recommends for documents."""
    window = _window_size(pattern)
    lengths = pattern.lengths if isinstance(pattern, Documents) else (n,)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    peer = _ring_flash_attn()
    given = peer.llama3_flash_attn_prepare_cu_seqlens(
        ends, causal=True, rank=dist.get_rank(), world_size=dist.get_world_size()
    )
    *sizes, local = given

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        out = peer.llama3_flash_attn_varlen_func(
            q, k, v, *sizes, 1, local, causal=True, window_size=window
        )
        return out.transpose(0, 1)[None]

    return Contiguous(), attend


def _window_size(pattern: Pattern) -> tuple[int, int]:
    if isinstance(pattern, Causal | Documents):
        return -1, -1
    if isinstance(pattern, SlidingWindow):
        return pattern.window - 1, 0
    raise Lacking("it has no sinks")


def _ring_flash_attn() -> Any:
    flash.install()
    try:
        import ring_flash_attn
    except ModuleNotFoundError as error:
        raise Lacking("not installed: pip install --no-deps ring-flash-attn==0.1.8") from error
    return ring_flash_attn


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


OWN, REFERENCE = "its own", "our reference"
ALL = torch.bfloat16, torch.float32
# As FlashAttention's; float32 would also make its buffers for gradients alias each other.
HALF = (torch.bfloat16,)
PEERS = (
    Peer("attnspan", OWN, ALL, ours),
    Peer("torch context_parallel, SDPA", OWN, ALL, torch_sdpa),
    Peer("torch context_parallel, FlexAttention", OWN, ALL, torch_flex),
    Peer("torch context_parallel, its ring", REFERENCE, ALL, torch_ring),
    Peer(
        "ring-flash-attn, ring", REFERENCE, HALF, _ring_flash("ring_flash_attn_func", Contiguous())
    ),
    Peer(
        "ring-flash-attn, zigzag",
        REFERENCE,
        HALF,
        _ring_flash("zigzag_ring_flash_attn_func", ZigZag()),
    ),
    Peer(
        "ring-flash-attn, stripe", REFERENCE, HALF, _ring_flash("stripe_flash_attn_func", Striped())
    ),
    Peer("ring-flash-attn, llama3", REFERENCE, HALF, ring_flash_llama3),
)
