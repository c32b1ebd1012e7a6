"""Lanes whose policy keeps the first tokens and the last ones: a rolling buffer.

A token past the sinks sits in slot `(position - sinks) % slots`. Where the frequencies of the
rotary embedding don't depend on length, keys are rotated once, at insertion, by their place in the
stream: angles come from float64, and the distances within the window are what counts. The sinks are
held un-rotated, and by their places inside the cache they stand right before the window. Several
queries, each with a window of its own, are rotated twice, for the sinks and for the window, and one
softmax joins the two parts; a single query has the sinks' few keys rotated to where they stand
before its window, which is the same distance and one part less.

Where frequencies depend on length, keys are held un-rotated and rotated at use. So they are in int4
(a storage that learns the keys' means): rotation smears the mean of a channel over its circle, and
the bundled model then loses 26 % of its bits per byte instead of 0.5 %. Nothing stored is ever
rotated again.

A lane may hold every `size`-th token alone, from token `rank` on, where others hold the rest
(`Span`). Its slots are those of a lane that saw its own tokens only; positions and angles are those
of the whole stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnspan.cache.clock import Clock
from attnspan.cache.lane import SEGMENT, Call, Lane
from attnspan.cache.span import Span
from attnspan.cache.storage import Dense, Fields
from attnspan.cache.tables import Tables
from attnspan.kernels.view import KVView, Part, RawPart
from attnspan.positions import Rope
from attnspan.views import append, attend, reads_stored

_GROWTH = 256


@dataclass
class RingLane(Lane):
    """A lane with a rolling buffer."""

    span: Span = field(init=False)
    sinks: int = field(init=False)  # those held here
    slots: int | None = field(init=False)  # of the rolling buffer; None for one that never rolls
    late: bool = field(init=False)  # keys are held un-rotated: angles unknown yet, or means count
    front: int = field(init=False)  # slots before the buffer: dense lanes put the sinks there

    def __post_init__(self) -> None:
        band, capacity = self.policy.band, self.policy.capacity
        assert band is not None, "policies without a closed form have lanes of their own"
        rank, size = self._dealt
        self.span = Span(band.sinks, band.window, self.policy.block, rank, size)
        self.sinks = self.span.own(band.sinks)
        self.slots = None if capacity is None else self.span.share(capacity - band.sinks)
        turns = self.spec.rope is not None
        self.late = turns and (self.spec.depends_on_length or self.storage.warmup > 0)
        self.front = self.sinks if isinstance(self.storage, Dense) else 0
        super().__post_init__()

    @property
    def _dealt(self) -> tuple[int, int]:
        """Which tokens are held here: `rank` and `size` of the span."""
        return 0, 1

    def _allocate_extra(self) -> None:
        if self.span.sinks:
            sinks = self.span.share(self.span.sinks)
            self.extra["sink_key"] = self._zeros(self.spec.head_dim, self.dtype, sinks)
            if not isinstance(self.storage, Dense):
                self.extra["sink_value"] = self._zeros(self.spec.head_dim, self.dtype, sinks)

    @property
    def _sink_key(self) -> Tensor:
        key = self.extra["sink_key"]
        return key if key.shape[2] == self.sinks else key[:, :, : self.sinks]

    @property
    def _sink_value(self) -> Tensor:
        dense = isinstance(self.storage, Dense)
        value = self.fields["value"] if dense else self.extra["sink_value"]
        return value if value.shape[2] == self.sinks else value[:, :, : self.sinks]

    @property
    def _front_allotted(self) -> int:
        """Lanes that share a stream allot equally much, whoever holds a sink more."""
        return self.span.share(self.span.sinks) if isinstance(self.storage, Dense) else 0

    def _slots_needed(self) -> int:
        slots = self.slots if self.slots is not None else self.limit
        if slots is None:
            # Half as much again at each growth: copies stay proportional to the stream.
            seen = self.span.share(self.seen)
            wanted = max(seen, int(seen * 1.5)) if seen else 1
            slots = -(-wanted // _GROWTH) * _GROWTH
        if self._warm:
            slots = min(slots, self.span.share(self._freeze_at - self.span.sinks))
        return self._front_allotted + max(1, slots)

    def _slots_full(self) -> int:
        return self._front_allotted + (self.slots or self.limit or 1)

    def _slots_seen(self) -> int:
        return self.span.share(self.seen)

    def _cut(self, start: int) -> int:
        end = self.span.sinks if start < self.span.sinks else start + SEGMENT
        if not self.spec.depends_on_length:
            return end
        regime = self._regime(start)
        stop = start + 1
        while stop < end and self._regime(stop) == regime:
            stop += 1
        return stop

    def _regime(self, position: int) -> int:
        assert self.spec.rope is not None
        return self.spec.rope.regime(self.span.place(position) + 1)

    @property
    def tokens_held(self) -> int:
        return min(self.span.own(self.seen), self.sinks) + self._used()

    def _used(self) -> int:
        return max(0, self._slots_after(self.seen - 1))

    def _segment(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        start, m, span = self.seen, q.shape[2], self.span
        parts: tuple[Part | RawPart, ...]
        if start < span.sinks:
            return self._first(q, k, v, call)
        length, tables, turned = span.place(start) + 1, call.tables, call.rotated
        rotated = q if turned else self._rotate(q, start, length, tables)
        stored = k if turned or self.late else self._rotate(k, start, length, tables)
        new = self._encode(span.mine(stored, start), span.mine(v, start))
        if m == 1:
            self._write(start, m, new)
            count = self._slots_after(start)
            held = slice(self.front, self.front + count)
            fields = {n: x[:, :, held] for n, x in self.fields.items()}
            mask = None
            if span.own(start + 1) - span.own(span.least(start)) < count:
                mask = self._mask(tables, start, m)
            if (self.late or not isinstance(self._holder, Dense)) and reads_stored(
                q, self.spec.num_kv_heads
            ):
                angles = self._slot_angles(q, start, m, length, tables) if self.late else None
                parts = (RawPart(rotated, self._stored(fields, angles), mask),)
                if self.sinks:
                    sink_key = self._turned_sinks(start, length, tables)
                    parts = (Part(rotated, sink_key, self._sink_value), *parts)
            else:
                key, value = self._decode(fields)
                if self.late:
                    key = self._rotate_slots(key, start, m, length, tables)
                if self.sinks:
                    key, value, mask = self._behind_sinks(key, value, mask, start, length, tables)
                parts = (Part(rotated, key, value, mask),)
        else:
            held = slice(self.front, self.front + self._used())
            fields = {n: torch.cat((x[:, :, held], new[n]), 2) for n, x in self.fields.items()}
            key, value = self._decode(fields)
            if self.late:
                key = self._rotate_slots(key, start, m, length, tables)
            parts = (Part(rotated, key, value, self._mask(tables, start, m)),)
            if self.sinks:
                places = self._at_places(q, start, length, call)
                sink_key = self._sinks(self.sinks, length, tables)
                parts = (Part(places, sink_key, self._sink_value), *parts)
        out = self._attend(parts, call)
        if m > 1:
            self._write(start, m, new)
        self._advance(stored)
        return out

    def _slots_after(self, position: int) -> int:
        """The slots of the buffer in use once the token at `position` is in."""
        past = self.span.own(position + 1) - self.sinks
        return past if self.slots is None else min(past, self.slots)

    def lacks_step(self) -> str | None:
        if self.spec.depends_on_length:
            return "the model's rotary frequencies change with the length of what is held"
        if self.seen < self.steps_from:
            return f"the first {self.steps_from} tokens go in otherwise, and {self.seen} are in"
        return None

    def make_room(self) -> None:
        if self.slots is None:
            self._grow(self.front + self.seen - self.span.sinks + 1)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, call: Call, clock: Clock) -> Tensor:
        sinks, slots, front = self.span.sinks, self.slots, self.front
        tables, rope = call.tables, self.spec.rope
        size = self.fields["key"].shape[2]
        mine = (self.span, slots, front, size)

        def place() -> tuple[Tensor, ...]:
            length = clock.length(sinks, slots, front).expand(self.batch).contiguous()
            return clock.slot(sinks, slots, front), length

        slot, length = tables.get(("step", *mine, self.batch), place)
        angles = turned = None
        if rope is not None:
            angles = self._angles_at(rope, clock.position, "position", q, tables)
            if not self.late:
                turned = append(q, k, v, self.fields, slot, angles)
        if turned is None:
            turned, stored = q, k
            if rope is not None and angles is not None:
                turned = rope.turn(q, *angles)
                stored = k if self.late else rope.turn(k, *angles)
            for name, x in self._encode(stored, v).items():
                self.fields[name].index_copy_(2, slot, x)
        sink_key = self._sinks_at(clock, tables) if sinks else None
        if front and sink_key is not None:
            self.fields["key"][:, :, :front] = sink_key
        mask = self._block_mask(clock, q, tables) if self.span.block > 1 else None
        places = None
        if self.late and rope is not None:
            positions = clock.positions(sinks, slots, size)
            places = self._angles_at(rope, positions, ("slots", *mine), q, tables)
        parts: list[Part | RawPart] = []
        if sink_key is not None and not front:
            parts.append(Part(turned, sink_key, self._sink_value))
        if reads_stored(q, self.spec.num_kv_heads):
            parts.append(RawPart(turned, self._stored(self.fields, places), mask, length))
        else:
            key, value = self._decode(self.fields)
            key = key if places is None or rope is None else rope.turn(key, *places)
            parts.append(Part(turned, key, value, mask, length))
        return self._attend(tuple(parts), call)

    def _angles_at(
        self, rope: Rope, positions: Tensor, name: object, like: Tensor, tables: Tables
    ) -> tuple[Tensor, Tensor]:
        """What `rope.turn` takes for positions that the device knows, the same for all layers."""
        wide = torch.promote_types(like.dtype, torch.float32)
        key = ("clock", name, id(rope), wide)
        cos, sin = tables.get(key, lambda: rope.spread(positions, 1, wide))
        return cos, sin

    def _sinks_at(self, clock: Clock, tables: Tables) -> Tensor:
        """As `_turned_sinks`."""
        rope, sink_key, span = self.spec.rope, self.extra["sink_key"], self.span
        if rope is None or (span.window is None and not self.late):
            return sink_key
        wide = torch.promote_types(sink_key.dtype, torch.float32)

        def make() -> tuple[Tensor, Tensor]:
            shift = clock.least(span.sinks, span.window, span.block) - span.sinks
            if self.late:
                shift = shift + torch.arange(span.sinks, device=shift.device)
            return rope.spread(shift, 1, wide, scaled=self.late)

        return rope.turn(sink_key, *tables.get(("sinks", span, id(rope), wide, self.late), make))

    def _block_mask(self, clock: Clock, like: Tensor, tables: Tables) -> Tensor:
        """What the query sees where a policy decides every few tokens, additive `(1, slots)`."""
        span, size = self.span, self.fields["key"].shape[2] - self.front

        def make() -> tuple[Tensor]:
            positions = clock.positions(span.sinks, self.slots, size)
            seen = positions >= clock.least(span.sinks, span.window, span.block)
            mask = torch.where(seen, 0.0, -torch.inf).to(like.dtype)[None]
            return (torch.nn.functional.pad(mask, (self.front, 0)),)

        return tables.get(("seen", span, self.slots, self.front, size, like.dtype), make)[0]

    def _first(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Takes in tokens that are sinks themselves."""
        start, m, tables, span = self.seen, q.shape[2], call.tables, self.span
        stop = start + m
        done = call.rotated or self.late
        mine = slice(span.own(start), span.own(stop))
        key = k if done else self._rotate(k, start, stop, tables)
        self._sink_key[:, :, mine] = span.mine(key, start)
        self._sink_value[:, :, mine] = span.mine(v, start)
        query = q if call.rotated else self._rotate(q, start, stop, tables)
        mask = self._mask(tables, start, m, sinks_only=True) if m > 1 else None
        key = self._sinks(mine.stop, stop, tables)
        self._advance(k)
        return self._attend((Part(query, key, self._sink_value[:, :, : mine.stop], mask),), call)

    def _sinks(self, count: int, length: int, tables: Tables) -> Tensor:
        """The keys of the first sinks held, rotated by their own places."""
        key = self._sink_key[:, :, :count]
        return self._rotate_sinks(key, 0, length, tables) if self.late else key

    def _rotate_sinks(self, key: Tensor, shift: int, length: int, tables: Tables) -> Tensor:
        """Sinks that are held un-rotated, rotated by their places and `shift` more."""
        rope, rank, size = self.spec.rope, self.span.rank, self.span.size
        if rope is None or size == 1:
            return self._rotate(key, shift, length, tables)
        stop = shift + rank + size * key.shape[2]
        cos, sin = tables.angles(rope, shift + rank, stop, length, key)
        return rope.turn(key, cos[::size], sin[::size])

    def _behind_sinks(
        self,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        start: int,
        length: int,
        tables: Tables,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values for the one query at `start`, with the sinks in front of them."""
        sinks, sink_key = self.sinks, self._turned_sinks(start, length, tables)
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (sinks, 0))
        if not self.front or self.late:
            key = torch.cat((sink_key, key), 2)
            value = torch.cat((self._sink_value, value), 2)
            return key, value, mask
        self.fields["key"][:, :, :sinks] = sink_key
        stop = sinks + key.shape[2]
        return self.fields["key"][:, :, :stop], self.fields["value"][:, :, :stop], mask

    def _turned_sinks(self, start: int, length: int, tables: Tables) -> Tensor:
        """The sinks' keys for the one query at `start`, in the frame of its window.

        They stand right before the oldest token that the query sees, which is where their places
        inside the cache put them; so one frame of positions serves all keys.
        """
        rope, sink_key = self.spec.rope, self._sink_key
        shift = self.span.least(start) - self.span.sinks
        if self.late:
            return self._rotate_sinks(sink_key, shift, length, tables)
        if rope is None or not shift:
            return sink_key
        angles = tables.angles(rope, shift, shift + 1, length, sink_key, scaled=False)
        return rope.turn(sink_key, *angles)

    def _attend(self, parts: tuple[Part | RawPart, ...], call: Call) -> Tensor:
        out, _ = attend(
            KVView(parts),
            scale=call.scale,
            softcap=call.softcap,
            sink_logits=call.sink_logits,
            counters=None if call.clock is None else call.clock.counters,
        )
        return out

    def _at_places(self, q: Tensor, start: int, length: int, call: Call) -> Tensor:
        """Queries rotated by their places inside the cache."""
        rope, m = self.spec.rope, q.shape[2]
        if rope is None:
            return q
        turned = call.rotated  # by places in the stream: the difference is left to turn
        name = (id(rope), self.span, start, m, rope.regime(length), q.dtype, q.device, turned)

        def make() -> tuple[Tensor, Tensor]:
            places = [self.span.place(i) - i * turned for i in range(start, start + m)]
            wide = torch.promote_types(q.dtype, torch.float32)
            positions = torch.tensor(places, device=q.device)
            return rope.spread(positions, length, wide, scaled=not turned)

        return rope.turn(q, *call.tables.get(("places", *name), make))

    def _rotate_slots(self, key: Tensor, start: int, m: int, length: int, tables: Tables) -> Tensor:
        """Keys as they lie in the slots (and `m` new ones behind them), rotated by position."""
        assert self.spec.rope is not None
        return self.spec.rope.turn(key, *self._slot_angles(key, start, m, length, tables))

    def _slot_angles(
        self, like: Tensor, start: int, m: int, length: int, tables: Tables
    ) -> tuple[Tensor, Tensor]:
        """What `rope.turn` takes for the keys as they lie in the slots."""
        rope = self.spec.rope
        assert rope is not None
        name = (
            "slots",
            id(rope),
            self.span,
            start,
            m,
            rope.regime(length),
            like.dtype,
            like.device,
        )

        def make() -> tuple[Tensor, Tensor]:
            wide = torch.promote_types(like.dtype, torch.float32)
            return rope.spread(self._positions(start, m, like.device), length, wide)

        cos, sin = tables.get(name, make)
        return cos, sin

    def _positions(self, start: int, m: int, device: torch.device) -> Tensor:
        """Stream positions of the keys that a segment reads, in the order in which it reads them.

        One new token is read where it was written; several are read behind the old ones.
        """
        span, sinks, slots = self.span, self.sinks, self.slots
        before, after = span.own(start), span.own(start + m)
        stop = after if m == 1 else before
        if slots is None or stop - sinks <= slots:
            old = span.positions(sinks, max(sinks, stop), device)
        else:
            slot = torch.arange(slots, device=device)
            last = stop - 1
            old = (last - ((last - sinks) % slots - slot) % slots) * span.size + span.rank
        if m == 1:
            return old
        return torch.cat((old, span.positions(before, after, device)))

    def _mask(self, tables: Tables, start: int, m: int, sinks_only: bool = False) -> Tensor:
        key = ("mask", self.span, self.slots, start, m, sinks_only, self.dtype, self.device)

        def make() -> tuple[Tensor]:
            query = torch.arange(start, start + m, device=self.device)[:, None]
            if sinks_only:
                position = self.span.positions(0, self.span.own(start + m), self.device)
                seen = position <= query
            else:
                position = self._positions(start, m, self.device)
                seen = position <= query
                if self.span.window is not None:
                    decided = query - query % self.span.block
                    seen &= position > decided - self.span.window
            mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
            return (mask.masked_fill_(~seen, float("-inf")),)

        return tables.get(key, make)[0]

    def _write(self, start: int, count: int, new: Fields) -> None:
        """Writes `new`, the own ones of `count` tokens from position `start` on, to their slots."""
        first = self.span.own(start) - self.sinks
        m = next(iter(new.values())).shape[2]
        slots = self.slots
        if slots is None:
            # Lanes that share a stream grow at once, and are full at once.
            past = self.span.share(start + count - self.span.sinks)
            self._grow(self._front_allotted + past)
            self._put(self.front + first, new)
            return
        skipped = max(0, m - slots)  # those would be overwritten by the same segment
        begin = (first + skipped) % slots
        fitting = min(m - skipped, slots - begin)
        self._put(
            self.front + begin, {n: x[:, :, skipped : skipped + fitting] for n, x in new.items()}
        )
        if skipped + fitting < m:
            self._put(self.front, {n: x[:, :, skipped + fitting :] for n, x in new.items()})

    def _grow(self, slots: int) -> None:
        held = next(iter(self.fields.values())).shape[2]
        if self.limit is not None and slots > self.limit:
            raise RuntimeError(
                f"policy keep-all: the cache is full with {held} tokens, all that max_bytes "
                "allows; a policy with a window streams on"
            )
        if slots <= held:
            return
        wanted = max(slots, int(held * 1.5)) if self.limit is None else slots
        slots = -(-wanted // _GROWTH) * _GROWTH if self.limit is None else wanted
        with torch.inference_mode(False):
            larger = self._allocate(self._holder, slots)
            for name, x in self.fields.items():
                larger[name][:, :, :held] = x
            self.fields = larger
