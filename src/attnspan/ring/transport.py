"""What a ring asks of whatever carries its bytes, and how it fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, int8


class RingPeerLost(RuntimeError):
    """A process of the ring died, hangs, or left it; what it owed never came.

    Attributes:
        ranks: those that are lost, as far as this process can tell.
        layer: the layer whose attention waited; None where the caller named none.
        step: what was exchanged.
        seconds: how long this process waited.
    """

    def __init__(
        self, ranks: Sequence[int], layer: int | None, step: str, seconds: float, why: str
    ) -> None:
        self.ranks, self.layer, self.step, self.seconds = tuple(ranks), layer, step, seconds
        who = f"rank {', '.join(map(str, ranks))}" if ranks else "a rank"
        where = f"{step} of layer {layer}" if layer is not None else step
        super().__init__(f"ring: {who} lost after {seconds:.1f} s in {where}: {why}")


class RingMismatch(ValueError):
    """The ranks don't call with the same arguments; every one of them raises this alike."""


@contextmanager
def together(transport: Transport) -> Iterator[None]:
    """Inside, an error of this process alone, out of memory say, is told to the others at once."""
    try:
        yield
    except (RingPeerLost, RingMismatch):
        raise
    except BaseException as error:
        transport.leave(f"{type(error).__name__}: {error}")
        raise


def differing(told: Sequence[Mapping[str, str]], by: str) -> str | None:
    """The sentence of a `RingMismatch`, from what each rank said; None where all agree."""
    for fact in dict.fromkeys(fact for each in told for fact in each):
        values = [each.get(fact, "nothing") for each in told]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            return (
                f"{by}: rank {other} calls with {fact} {values[other]}, rank 0 with {values[0]}; "
                "the same on all ranks is allowed"
            )
    return None


class Pending(ABC):
    """An exchange under way."""

    @abstractmethod
    def wait(self) -> None:
        """Returns when the buffers that receive are filled, and those that send are free.

        Raises:
            RingPeerLost: what is owed didn't come within the deadline, or a peer is gone.
        """


class Transport(ABC):
    """Carries bytes between the processes of one ring.

    Every rank calls the same methods in the same order.

    Attributes:
        rank: of this process, from 0 on.
        size: how many processes there are.
        sent: bytes that this process handed over for others so far.
        waited: seconds that its host stood in waits so far.
        layer: the layer that errors name; None: none.
        calls: attentions that went over it so far.
    """

    rank: int
    size: int
    sent: int = 0
    waited: float = 0.0
    layer: int | None = None
    calls: int = 0

    @abstractmethod
    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], step: str
    ) -> Pending:
        """Sends to some peers and receives from some, at once; ranks with neither call it too.

        Args:
            sends: for each peer, a contiguous int8 tensor `(bytes,)`; both sides know the sizes.
            receives: for each peer, the buffer that is filled, likewise.
            step: what this is, for errors; the same on all ranks.
        """

    @abstractmethod
    def gather(self, x: Tensor, step: str) -> Tensor:
        """`(size, *x.shape)`: what each rank gave, in one packed all-gather.

        Raises:
            RingPeerLost: as in `Pending.wait`.
        """

    @abstractmethod
    def agree(self, facts: Mapping[str, str], by: str) -> None:
        """Returns if the facts are the same on all ranks.

        Raises:
            RingMismatch: on every rank alike, one sentence with the fact, the ranks and the values.
            RingPeerLost: as in `Pending.wait`.
        """

    def leave(self, why: str) -> None:  # noqa: B027
        """Tells the others at once that this rank can't go on, after an error amid its exchanges.

        They raise `RingPeerLost`, and so does this transport from then on. Without it they would
        wait until the deadline, or take a later call of this rank for what they wait for.
        """


def checked(
    transport: Transport, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]
) -> None:
    """Refuses what `Transport.exchange` doesn't take.

    Raises:
        ValueError: a peer that isn't another rank, or a tensor that isn't `(bytes,)` of int8.
    """
    for name, parts in (("sends", sends), ("receives", receives)):
        for peer, x in parts.items():
            if peer == transport.rank or not 0 <= peer < transport.size:
                raise ValueError(
                    f"{name}: peer {peer} on rank {transport.rank} of {transport.size}; "
                    "another rank is allowed"
                )
            if x.dtype != int8 or x.ndim != 1 or not x.is_contiguous():
                raise ValueError(
                    f"{name}: {tuple(x.shape)} {x.dtype} of strides {x.stride()} for rank {peer}; "
                    "a contiguous int8 tensor (bytes,) is allowed"
                )
