"""One layer's cache for rows that have seen equally many tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnspan.cache.clock import Clock
from attnspan.cache.storage import Dense, Fields, Int4, Storage
from attnspan.cache.tables import Tables
from attnspan.kernels.view import Angles, Stored
from attnspan.policies.base import Policy
from attnspan.positions import Rope
from attnspan.views import FEW

# Queries attended at once: bounds what a long input stages, and is past the knee of throughput.
SEGMENT = 256
# Storages that learn means skip at least this many tokens: a stream's first ones are outliers.
SKIP = 4


@dataclass(frozen=True)
class LayerSpec:
    """What a cache must know of a layer.

    Attributes:
        num_heads, num_kv_heads, head_dim: the shape of one token's queries and keys.
        rope: how the layer rotates queries and keys; None where it doesn't.
        softcap: whether its logits are capped, which takes the scores into memory.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None = None
    softcap: bool = False

    @property
    def depends_on_length(self) -> bool:
        return self.rope is not None and self.rope.depends_on_length


@dataclass(frozen=True)
class Call:
    """What one attention call brings besides q, k and v.

    `rotated` says that the model has rotated q and k already, by their places in the stream. With a
    `clock` the call is a step of one token for each row, whose place the device knows alone: lanes
    neither read nor move their own counts.
    """

    tables: Tables
    scale: float | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    rotated: bool = False
    clock: Clock | None = None


