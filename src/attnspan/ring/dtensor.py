"""Ring attention of DTensors that are cut along the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def of_dtensors(
    local: Callable[..., Any], q: Any, k: Any, v: Any, *args: Any, group: Any, **options: Any
) -> Any:
    """Calls `local`, which is `ring_attention`, with what this process holds of q, k and v.

    Args:
        local: takes and gives plain tensors.
        q: `(batch, Hq, n, head_dim)`, a DTensor of the placement `Shard(2)` on a mesh of one
            dimension; k and v likewise, on the same mesh.
        k: see q.
        v: see q.
        args: what follows in `local`.
        group: None; the mesh is the group.
        options: of `local`. Under a layout other than `Contiguous`, which is how DTensor itself
            cuts, the DTensor's order is the ranks' order, not the sequence's.

    Returns:
        DTensors of the same placement.

    Raises:
        ValueError: other placements or meshes, or a sequence that doesn't divide; one sentence.
        TypeError: some of q, k and v are plain tensors.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, DTensor):
            raise TypeError(
                f"ring_attention: {name} is a {type(x).__name__}; q, k and v are DTensors, or none "
                "of them is"
            )
        if x.device_mesh.ndim != 1 or x.placements != (Shard(2),) or x.device_mesh != q.device_mesh:
            raise ValueError(
                f"ring_attention: {name} has the placements {x.placements} on {x.device_mesh}; "
                "(Shard(dim=2),) on a mesh of one dimension, the same for q, k and v, is allowed"
            )
    mesh = q.device_mesh
    if group is not None and group not in (mesh, mesh.get_group()):
        raise ValueError("ring_attention: group is not the DTensors' mesh; None is allowed")
    n, size = q.shape[2], mesh.size()
    if n % size:
        raise ValueError(
            f"ring_attention: q has {n} tokens on {size} ranks; a multiple of {size} is allowed "
            "(pad the sequence)"
        )
    given = (x.to_local(grad_placements=[Shard(2)]) for x in (q, k, v))
    out = local(*given, *args, group=mesh, **options)
    if isinstance(out, tuple):
        return tuple(_whole(x, mesh) for x in out)
    return _whole(out, mesh)


def _whole(x: Tensor, mesh: Any) -> DTensor:
    return DTensor.from_local(x, mesh, (Shard(2),), run_check=False)
