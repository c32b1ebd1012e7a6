"""What each process of a ring runs in the tests of models."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tiny import tiny
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from attnspan import attach
from attnspan.models import ringed
from attnspan.ring.attention import Ring


def gradients(model: Any) -> dict[str, Tensor]:
    """Whole ones, of parameters that FSDP2 has cut too."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        for name, grad in grads.items()
    }


def group_of(rank: int, size: int, ring: int) -> Any:
    """The ring of this process, where the world has several; the world where it is one."""
    if ring == size:
        return dist.group.WORLD
    return init_device_mesh("cpu", (size // ring, ring), mesh_dim_names=("dp", "ring"))["ring"]


def forward_and_backward(
    rank: int,
    size: int,
    family: str,
    layout: Any,
    inputs: dict[str, Any],
    pattern: Any = None,
    *changes: str,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """A shard's logits, the loss, and gradients."""
    model = tiny(family).train()
    if "checkpoint" in changes:
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)()
    group = dist.group.WORLD
    with attach(model, pattern, ring=group if layout is None else Ring(group, layout)):
        output = model(**inputs)
        if output.loss is None:
            return output.logits.detach(), None, {}
        output.loss.backward()
    return output.logits.detach(), output.loss.detach(), gradients(model)
