"""From a group to its transport, restarts, and what is refused."""

from __future__ import annotations

import pytest
import torch
from ring.processes import run, started
from torch._C._distributed_c10d import TCPStore

from attnspan.ring.groups import Alone, init, transport_of
from attnspan.ring.transport import Transport, checked


@pytest.fixture
def agent() -> TCPStore:
    """A store that outlives the processes, as that of torchrun's agent does."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_a_job_that_is_restarted_recovers_each_time(agent: TCPStore) -> None:
    for attempt in range(5):
        with started("ring.workers:restarted", 2, agent.port, attempt, False, group=False) as job:
            outcomes = job.outcomes(20.0)
        dead = attempt % 2
        assert outcomes[dead].exit == -9
        assert outcomes[1 - dead].error == "RingPeerLost", outcomes[1 - dead].output
        assert f"rank {dead} lost" in outcomes[1 - dead].text
    assert run("ring.workers:restarted", 2, agent.port, 5, True, group=False) == [5, 5]


def test_processes_that_count_differently(agent: TCPStore) -> None:
    told = run("ring.workers:other_world", 3, agent.port, group=False)[-1]
    assert told == (
        "RingMismatch: init: WORLD_SIZE is 4 on rank 2, 3 on another; "
        "the same on all ranks is allowed"
    )


def test_init_says_what_the_environment_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="init: WORLD_SIZE, MASTER_ADDR, MASTER_PORT not in"):
        init()


def test_no_default_group() -> None:
    with pytest.raises(RuntimeError, match=r"group: None is the default group.*isn't initialised"):
        transport_of()


def test_what_is_no_group() -> None:
    with pytest.raises(ValueError, match="group: int; None, a ProcessGroup"):
        transport_of(3)  # type: ignore[arg-type]


def test_deadlines() -> None:
    for deadline in (0.0, -1.0, float("nan"), "a", True):
        with pytest.raises(ValueError, match=f"deadline is {deadline!r}; None or seconds above 0"):
            transport_of(None, deadline)  # type: ignore[arg-type]


def test_a_backend_that_is_neither() -> None:
    said = run("ring.workers:other_backend", 2, group=False)
    assert said == ["group: its backend is fake; gloo and nccl are allowed"] * 2


def test_a_transport_is_its_own() -> None:
    alone = Alone()
    assert transport_of(alone) is alone


@pytest.mark.parametrize(
    ("peer", "x", "said"),
    [
        (0, torch.zeros(3, dtype=torch.int8), "sends: peer 0 on rank 0 of 3; another rank"),
        (3, torch.zeros(3, dtype=torch.int8), "sends: peer 3 on rank 0 of 3"),
        (1, torch.zeros(3), r"sends: \(3,\) torch.float32 of strides \(1,\) for rank 1"),
        (1, torch.zeros(3, 2, dtype=torch.int8), r"sends: \(3, 2\) torch.int8"),
        (1, torch.zeros(6, dtype=torch.int8)[::2], r"of strides \(2,\) for rank 1; a contiguous"),
    ],
)
def test_what_no_exchange_takes(peer: int, x: torch.Tensor, said: str) -> None:
    transport: Transport = Alone()
    transport.size = 3
    with pytest.raises(ValueError, match=said):
        checked(transport, {peer: x}, {})


def test_the_nccl_transport_without_nccl() -> None:
    for value in run("ring.workers:nccl", 2):
        assert value["layer"] == 3
        assert value["step"] == "keys"
        assert "in keys of layer 3" in value["text"]
