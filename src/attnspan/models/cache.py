"""The cache that Hugging Face models take: any policy, any storage, a layer each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin

from attnspan.cache.clock import Clock
from attnspan.cache.lane import Call
from attnspan.cache.layer import LayerCache, Span
from attnspan.cache.storage import Dense, Storage
from attnspan.cache.tables import Tables
from attnspan.models.anatomy import Anatomy, anatomy_of
from attnspan.models.budget import held_limit, planned_tables, resolve
from attnspan.policies import PerLayer, Policy
from attnspan.ring.cache import SharedStream
from attnspan.ring.groups import transport_of


class Cache(TransformersCache):
    """Keys and values of a stream, bounded by a policy.

    It works inside `attnspan.attach(model)`, with `model(...)` and `model.generate(...)`; an
    unattached model that meets it raises. Rows of a batch may be padded left or right.

    Args:
        model: the model that the cache is for, as given to `attach`.
        policy: which tokens stay, for every layer or a `PerLayer`; layers that the model trained
            with a sliding window keep exactly that window.
        storage: how keys and values are held: `Dense()`, `Int8()` or `Int4()`.
        max_bytes: a hard bound on the cache's bytes, what it stages while it works included.
        rollback: how many tokens `crop` may take back.
        chunk: longer inputs go through the model in chunks of so many tokens.
        ring: processes that share the cache, as a ProcessGroup, a DeviceMesh of one dimension or a
            `Transport` (`attnspan.ring.groups.transport_of(group, deadline)` gives one that waits
            other than ten seconds); None: this process alone. Each runs the model, with the same
            weights, on the same tokens, and holds one in N of the keys and values; in each layer
            one small exchange gives all of them the exact output. The policies are KeepAll, Window
            and SinkWindow, each with any storage; `max_bytes` bounds each process. What one process
            calls with, or has seen, must be what all do: otherwise every call raises `RingMismatch`
            on all of them, and nothing has changed.

    Raises:
        ValueError: where the model can't be cached exactly, a size is wrong, `max_bytes` is too
            small or a ring can't share such a cache; the sentence names which.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy | PerLayer,
        storage: Storage | None = None,
        *,
        max_bytes: int | None = None,
        rollback: int = 0,
        chunk: int = 1024,
        ring: Any = None,
    ) -> None:
        for name, value, least in (
            ("max_bytes", max_bytes, 1),
            ("rollback", rollback, 0),
            ("chunk", chunk, 1),
        ):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(
                    f"{name} is {value!r}; a whole number of at least {least} is allowed"
                )
        if not isinstance(policy, Policy | PerLayer):
            raise TypeError(
                f"policy is {policy!r}; a policy such as SinkWindow(4, 1020) is allowed"
            )
        if not isinstance(storage, Storage | None):
            raise TypeError(f"storage is {storage!r}; Dense(), Int8() or Int4() is allowed")
        self.model = model
        self.anatomy: Anatomy = anatomy_of(model)
        self.policy = policy
        self.storage = storage if storage is not None else Dense()
        self.max_bytes, self.rollback, self.chunk = max_bytes, rollback, chunk
        self.policies = resolve(policy, self.anatomy.layers)
        self.ring = None
        if ring is not None:
            transport = transport_of(ring, device=self.device)
            self.ring = SharedStream(transport, self.policies, rollback)
        self.tables = Tables()
        self.caches: list[LayerCache] = []
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self._clear()
        self._check_budget(batch=1)
        super().__init__(layers=[_Layer(self, i) for i in range(len(self.policies))])

    def _clear(self) -> None:
        self.caches = self._empty()
        self.rows: list[list[int]] = []  # the batch rows of each lane
        self.seen: list[int] = []  # the tokens that each lane has seen
        # The columns of each lane's tokens, as runs (start, stop): padding is what lies between.
        self.runs: list[list[tuple[int, int]]] = []
        self.columns = 0  # padding included, which is what transformers counts
        self.spans: list[Span] | None = None
        self.undoable = 0
        self.peak_bytes = 0
        self.peak_tokens_held = 0
        self.broken = False
        self.clock: Clock | None = None
        if self.ring is not None:
            self.ring.trail = self.ring.weights = ""

    def _empty(self, limit: int | None = None) -> list[LayerCache]:
        makers = [
            None if self.ring is None else self.ring.maker(i) for i in range(len(self.policies))
        ]
        return [
            LayerCache(layer.spec, policy, self.storage, limit, self.rollback, maker)
            for layer, policy, maker in zip(self.anatomy.layers, self.policies, makers, strict=True)
        ]

    # What users ask ---------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes allocated now: keys, values, scales, scores, positions and journals.

        With a ring, those of this process.
        """
        return sum(cache.nbytes for cache in self.caches)

    @property
    def total_nbytes(self) -> int:
        """Bytes allocated now in all processes of the ring together: each has as many."""
        return self.nbytes * (1 if self.ring is None else self.ring.transport.size)

    @property
    def tokens_seen(self) -> int:
        """Tokens that went by, padding not counted, in the row that saw most."""
        return max(self.seen, default=0)

    @property
    def tokens_held(self) -> int:
        """Slots in use, in the layer and row that hold most; with a ring, in this process."""
        return max((lane.tokens_held for c in self.caches for lane in c.lanes), default=0)

    def __repr__(self) -> str:
        ring = "" if self.ring is None else f"{self.ring}, "
        return (
            f"Cache({self.policy}, {self.storage}, {ring}{self.tokens_seen} tokens seen, "
            f"{self.tokens_held} held, {self.nbytes} bytes)"
        )

    # One forward, called by the attachment ------------------------------------------------------

    def agree(self, call: Mapping[str, Any]) -> None:
        """With a ring, holds what a call brings, and how the cache stands, against all processes.

        Nothing of the cache changes if this raises.

        Raises:
            RingMismatch: on every process alike, where one of them differs.
            RingPeerLost: a process is gone or hangs.
        """
        if self.ring is None:
            return
        if not self.ring.weights:
            self.ring.weights = model_fingerprint(self.model)  # once a stream: it reads them all
        names = ("policy", "storage", "dtype", "max_bytes", "chunk", "columns", "broken")
        standing = {name: str(getattr(self, name)) for name in names}
        self.ring.agree({**standing, "device": self.device.type}, call)

    def new_tokens(self, batch: int, width: int, mask: Any) -> Tensor | None:
        """Which of `width` new columns are tokens, bool `(batch, width)` on the CPU; None: all.

        Raises:
            ValueError: when `mask` is no mask of the new columns, or of all columns, that leaves
                tokens together and past columns as they were.
        """
        if self.rows and batch != self.batch_size:
            raise ValueError(f"the batch has {batch} rows; the cache holds {self.batch_size}")
        if mask is None:
            return None
        shapes = {(batch, width), (batch, self.columns + width)}
        if not isinstance(mask, Tensor) or tuple(mask.shape) not in shapes:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask is {got}; with an attnspan.Cache "
                f"{' or '.join(map(str, sorted(shapes)))} is allowed, which marks padding"
            )
        marks = mask.cpu()  # the one copy to the host
        if marks.is_floating_point() and not ((marks == 0) | (marks == 1)).all():
            raise ValueError(
                "attention_mask has other numbers than 0 and 1; with an attnspan.Cache it marks "
                "tokens by 1 and padding by 0, and isn't added to scores"
            )
        marks = marks.bool()
        past, new = marks[:, :-width], marks[:, -width:]
        if past.shape[1]:
            held = torch.zeros_like(past)
            for rows, runs in zip(self.rows, self.runs, strict=True):
                for start, stop in runs:
                    held[rows, start:stop] = True
            if not torch.equal(past, held):
                raise ValueError(
                    "attention_mask marks past columns otherwise than when they went by; what a "
                    "cache has taken in stays"
                )
        _edges(batch, width, new)
        return new

    def begin(self, batch: int, width: int, new: Tensor | None) -> None:
        """Plans a forward over `width` new columns; `new`, of `new_tokens`, marks the tokens.

        Nothing of the cache changes if this raises.
        """
        if self.broken:
            raise RuntimeError("the cache was left half-updated by a failed forward: call reset()")
        if not self.rows:
            self._check_budget(batch)
        edges = _edges(batch, width, new)
        rows = self.rows or [list(range(batch))]
        self._split(rows, edges)
        self.spans = []
        for lane, members in enumerate(self.rows):
            start, stop = edges[members[0]]
            everyone = len(members) == batch
            if stop > start:
                index = None if everyone else torch.tensor(members, device=self.device)
                self.spans.append(Span(lane, index, start, stop))
                self.seen[lane] += stop - start
                self.runs[lane] = _joined(
                    self.runs[lane], (self.columns + start, self.columns + stop)
                )
        self.columns += width
        self.undoable = min(self.rollback, self.undoable + width)

    def _split(self, rows: list[list[int]], edges: list[tuple[int, int]]) -> None:
        """Lanes are split where their rows no longer go in step."""
        seen, runs = self.seen or [0], self.runs or [[]]
        self.rows, self.seen, self.runs = [], [], []
        for lane, members in enumerate(rows):
            groups: dict[tuple[int, int], list[int]] = {}
            for row in members:
                groups.setdefault(edges[row], []).append(row)
            if len(groups) > 1:
                places = [torch.tensor([members.index(r) for r in g]) for g in groups.values()]
                for cache in self.caches:
                    if cache.lanes:
                        cache.split(len(self.rows), places)
            self.rows += groups.values()
            self.seen += [seen[lane]] * len(groups)
            self.runs += [list(runs[lane]) for _ in groups]

    @property
    def device(self) -> torch.device:
        """That of the model's first parameter, and so of the cache's first layer."""
        return next(self.model.parameters()).device

    @cached_property
    def _by_place(self) -> bool:
        """Whether keys are held as the model itself can rotate them: by place, without loss."""
        ropes = [layer.spec.rope for layer in self.anatomy.layers]
        return (
            self.dtype in (torch.float32, torch.float64)  # models round angles to their own dtype
            and not (self.storage.warmup or self.rollback)  # what is undone runs again un-rotated
            and all(policy.band is not None for policy in self.policies)
            and not any(r.depends_on_length or r.attention_factor() != 1 for r in ropes if r)
            and all(angles.rope is not None for angles in self.anatomy.angles.values())
        )

    @property
    def in_step(self) -> bool:
        """Whether the forward under way may leave rotation to the model: no row is padded."""
        return self._by_place and self.seen == [self.columns] and self.clock is None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
        """Layer `layer`'s attention over what its policy holds and the new keys and values."""
        if self.spans is None:
            raise RuntimeError("attend is for a model inside attnspan.attach")
        cache = self.caches[layer]
        if not cache.lanes:
            cache.start([len(r) for r in self.rows], k.dtype, k.device)
        return cache.attend(q, k, v, self.spans, Call(self.tables, clock=self.clock, **call))

    # Steps whose place the device knows -----------------------------------------------------------

    def lacks_step(self) -> str | None:
        """Why no step can be taken by a clock now, as the end of a sentence; None: it can."""
        if self.broken:
            return "the cache was left half-updated by a failed forward"
        if not self.rows:
            return "the cache is empty: feed the first tokens through the model"
        if len(self.rows) > 1 or self.seen != [self.columns]:
            return "rows of its batch are padded, and don't go in step"
        if self.rollback:
            return f"the cache keeps what undoing {self.rollback} tokens needs (rollback)"
        lacks = (lane.lacks_step() for cache in self.caches for lane in cache.lanes)
        return next((lack for lack in lacks if lack), None)

    @property
    def steps_from(self) -> int:
        """How many tokens must have gone by before steps by a clock: sinks, and learned means."""
        lanes = [lane for cache in self.caches for lane in cache.lanes]
        return max((lane.steps_from for lane in lanes), default=1)

    @contextmanager
    def clocked(self, clock: Clock) -> Iterator[None]:
        """Inside, a forward is a step of one token for each row at the place that `clock` knows.

        It writes keys and values and counts nothing: `count_step` does, once for each step taken.

        Raises:
            ValueError: when `lacks_step` says why not.
        """
        if (lack := self.lacks_step()) is not None:
            raise ValueError(f"no step can be taken by a clock: {lack}")
        for cache in self.caches:
            for lane in cache.lanes:
                lane.make_room()
        self.tables.clear()
        self.clock, self.spans = clock, [Span(0, None, 0, 1)]
        try:
            yield
        finally:
            self.clock = self.spans = None
            self.tables.clear()

    def count_step(self) -> None:
        """Counts one token for each row, which a step by a clock has taken in."""
        self.begin(self.batch_size, 1, None)
        for cache in self.caches:
            for lane in cache.lanes:
                lane.seen += 1
        self.end(failed=False)

    def end(self, failed: bool) -> None:
        """Closes a forward."""
        self.spans, self.broken = None, failed
        self.tables.clear()
        if min(self.seen) <= self._steady_from:
            self.peak_bytes = max(self.peak_bytes, self.nbytes)
            self.peak_tokens_held = max(
                min(self.tokens_seen, p.capacity or self.tokens_seen) for p in self.policies
            )
            if self.ring is not None:
                self.peak_tokens_held = self.tokens_held

    @cached_property
    def _steady_from(self) -> float:
        """The tokens seen after which neither bytes nor slots in use can grow any more."""
        most = [float("inf") if p.capacity is None else p.capacity for p in self.policies]
        # Journals and means settle later than slots: after two undo depths, and after a warm-up.
        return max(most) + 4 * (self.rollback + self.chunk + self.storage.warmup)

    def _check_budget(self, batch: int) -> None:
        if self.max_bytes is None:
            return
        limit = held_limit(self, batch)
        self.tables.limit = planned_tables(self, limit)
        for cache in self.caches:
            cache.bound(limit)

    # What transformers calls --------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Marks the keys for the attention, which takes them in: only it sees the queries."""
        return _marked(self, key_states, layer_idx), value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that went by, padding included; never the slots held."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # a stream has no end

    @property
    def batch_size(self) -> int:
        return sum(len(r) for r in self.rows) or -1

    def reset(self) -> None:
        """Forgets the stream."""
        self._clear()
        self._check_budget(batch=1)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` columns, padding included, at most `rollback`.

        Raises:
            ValueError: when that many can't be taken back.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted generation counts in tensors
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}; a negative number, how many tokens to "
                "take back, is allowed"
            )
        tokens = -tokens_to_remove
        if tokens == 0:
            return
        if tokens > self.undoable:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}; with rollback={self.rollback}, "
                f"{self.undoable} tokens can be taken back now"
            )
        left = self.columns - tokens
        runs = [[(a, min(b, left)) for a, b in lane if a < left] for lane in self.runs]
        seen = [sum(b - a for a, b in lane) for lane in runs]
        undone = [before - after for before, after in zip(self.seen, seen, strict=True)]
        for cache in self.caches:
            cache.undo(undone, self.tables)
        self.tables.clear()
        self.runs, self.seen, self.columns = runs, seen, left
        self.undoable -= tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other."""
        if self.rows:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row `i` becomes what row `indices[i]` was."""
        self.agree({"the rows chosen": indices})
        if not self.rows:
            return
        indices = indices.cpu()
        self._make_room(len(indices))
        lane_of = {row: (lane, at) for lane, m in enumerate(self.rows) for at, row in enumerate(m)}
        chosen: dict[int, list[tuple[int, int]]] = {}
        for new, old in enumerate(indices.tolist()):
            lane, at = lane_of[old]
            chosen.setdefault(lane, []).append((new, at))
        for cache in self.caches:
            cache.select({lane: torch.tensor([at for _, at in c]) for lane, c in chosen.items()})
        self.rows = [[new for new, _ in c] for c in chosen.values()]
        self.seen = [self.seen[lane] for lane in chosen]
        self.runs = [list(self.runs[lane]) for lane in chosen]

    def _make_room(self, batch: int) -> None:
        """Bounds the layers for another batch; raises ValueError where that passes the budget."""
        if self.max_bytes is None:
            return
        limit = held_limit(self, batch)
        open_ended = [c for c in self.caches if c.policy.capacity is None]
        slots = max((lane.tokens_held for c in open_ended for lane in c.lanes), default=0)
        # One layer after the other is copied, so its old rows and its new ones stand side by side.
        largest = max(cache.nbytes for cache in self.caches)
        needed = self.nbytes * batch // self.batch_size + largest
        if needed > self.max_bytes or (limit is not None and slots > limit):
            raise ValueError(
                f"a batch of {batch} doesn't fit max_bytes, {self.max_bytes}: "
                f"{self.tokens_held} tokens are held in {self.nbytes} bytes for {self.batch_size}, "
                "and a layer's old and new rows stand side by side while they are copied"
            )
        for cache in self.caches:
            cache.bound(limit)
        self.tables.limit = planned_tables(self, limit)

    # Snapshots ------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """What a saved state must agree with: model, policy, storage, dtype, rollback and rank."""
        return {
            "model": model_fingerprint(self.model),
            "policy": str(self.policy),
            "storage": str(self.storage),
            "dtype": str(self.dtype).removeprefix("torch."),
            "rollback": self.rollback,
            "ring": None if self.ring is None else str(self.ring),
        }

    def state(self, copy: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON that `load_state` of a like cache takes over bit for bit.

        With a ring, this process's part: every process saves, and loads, its own.

        Args:
            copy: False gives the cache's own memory, which its next call overwrites: for whoever
                saves it before.
        """
        tensors: dict[str, Tensor] = {}
        layers = []
        for i, cache in enumerate(self.caches):
            named, counts = cache.state()
            tensors |= {f"{i}.{name}": x.clone() if copy else x for name, x in named.items()}
            layers.append(counts)
        names = ("rows", "seen", "runs", "columns", "peak_bytes", "peak_tokens_held")
        meta = {name: getattr(self, name) for name in names}
        if self.ring is not None:
            meta["trail"] = self.ring.trail
        return tensors, {**meta, "layers": layers, "fingerprint": self.fingerprint()}

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Takes over what `state` gave; tokens from before can't be taken back by `crop`.

        Raises:
            ValueError: when the state is of another model, policy or storage, isn't whole, or
                doesn't fit `max_bytes`. The cache is then as it was.
        """
        ours = self.fingerprint()
        for name, value in ours.items():
            theirs = meta.get("fingerprint", {}).get(name)
            if theirs != value:
                raise ValueError(
                    f"the state was saved with {name} {theirs!r}; this cache has {value!r}"
                )
        names = ("rows", "seen", "runs", "columns", "peak_bytes", "peak_tokens_held")
        shared = () if self.ring is None else ("trail",)
        missing = [name for name in (*names, "layers", *shared) if name not in meta]
        if missing or len(meta["layers"]) != len(self.caches):
            raise ValueError(f"the state is not whole: {missing or 'some layers'} missing")
        limit = None
        if self.max_bytes is not None:
            limit = held_limit(self, sum(map(len, meta["rows"])) or 1)
        counted = all(
            isinstance(lane, dict) and isinstance(lane.get("batch"), int) and "seen" in lane
            for layer in meta["layers"]
            for lane in layer
        )
        if not counted:
            raise ValueError("the state is not whole: a layer's counts are missing")
        named: list[dict[str, Tensor]] = [{} for _ in self.caches]
        for name, x in tensors.items():
            layer, _, rest = name.partition(".")
            if not layer.isdecimal() or int(layer) >= len(named):
                raise ValueError(f"the state has a tensor {name!r} of no layer of this cache")
            named[int(layer)][rest] = x
        # Held against what this cache would allocate first; only then are old layers let go.
        nowhere = torch.device("meta")
        for cache, own, counts in zip(self._empty(limit), named, meta["layers"], strict=True):
            cache.restore({n: x.to(nowhere) for n, x in own.items()}, counts, self.dtype, nowhere)
        self._clear()
        self.caches = self._empty(limit)
        for cache, own, counts in zip(self.caches, named, meta["layers"], strict=True):
            cache.restore(own, counts, self.dtype, self.device)
        for name in names:
            setattr(self, name, meta[name])
        self.runs = [[(a, b) for a, b in lane] for lane in self.runs]
        if self.ring is not None:
            self.ring.trail = meta["trail"]
        self._check_budget(self.batch_size if self.rows else 1)


def _mark(cache: Cache, key_states: Tensor, layer_idx: int) -> Tensor:
    if cache.spans is None:
        raise RuntimeError(
            "this attnspan.Cache met a model that is not attached: "
            "call it inside `with attnspan.attach(model):`"
        )
    key_states.attnspan_layer = layer_idx  # type: ignore[attr-defined]
    return key_states


# Compiled layers leave it to itself: a layer's number and a cache's state are no constants of them.
_marked: Any = torch.compiler.disable(_mark)


class _Layer(CacheLayerMixin):
    """What transformers asks of a layer; the work is done by the cache."""

    supports_early_init = False

    def __init__(self, cache: Cache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index
        self.is_croppable = cache.rollback > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Lanes are made at the first attention."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        return self.cache.update(key_states, value_states, self.index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns, 0

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_max_length(self) -> int:
        return -1


def model_fingerprint(model: nn.Module) -> str:
    """A digest of the model's config and of a sample of every parameter."""
    config = model.config.to_dict()  # type: ignore[union-attr,operator]
    for passing in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(passing, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _joined(runs: list[tuple[int, int]], new: tuple[int, int]) -> list[tuple[int, int]]:
    if runs and runs[-1][1] == new[0]:
        return [*runs[:-1], (runs[-1][0], new[1])]
    return [*runs, new]


def _edges(batch: int, width: int, new: Tensor | None) -> list[tuple[int, int]]:
    """Each row's first token and the column after its last, of the new columns."""
    if new is None:
        return [(0, width)] * batch
    counts, firsts = new.sum(1).tolist(), new.int().argmax(1).tolist()
    edges = [(first, first + count) for first, count in zip(firsts, counts, strict=True)]
    for row, (start, stop) in enumerate(edges):
        if not new[row, start:stop].all():
            raise ValueError(
                f"attention_mask has a hole in row {row}; padding to the left or right is allowed"
            )
    return edges
