"""A cache that the processes of a ring share: each holds its own part of the keys and values.

Every process runs the model on the same tokens. Token p of the stream belongs to rank p % N, sinks
and all, so the owner of a slot follows from positions alone, no token is held twice, and every rank
holds about a share of N at any time. In each layer a process attends to what it holds, and one
packed all-gather merges the parts, in float32, into the exact whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, final

from torch import Tensor

from attnspan.cache.lane import Call
from attnspan.cache.layer import LaneMaker
from attnspan.cache.ring import RingLane
from attnspan.kernels.view import KVView, Part, RawPart
from attnspan.policies.base import Policy
from attnspan.ring.decode import digest, merge_shares
from attnspan.ring.transport import Transport, together
from attnspan.views import attend_share


@dataclass
class SharedLane(RingLane):
    """A lane that holds the tokens of this rank, and attends to those of all."""

    transport: Transport = field(kw_only=True)
    layer: int = field(kw_only=True)

    @property
    def _dealt(self) -> tuple[int, int]:
        return self.transport.rank, self.transport.size

    def lacks_step(self) -> str | None:
        return "its keys and values lie on a ring, whose exchanges the host makes"

    def _attend(self, parts: tuple[Part | RawPart, ...], call: Call) -> Tensor:
        self.transport.layer = self.layer
        with together(self.transport):
            out, lse = attend_share(KVView(parts), scale=call.scale, softcap=call.softcap)
            out, _ = merge_shares(self.transport, out, lse, call.sink_logits, "merge of shares")
        return out.to(parts[0].query.dtype)

    def staging_bytes(self, chunk: int, on_cpu: bool = True) -> int:
        m, wide = min(self._segment_most(), chunk), max(4, self.dtype.itemsize)
        part = self.batch * self.spec.num_heads * m * (self.spec.head_dim + 1) * wide
        # The parts of all ranks as they come, and twice more while they are merged.
        return super().staging_bytes(chunk, on_cpu) + 3 * (self.transport.size + 1) * part


@final
class SharedStream:
    """One stream on a ring, and what its ranks must agree on before they exchange anything.

    Args:
        transport: of the ring.
        policies: of the layers.
        rollback: of the cache.

    Attributes:
        weights: a digest of the model's, once they were read for this stream.
        trail: a digest of all that was agreed on: the same on all ranks that saw the same stream.

    Raises:
        ValueError: where a ring can't share such a cache; one sentence says why.
    """

    def __init__(self, transport: Transport, policies: Iterable[Policy], rollback: int) -> None:
        for policy in policies:
            if policy.band is None:
                raise ValueError(
                    f"policy {policy} goes by what all tokens hold or were paid, which no process "
                    "of a ring knows, or by head; KeepAll, Window and SinkWindow are allowed with "
                    "a ring"
                )
        if rollback:
            raise ValueError(
                f"rollback is {rollback}; what undoing needs holds the keys and values of every "
                "process, so 0 is allowed with a ring"
            )
        self.transport = transport
        self.weights = self.trail = ""

    def __str__(self) -> str:
        return f"rank {self.transport.rank} of {self.transport.size}"

    def maker(self, layer: int) -> LaneMaker:
        """What makes the lanes of one layer."""
        return partial(SharedLane, transport=self.transport, layer=layer)

    def agree(self, standing: Mapping[str, str], brought: Mapping[str, Any]) -> None:
        """Returns if all ranks stand alike and bring the same.

        Args:
            standing: how the cache stands, by name.
            brought: what a call brings, by name; of values other than tensors, numbers and texts,
                nothing is told.

        Raises:
            RingMismatch, RingPeerLost: see `Transport.agree`; nothing has changed then.
        """
        plain = bool | int | float | str | Tensor | None
        call = {name: digest(x) for name, x in brought.items() if isinstance(x, plain)}
        facts = {"weights": self.weights, **standing, "the stream so far": self.trail, **call}
        self.transport.agree(facts, "attnspan.Cache")
        self.trail = blake2b(f"{self.trail} {call}".encode(), digest_size=8).hexdigest()
