"""What each process of a ring runs in the tests of models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from tiny import tiny, tiny_llama
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from attnspan import attach, attention
from attnspan.models import ringed
from attnspan.patterns import Causal, SlidingWindow
from attnspan.ring import Ring, ring_attention
from attnspan.ring.layout import ZigZag
from attnspan.ring.transport import RingPeerLost

Answer = tuple[Tensor, Tensor | None, dict[str, Tensor]]
"""Logits of a shard, the loss, and gradients."""


def checkpointed(model: Any) -> None:
    """The model's layers run again for their gradients."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()


def step(model: Any, inputs: dict[str, Any]) -> Answer:
    output = model(**inputs)
    if output.loss is None:
        return output.logits.detach(), None, {}
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), output.loss.detach(), grads


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32)


def alone(family: str, inputs: dict[str, Any], pattern: Any = None, **changes: Any) -> Answer:
    """What one process gives."""
    model = tiny(family, **changes).train()
    if pattern is None:
        return step(model, inputs)
    with attach(model, pattern):
        return step(model, inputs)


def in_ring(
    rank: int,
    size: int,
    family: str,
    layout: Any,
    inputs: dict[str, Any],
    pattern: Any = None,
    changes: dict[str, Any] | None = None,
    again: bool = False,
    wrong: str = "",
    dtype: torch.dtype = torch.float32,
) -> Answer:
    """On a ring of all processes; `again`: with activation checkpoints; `dtype`: of autocast."""
    model, group = tiny(family, **(changes or {})).train(), dist.group.WORLD
    if again:
        checkpointed(model)
    ring = group if layout is None else Ring(group, layout)
    with broken(wrong), attach(model, pattern, ring=ring), autocast(dtype):
        return step(model, inputs)