@dataclass
class Lane(ABC):
    """Slots and counts of one layer, for `batch` rows that go in step.

    `fields` hold `(batch, num_kv_heads, slots, width)`; `seen` counts the stream's tokens. Queries
    and keys come un-rotated. Subclasses say where tokens go and what a query sees.
    """

    spec: LayerSpec
    policy: Policy
    storage: Storage
    batch: int
    dtype: torch.dtype
    device: torch.device
    limit: int | None = None  # slots that an unbounded policy may use
    seen: int = 0
    fields: Fields = field(default_factory=dict)
    extra: Fields = field(default_factory=dict)  # further tensors, batch first: scores, means

    def __post_init__(self) -> None:
        # Created outside inference mode, so that later calls under any mode may write to them.
        with torch.inference_mode(False), torch.no_grad():
            self.fields = self._allocate(self._holder, self._slots_needed())
            if self.storage.warmup:
                self.extra["key_sum"] = self._zeros(self.spec.head_dim, torch.float64)
            self._allocate_extra()

    @abstractmethod
    def _allocate_extra(self) -> None:
        """Allocates the subclass's own tensors."""

    @abstractmethod
    def _segment(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Takes in `k`, `v` and attends for `q`; the stream moves on by their length."""

    def lacks_step(self) -> str | None:
        """Why this lane can't step by a clock now, as the end of a sentence; None: it can."""
        return f"policy {self.policy} decides on the host which tokens stay"

    @property
    def steps_from(self) -> int:
        """How many tokens go in otherwise, before the first step by a clock."""
        return max(1, self.policy.leading, self._freeze_at if self.storage.warmup else 0)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, call: Call, clock: Clock) -> Tensor:
        """As `_segment` for one token, its place read from the device."""
        raise ValueError(f"no step can be taken by a clock: {self.lacks_step()}")

    def make_room(self) -> None:  # noqa: B027  only what grows has any to make
        """Allots the slot that the next token takes."""

    @abstractmethod
    def _cut(self, start: int) -> int:
        """Where a segment that starts at stream position `start` must end at the latest."""

    @abstractmethod
    def _slots_needed(self) -> int:
        """How many slots to allocate now."""

    def _segment_most(self) -> int:
        """The longest segment that this lane takes in at once."""
        return SEGMENT

    @abstractmethod
    def _slots_full(self) -> int:
        """How many slots this lane may come to, sinks held elsewhere apart."""

    @property
    @abstractmethod
    def tokens_held(self) -> int:
        """Slots in use, in each row."""

    @torch.no_grad()
    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention of `q` over what the policy lets it see, `k` and `v` included.

        `q` is `(batch, num_heads, m, head_dim)`, `k` and `v` `(batch, num_kv_heads, m, head_dim)`,
        un-rotated; returns the shape of `q`.
        """
        outs, done, m = [], 0, q.shape[2]
        if call.clock is not None:
            return self._step(q, k, v, call, call.clock)
        if m == 1:
            return self._segment(q, k, v, call)
        while done < m:
            # Where a segment ends may depend on what is held, which the one before it decides.
            stop = min(self.seen + m - done, self.seen + SEGMENT, self._cut(self.seen))
            if self._warm:
                stop = min(stop, self._freeze_at)
            part = slice(done, done + stop - self.seen)
            outs.append(self._segment(q[:, :, part], k[:, :, part], v[:, :, part], call))
            done = part.stop
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    # Storages that learn the means of the keys first ----------------------------------------

    @property
    def _freeze_at(self) -> int:
        return max(self.policy.leading, SKIP) + self.storage.warmup

    @property
    def _warm(self) -> bool:
        return self.storage.warmup > 0 and "mean" not in self.extra

    @property
    def _holder(self) -> Storage:
        return Dense() if self._warm else self.storage

    def _encode(self, k: Tensor, v: Tensor) -> Fields:
        return self._holder.encode(k, v, self.extra.get("mean"))

    def _decode(self, fields: Fields) -> tuple[Tensor, Tensor]:
        return self._holder.decode(fields, self.extra.get("mean"), self.dtype)

    def _stored(self, fields: Fields, angles: tuple[Tensor, Tensor] | None) -> Stored:
        """`fields` as they are, for a kernel that reads them so; `angles` are what `turn` takes."""
        turned = None
        if angles is not None:
            rope = self.spec.rope
            assert rope is not None
            cos, sin = angles
            if not rope.interleaved:  # spread over both halves, with the signs of each
                half = cos.shape[-1] // 2
                cos, sin = cos[:, :half], sin[:, half:]
            turned = Angles(cos, sin, rope.interleaved)
        group = self.storage.group if isinstance(self.storage, Int4) else 0
        return Stored(self._holder.kind, fields, self.extra.get("mean"), group, turned)

    def _advance(self, k: Tensor) -> None:
        """Counts the tokens of `k`, just stored; freezes the means once they are known."""
        start = self.seen
        self.seen += k.shape[2]
        if self._warm:
            skip = max(0, self._freeze_at - self.storage.warmup - start)
            # Sums in float64 come out alike however the calls cut the input.
            self.extra["key_sum"] += k[:, :, skip:].double().sum(2, keepdim=True)
            if self.seen == self._freeze_at:
                self._freeze()

    def _freeze(self) -> None:
        used = self._used()
        with torch.inference_mode(False):
            key, value = self._decode({n: x[:, :, :used] for n, x in self.fields.items()})
            mean = (self.extra.pop("key_sum") / self.storage.warmup).half().float()
            self.extra["mean"] = mean
            self.fields = self._allocate(self.storage, self._slots_needed())
            self._put(0, self._encode(key, value))

    # Tensors --------------------------------------------------------------------------------

    def _used(self) -> int:
        """How many slots, from the first on, may hold something."""
        return self.tokens_held

    def _zeros(self, width: int, dtype: torch.dtype, slots: int = 1) -> Tensor:
        shape = (self.batch, self.spec.num_kv_heads, slots, width)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _allocate(self, storage: Storage, slots: int) -> Fields:
        layout = storage.layout(self.spec.head_dim, self.dtype)
        return {name: self._zeros(width, kind, slots) for name, (width, kind) in layout.items()}

    def _put(self, slot: int, encoded: Fields) -> None:
        for name, x in encoded.items():
            self.fields[name].narrow(2, slot, x.shape[2]).copy_(x)

    def _rotate(self, x: Tensor, start: int, length: int, tables: Tables) -> Tensor:
        """`x` rotated by the positions `start`, `start + 1`, ..."""
        rope = self.spec.rope
        if rope is None:
            return x
        return rope.turn(x, *tables.angles(rope, start, start + x.shape[2], length, x))

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.fields.values(), *self.extra.values()))

    def planned_bytes(self) -> int:
        """The most this lane will ever allocate for what it holds."""
        per_slot = self.storage.bytes_per_token(self.spec.head_dim, self.dtype)
        heads = self.batch * self.spec.num_kv_heads
        planned = heads * self._slots_full() * per_slot
        planned += sum(x.nbytes for x in self.extra.values())
        if self.storage.warmup:  # the dense tokens and their codes, side by side as they freeze
            planned += sum(x.nbytes for x in self.fields.values())
        return planned

    def staging_bytes(self, chunk: int, on_cpu: bool = True) -> int:
        """The most that one call of up to `chunk` tokens stages on top, an upper bound.

        What is read is joined with what is new, decoded and rotated, in fp32 at most; a segment's
        scores are whole where the policy asks for them, the layer caps its logits, or the device
        isn't a CPU.
        """
        m = min(SEGMENT, chunk, self._segment_most())
        n = self._slots_full() + self.policy.leading + m
        spec, wide = self.spec, max(4, self.dtype.itemsize)
        keys = 5 * n * spec.num_kv_heads * spec.head_dim * wide
        queries = 6 * m * spec.num_heads * spec.head_dim * wide
        whole = self.policy.needs_scores or spec.softcap or not on_cpu
        scores = 3 * (m * n if whole else min(m * n, 2 * FEW)) * spec.num_heads * 4
        making = m * n * 4  # what a mask is made of
        return self.batch * (keys + queries + scores) + making

    def table_bytes(self, chunk: int) -> int:
        """The most that the masks and angles of one segment take."""
        m = min(SEGMENT, chunk, self._segment_most())
        n = self._slots_full() + self.policy.leading + m
        wide = max(4, self.dtype.itemsize)
        return m * n * wide + 2 * (2 * m + n) * self.spec.head_dim * wide

    @property
    def least_limit(self) -> int:
        """The fewest slots that a limit may leave a policy without a bound."""
        return self._freeze_at if self.storage.warmup else 1

    # Whole-lane operations --------------------------------------------------------------------

    def select(self, rows: Tensor) -> Lane:
        """A lane of the rows that `rows` names, a row as often as it is named."""
        rows = rows.to(self.device)
        return self._rebuilt(len(rows), lambda x, _: x.index_select(0, rows))

    def joined(self, other: Lane) -> Lane:
        """This lane's rows and then `other`'s, which have seen equally many tokens."""
        theirs = other.tensors()
        return self._rebuilt(self.batch + other.batch, lambda x, name: torch.cat((x, theirs[name])))

    def _rebuilt(self, batch: int, make: Callable[[Tensor, str], Tensor]) -> Lane:
        lane = copy(self)
        lane.batch = batch
        with torch.inference_mode(False), torch.no_grad():
            lane.fields = {n: make(x, f"fields.{n}") for n, x in self.fields.items()}
            lane.extra = {n: make(x, f"extra.{n}") for n, x in self.extra.items()}
        return lane

    def copy(self) -> Lane:
        """A lane that shares no memory with this one."""
        return self._rebuilt(self.batch, lambda x, _: x.clone())

    def counts(self) -> dict[str, Any]:
        """The numbers that, beside the tensors, make up this lane's state."""
        return {"batch": self.batch, "seen": self.seen}

    def tensors(self) -> Fields:
        """The tensors that make up this lane's state, by name."""
        fields = {f"fields.{n}": x for n, x in self.fields.items()}
        return fields | {f"extra.{n}": x for n, x in self.extra.items()}

    def _check(self, tensors: Fields) -> None:
        """Holds a state's tensors against those of this lane, which has just been made."""
        expected = self.tensors()
        if self._warm and self.seen >= self._freeze_at:
            expected = {n: x for n, x in expected.items() if not n.startswith("fields.")}
            expected["extra.mean"] = expected.pop("extra.key_sum").float()
            for name, x in self._allocate(self.storage, 1).items():
                expected[f"fields.{name}"] = x
        sizes = {x.shape[2] for name, x in tensors.items() if name.startswith("fields.")}
        slots = max(sizes, default=0)
        if self.policy.capacity is None:  # it grows by and by: what is held must be there
            least, most = self._slots_seen(), self.limit
        else:
            frozen = self._warm and self.seen >= self._freeze_at
            least = most = self._slots_full() if frozen else self._slots_needed()
        if (
            tensors.keys() != expected.keys()
            or len(sizes) > 1
            or slots < least
            or (most is not None and slots > most)
            or any(
                x.dtype != tensors[name].dtype
                or x.shape[:2] != tensors[name].shape[:2]
                or x.shape[3:] != tensors[name].shape[3:]
                or (name.startswith("extra.") and x.shape != tensors[name].shape)
                for name, x in expected.items()
            )
        ):
            raise ValueError(
                "the state's tensors don't fit its counts, or hold more than max_bytes allows"
            )

    def bound(self, limit: int | None) -> None:
        """Takes a new limit; slots beyond it, which must be free, are given back."""
        self.limit = limit
        if limit is None or self.policy.capacity is not None:
            return
        with torch.inference_mode(False), torch.no_grad():
            for name, x in self.fields.items():
                if x.shape[2] > limit:
                    self.fields[name] = x[:, :, :limit].clone()

    def _slots_seen(self) -> int:
        """The slots that the tokens seen take up, where nothing is ever given up."""
        return self.seen

    def restore(self, counts: dict[str, Any], tensors: Fields) -> None:
        """Takes over a state that `counts()` and `tensors()` gave.

        Raises:
            ValueError: when the tensors are not what a lane of these counts holds.
        """
        self.seen = counts["seen"]
        self._check(tensors)
        for kind in ("fields", "extra"):
            prefix = f"{kind}."
            named = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
            # Cloned: what was loaded may be one buffer that all tensors share.
            with torch.inference_mode(False):
                setattr(self, kind, {n: x.to(self.device).clone() for n, x in named.items()})
