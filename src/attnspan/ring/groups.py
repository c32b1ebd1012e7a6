"""From a group of processes to what carries their bytes, and how processes come together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, final
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import ProcessGroup
from torch.distributed.rendezvous import rendezvous

from attnspan.ring.gloo import GlooTransport
from attnspan.ring.layout import Ring
from attnspan.ring.nccl import NcclTransport
from attnspan.ring.transport import Pending, RingMismatch, Transport, checked

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_KEPT: WeakKeyDictionary[ProcessGroup, dict[str, Transport]] = WeakKeyDictionary()


def transport_of(
    group: ProcessGroup | DeviceMesh | Ring | Transport | None = None,
    deadline: float | None = None,
    device: torch.device | str | None = None,
) -> Transport:
    """What carries bytes between the members of a group; made once for each group, and kept.

    The first call for a group is collective: all its members make it, within a minute. Ranks are
    those in the group, which may be a part of the world.

    Args:
        group: None: the default group; a mesh: its one dimension; a `Ring`: its group, with its
            deadline if none is given here; a transport: itself, as it is.
        deadline: seconds that a wait may last before a peer counts as lost, from now on; None
            leaves what was given before, 10 at first.
        device: where the tensors lie that will be sent. None: on the GPU if the group has NCCL.
            Those on the host go over gloo, also for a group of NCCL.

    Raises:
        RuntimeError: there is no default group.
        ValueError: a mesh of several dimensions, a group that this process is no member of, or one
            whose backends are neither gloo nor NCCL.
    """
    if isinstance(group, Transport):
        return group
    if isinstance(group, Ring):
        return transport_of(group.group, deadline or group.deadline, device)
    known = isinstance(deadline, int | float) and not isinstance(deadline, bool)
    if deadline is not None and not (known and deadline > 0):
        raise ValueError(f"deadline is {deadline!r}; None or seconds above 0 are allowed")
    members = _members(group)
    if members.size() == 1:
        return Alone()
    backends = _backends(members)
    host = device is not None and torch.device(device).type == "cpu"
    kind = "nccl" if backends.get("cuda") == "nccl" and not host else "gloo"
    if not {"gloo", "nccl"} & set(backends.values()):
        names = ", ".join(sorted(set(backends.values())))
        raise ValueError(f"group: its backend is {names}; gloo and nccl are allowed")
    kept = _KEPT.setdefault(members, {})
    if kind not in kept:
        kept[kind] = (NcclTransport if kind == "nccl" else GlooTransport)(members, deadline or 10.0)
    transport = kept[kind]
    assert isinstance(transport, GlooTransport | NcclTransport)
    if deadline is not None:
        transport.deadline = deadline
    return transport


def init(backend: str = "gloo", timeout: float = 300.0) -> None:
    """Makes the default process group from what `torchrun` put into the environment.

    Beside `torch.distributed.init_process_group` it survives `torchrun --max-restarts`: the store
    of the agent lives on over a restart, and what the lost attempt wrote there misleads the next
    one, so each attempt writes under a name of its own. With NCCL it also takes the GPU of
    `LOCAL_RANK`.

    Args:
        backend: as torch names it: `"gloo"`, `"nccl"`, `"cpu:gloo,cuda:nccl"`.
        timeout: seconds that processes wait for each other here, and in torch's own collectives.

    Raises:
        RuntimeError: the environment lacks what `torchrun` sets.
        RingMismatch: the processes don't count as many of them alike.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if lacks := [name for name in names if name not in os.environ]:
        raise RuntimeError(
            f"init: {', '.join(lacks)} not in the environment; start the processes with torchrun"
        )
    if "nccl" in backend:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    patience = timedelta(seconds=timeout)
    store, rank, world = next(rendezvous("env://", timeout=patience))
    store = PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    others = store.compare_set("attnspan.ring/world", "", str(world)).decode()
    if others != str(world):
        raise RingMismatch(
            f"init: WORLD_SIZE is {world} on rank {rank}, {others} on another; "
            "the same on all ranks is allowed"
        )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


@final
class Alone(Transport):
    """A ring of one process: it has nobody to send to."""

    rank, size = 0, 1

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], step: str
    ) -> Pending:
        checked(self, sends, receives)
        return _Done()

    def gather(self, x: Tensor, step: str) -> Tensor:
        return x.detach().unsqueeze(0).clone()

    def agree(self, facts: Mapping[str, str], by: str) -> None:
        return None


@final
class _Done(Pending):
    def wait(self) -> None:
        return None


def _members(group: Any) -> ProcessGroup:
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "group: None is the default group, and torch.distributed isn't initialised; call "
                "torch.distributed.init_process_group or attnspan.ring.init first"
            )
        members = dist.group.WORLD
        assert members is not None
        return members
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"group: this process, rank {dist.get_rank()} of the world, isn't one of its members; "
            "calls by members are allowed"
        )
    if isinstance(group, ProcessGroup):
        return group
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names
            raise ValueError(
                f"group: a mesh of {group.ndim} dimensions"
                f"{f' {names}' if names else ''}; one dimension is allowed, as mesh[name] gives it"
            )
        return _members(group.get_group())
    raise ValueError(
        f"group: {type(group).__name__}; None, a ProcessGroup, a DeviceMesh of one dimension or a "
        "Transport is allowed"
    )


def _backends(group: ProcessGroup) -> dict[str, str]:
    """For each type of device the backend: {"cpu": "gloo", "cuda": "nccl"}."""
    config = dist.get_backend_config(group)
    return dict(part.split(":") for part in config.split(","))
