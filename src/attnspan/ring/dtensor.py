"""Ring attention of DTensors that are cut along the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def of_dtensors(
    local: Callable[..., Any], q: Any, k: Any, v: Any, sink_logits: Any, group: Any
) -> Any:
    """Calls `local`, which is `ring_attention`, with what this process holds of q, k and v.

    DTensor cuts as `Contiguous` does. Under another layout its order is that of the ranks' shards.

    Args:
        local: takes and gives plain tensors.
        q: `(batch, Hq, n, head_dim)`, a DTensor of the placement `Shard(2)` on a mesh of one
            dimension; k and v likewise, on the same mesh.
        k: see q.
        v: see q.
        sink_logits: None, or a plain tensor.
        group: None, or the mesh or its group.

    Returns:
        DTensors of the same placement.

    Raises:
        ValueError: other placements, meshes or groups, or a sequence that doesn't divide.
        TypeError: some of q, k and v are plain tensors, or `sink_logits` isn't.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, DTensor):
            raise TypeError(
                f"ring_attention: {name} is a {type(x).__name__}; q, k and v are DTensors, or none "
                "of them is"
            )
        placed = (x.device_mesh, x.placements) == (q.device_mesh, (Shard(2),))
        if x.dim() != 4 or x.device_mesh.ndim != 1 or not placed:
            raise ValueError(
                f"ring_attention: {name} of {tuple(x.shape)} has the placements {x.placements} on "
                f"{x.device_mesh}; four dimensions and (Shard(dim=2),) on a mesh of one dimension, "
                "the same for q, k and v, are allowed"
            )
    if isinstance(sink_logits, DTensor):
        raise TypeError(
            "ring_attention: sink_logits is a DTensor; the whole as a plain one is allowed"
        )
    mesh: DeviceMesh = q.device_mesh
    if group is not None and group != mesh and group is not mesh.get_group():
        raise ValueError("ring_attention: group isn't that of the DTensors' mesh; None is allowed")
    if q.shape[2] % mesh.size():
        raise ValueError(
            f"ring_attention: q has {q.shape[2]} tokens on {mesh.size()} ranks; a multiple of "
            f"{mesh.size()} is allowed (pad the sequence)"
        )
    given = (x.to_local(grad_placements=[Shard(2)]) for x in (q, k, v))
    results = local(*given, sink_logits=sink_logits, group=mesh)
    if isinstance(results, Tensor):
        return _whole(results, mesh)
    return tuple(_whole(x, mesh) for x in results)


def _whole(x: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(x, mesh, (Shard(2),), run_check=False)