@contextmanager
def broken(what: str) -> Iterator[None]:
    """For the block's length, one mistake that the tests must see."""
    right_shard, right_backward = ringed._Run._shard, ringed._WholeLoss.backward

    def shifted_late(self: Any, whole: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        local = right_shard(self, whole, kwargs)
        labels = self.ring.layout.shard(
            kwargs["labels"], 1, self.transport.rank, self.transport.size
        )
        local["shift_labels"] = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        return local

    def counted_from_zero(self: Any, whole: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        local = right_shard(self, whole, kwargs)
        local["position_ids"] = torch.arange(local["position_ids"].shape[1])[None]
        return local

    def unscaled(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return right_backward(ctx, *grads)[0] / ctx.size, None

    mistakes: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "labels shifted after sharding": (ringed._Run, "_shard", shifted_late),
        "positions of the shard": (ringed._Run, "_shard", counted_from_zero),
        "gradients unscaled": (ringed._WholeLoss, "backward", staticmethod(unscaled)),
    }
    if not what:
        yield
        return
    with patch.object(*mistakes[what]):
        yield


def sharded(
    rank: int, size: int, family: str, over: str, inputs: dict[str, Any], again: bool
) -> Answer:
    """Rings of two; the rows of the batch lie over the other dimension, the weights over `over`."""
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("rows", "ring"))
    weights = {
        "all processes": init_device_mesh("cpu", (size,)),
        # Hybrid: copies over the first dimension, cut over the second.
        "both dimensions": mesh,
        "rows": mesh["rows"],
        "ring": mesh["ring"],
    }[over]
    model = tiny(family, num_hidden_layers=2).train()
    if again:
        checkpointed(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=weights)
    fully_shard(model, mesh=weights)
    row = mesh.get_local_rank("rows")
    mine = {name: x[row : row + 1] for name, x in inputs.items()}
    with attach(model, ring=mesh["ring"]):
        logits, loss, grads = step(model, mine)
    return logits, loss, {name: grad.full_tensor() for name, grad in grads.items()}  # type: ignore[attr-defined]


def refusals(rank: int, size: int, calls: list[dict[str, Any]]) -> list[str]:
    """The sentence that each call is refused with; then one that is taken."""
    model, said = tiny_llama(), []
    with attach(model, ring=dist.group.WORLD):
        for call in calls:
            # "on 1" is what rank 1 alone calls with.
            mine = {**call, **call.get("on 1", {})} if rank else dict(call)
            mine.pop("on 1", None)
            said.append(raised(lambda mine=mine: model(**mine)))
        model(input_ids=torch.arange(8)[None])
    return said


def killed(rank: int, size: int, layer: int, when: str) -> dict[str, Any]:
    """The last rank ends itself in a layer's forward or backward; what the others hear."""
    model = tiny("llama").train()

    class Ending(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if when == "forward":
                os._exit(9)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]
            os._exit(9)

    def attend(q: Tensor, *args: Any, **options: Any) -> Tensor:
        if rank == size - 1 and options["layer"] == layer:
            q = Ending.apply(q)  # type: ignore[assignment]
        out = ring_attention(q, *args, **options)
        if rank == size - 1 and options["layer"] == layer:
            out = Ending.apply(out)  # type: ignore[assignment]
        return out

    ring = Ring(dist.group.WORLD, ZigZag(), deadline=3.0)
    with patch.object(ringed, "ring_attention", attend), attach(model, ring=ring):
        try:
            ids = torch.arange(16)[None]
            step(model, {"input_ids": ids, "labels": ids})
        except RingPeerLost as lost:
            return {"ranks": lost.ranks, "layer": lost.layer, "text": str(lost)}
    return {}


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused_attachments(rank: int, size: int) -> dict[str, str]:
    """What ranks that don't attach alike hear; "ignored" where none of it matters."""

    def entered(model: Any, *args: Any, **kwargs: Any) -> str:
        def enter() -> None:
            with attach(model, *args, **kwargs):
                pass

        return raised(enter)

    group = dist.group.WORLD
    dropping = tiny_llama(attention_dropout=0.1).train()

    def train() -> None:
        with attach(dropping, ring=group):
            dropping(input_ids=torch.arange(8)[None])

    return {
        "weights": entered(tiny_llama(seed=rank), ring=group),
        "patterns": entered(tiny_llama(), SlidingWindow(3 + rank), ring=group),
        "layers": entered(tiny_llama(), [Causal()] * (2 - rank), ring=group),
        "ring": entered(tiny_llama(), ring="all"),
        "dropout": raised(train),
    }


def of_dtensors(rank: int, size: int, window: int) -> dict[str, Any]:
    """Largest errors against one process, forward, log-sum-exp and gradients; and refusals."""
    mesh = init_device_mesh("cpu", (size,))
    pattern = SlidingWindow(window)
    torch.manual_seed(0)
    whole = [torch.randn(2, heads, 12, 8, requires_grad=True) for heads in (4, 2, 2)]
    cut = [distribute_tensor(x.detach(), mesh, (Shard(2),)).requires_grad_() for x in whole]
    expected = attention(*whole, pattern, return_lse=True)
    got = ring_attention(*cut, pattern, return_lse=True)
    for out, lse in (expected, got):
        (out.square().sum() + lse.sum()).backward()
    pairs = [*zip(got, expected, strict=True)]
    pairs += [(a.grad, b.grad) for a, b in zip(cut, whole, strict=True)]
    q, k, v = cut
    odd = [distribute_tensor(x.detach()[:, :, 1:], mesh, (Shard(2),)) for x in whole]
    return {
        "placements": {str(x.placements) for x, _ in pairs},
        "errors": [float((x.full_tensor() - y).detach().abs().max()) for x, y in pairs],
        "heads": raised(lambda: ring_attention(q.redistribute(placements=(Shard(1),)), k, v)),
        "plain": raised(lambda: ring_attention(q, k, whole[2])),
        "odd": raised(lambda: ring_attention(*odd)),
        "group": raised(lambda: ring_attention(q, k, v, group=dist.new_group([0, 1]))),
    }


def undone(rank: int, size: int) -> bool:
    """After a block, and after an error in one, the model is as it was before."""
    model, ids = tiny_llama(), torch.arange(8)[None]
    before = model(input_ids=ids).logits

    def enter() -> None:
        with attach(model, ring=dist.group.WORLD):
            assert model(input_ids=ids).logits.shape[1] == 8 // size
            assert "in a ring the model that was attached is allowed" in raised(
                lambda: model.model(input_ids=ids)
            )
            assert "attached already" in raised(lambda: attach(model, Causal()).__enter__())
            raise KeyError("mine")

    assert raised(enter) == "KeyError: 'mine'"
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())
    return "_attnspan_pattern" not in model.__dict__
