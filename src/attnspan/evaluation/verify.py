"""A plan beside real allocations: caches to the byte, prefill's peak, bytes per token."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnspan.cache import Storage
from attnspan.evaluation.loop import Progress
from attnspan.models import Cache, attach
from attnspan.models.interface import Refused, cache_name
from attnspan.planner.activations import Peak, prefill_peak
from attnspan.planner.configs import from_config
from attnspan.planner.engines import cache_bytes
from attnspan.planner.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from attnspan.policies import PerLayer, Policy

PEAK = 0.1
"""The share by which a prefill's peak may be off its plan before it counts as a miss."""

STEPS = 3
"""Steps of one token that follow the prefill."""

# The share of free memory that a run may be planned to.
_FREE = 0.8


@dataclass(frozen=True)
class Row:
    """One figure, planned and measured, in bytes.

    Attributes:
        what: of which cache or peak.
        planned: by the planner, from the config alone.
        measured: here.
        allowed: the share of `measured` by which the plan may be off.
        note: where the plan has its peak.
    """

    what: str
    planned: int
    measured: int
    allowed: float = 0.0
    note: str = ""

    @property
    def off(self) -> float | None:
        """The plan less what was measured, as a share of that; None: of nothing."""
        if self.planned == self.measured:
            return 0.0
        return (self.planned - self.measured) / self.measured if self.measured else None

    @property
    def miss(self) -> bool:
        return abs(self.planned - self.measured) > self.allowed * self.measured


def verify(
    model: PreTrainedModel,
    *,
    context: int = 1024,
    policies: Sequence[Policy | PerLayer] = (),
    storages: Sequence[Storage] = (),
    batch: int = 1,
    chunk: int | None = None,
    model_name: str | None = None,
    report: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Runs a model over one token again and again, and holds what it allocates against the plan.

    transformers' `DynamicCache` is measured after the prefill and after steps of one token, by the
    memory that its tensors keep alive; `attnspan.Cache` by its own count. The peak of the prefill
    is that of all tensors, kernels' buffers included, above weights and cache: on a CPU as torch's
    profiler sees its allocator, on CUDA as the allocator itself counts.

    Args:
        model: in eval mode, not attached.
        context: tokens of the prefill.
        policies: of `attnspan.Cache`, each in every one of `storages`.
        batch: sequences.
        chunk: tokens that go through the model at once; None: all.
        model_name: what errors call it; None: its class.
        report: called before each run, and at the end.

    Returns:
        `{"meta": ..., "rows": [row], "refused": [sentence]}`: what can't be run, or would take more
        than the free memory, is no row.

    Raises:
        ValueError: a size is wrong, the planner doesn't know the model, or its own forward fails.
    """
    sizes = {"context": context, "batch": batch, **({} if chunk is None else {"chunk": chunk})}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; a whole number of at least 1 is allowed")
    spec = from_config(model.config.to_dict())
    _check_device(model.device)
    run = _Run(model, model_name or type(model).__name__, spec, context, batch, chunk)
    runs = 2 + len(policies) * len(storages)
    done = iter(range(runs + 1))

    def tell() -> None:
        if report is not None:
            report(Progress("verify", next(done), runs, unit="runs"))

    found: list[Row | str] = [run.weights()]
    for standard in (False, True):
        tell()
        found += run.prefill(standard)
    try:
        with attach(model):
            for policy in policies:
                for storage in storages:
                    tell()
                    found += run.cache(policy, storage)
    except Refused as error:
        found.append(f"attnspan.Cache: {error}")
    tell()
    rows = [part for part in found if isinstance(part, Row)]
    meta = {
        "command": "verify",
        "family": spec.family,
        "context": context,
        "batch": batch,
        "chunk": chunk,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": run.threads,
        "peak_allowed": PEAK,
        "misses": sum(row.miss for row in rows),
    }
    described = [{**asdict(row), "off": row.off, "miss": row.miss} for row in rows]
    return {"meta": meta, "rows": described, "refused": [x for x in found if isinstance(x, str)]}


@dataclass(frozen=True)
class _Run:
    model: Any
    name: str
    spec: ModelSpec
    context: int
    batch: int
    chunk: int | None

    @property
    def itemsize(self) -> int:
        return self.model.dtype.itemsize

    @property
    def threads(self) -> int | None:
        """None on a GPU, as the planner has it."""
        return torch.get_num_threads() if self.model.device.type == "cpu" else None

    @property
    def step(self) -> int:
        """Tokens of one call of the prefill."""
        return min(self.chunk or self.context, self.context)

    @property
    def last(self) -> int:
        """Tokens of its last call."""
        return self.context % self.step or self.step

    def weights(self) -> Row:
        held = {x.data_ptr(): x.nbytes for x in self.model.parameters()}
        planned = self.spec.parameters * self.itemsize
        return Row("weights", planned, sum(held.values()))

    def prefill(self, standard: bool) -> Iterator[Row | str]:
        """The peak, and of sdpa, which comes first, transformers' cache too."""
        name = "eager" if standard else "sdpa"
        plan, left = self._peak(standard), self._planned(0, self.last)
        cache = self._dynamic()
        with _attention(self.model, name) as lacks:
            why = lacks or self._short(left + plan.bytes)
            if why:
                yield f"prefill with {name}: {why}"
            else:
                ids = self._ids
                if ids.device.type == "cuda":
                    self._call(
                        self._dynamic(), ids[:, :2]
                    )  # allots cuBLAS's workspace, which stays
                both = peak_bytes(lambda: self._feed(cache), ids.device)
                notes = " ".join((f"at {plan.phase}.", *plan.notes))
                peak = both - held_bytes(cache)
                yield Row(f"prefill's peak, {name}", plan.bytes, peak, PEAK, notes)
                yield Row(f"prefill's peak with its cache, {name}", left + plan.bytes, both, PEAK)
        if standard:
            return
        if lacks:  # the cache is the same whatever attends; if it's too much, eager's turn says so
            if self._short(left + self._peak(True).bytes):
                return
            self._feed(cache)
        elif why:
            return
        yield from self._caches(cache)

    def _peak(self, standard: bool) -> Peak:
        return prefill_peak(
            self.spec,
            self.context,
            batch=self.batch,
            itemsize=self.itemsize,
            attention="standard" if standard else "flash",
            engine="transformers",
            chunk=self.chunk,
            threads=self.threads,
            packs=packs(self.model.dtype),
        )

    def _own_call(self) -> int:
        """What the model itself holds in a call of the prefill that `attnspan.Cache` attends.

        No mask is made then, as in a model without windows.
        """
        return prefill_peak(
            replace(self.spec, windows=(None,) * self.spec.layers),
            self.step,
            batch=self.batch,
            itemsize=self.itemsize,
            engine="transformers",
            threads=self.threads,
        ).bytes

    def _short(self, planned: int) -> str:
        """Why so many bytes, and the tokens' ids, don't fit here; nothing if they do."""
        planned += self.batch * self.context * torch.long.itemsize
        free = _free(self.model.device)
        if free is None or planned <= _FREE * free:
            return ""
        return (
            f"{planned} bytes are planned and {free} are free here; a shorter context, a smaller "
            "batch or a smaller chunk is allowed"
        )

    def _caches(self, cache: DynamicCache) -> Iterator[Row]:
        prefill = held_bytes(cache)
        yield Row("transformers' cache after prefill", self._planned(0, self.last), prefill)
        sizes = []
        for _ in range(STEPS):
            self._step(cache)
            sizes.append(held_bytes(cache))
        planned = [self._planned(step, 1) for step in (STEPS - 1, STEPS)]
        yield Row(f"transformers' cache {STEPS} tokens on", planned[1], sizes[-1])
        yield Row("transformers: a further token", planned[1] - planned[0], sizes[-1] - sizes[-2])

    def _planned(self, further: int, call: int) -> int:
        return cache_bytes(
            self.spec,
            self.context + further,
            batch=self.batch,
            itemsize=self.itemsize,
            engine="transformers",
            call=call,
        ).total

    def cache(self, policy: Policy | PerLayer, storage: Storage) -> Iterator[Row | str]:
        """`attnspan.Cache` after the prefill and a few tokens on; the model is attached."""
        name = f"attnspan, {policy}, {storage}"
        try:
            planned = [
                cache_bytes(
                    self.spec,
                    tokens,
                    batch=self.batch,
                    policy=policy,
                    storage=storage,
                    itemsize=self.itemsize,
                    engine="attnspan",
                ).total
                for tokens in (self.context, self.context + STEPS)
            ]
            why = self._short(max(planned) + self._own_call())
            if why:
                yield f"{name}: {why}"
                return
            cache = Cache(self.model, policy, storage)
            self._feed(cache)
            measured = [cache.nbytes]
            for _ in range(STEPS):
                self._step(cache)
            measured.append(cache.nbytes)
        except ValueError as error:
            yield f"{name}: {error}"
            return
        yield Row(f"{name}: cache after prefill", planned[0], measured[0])
        yield Row(f"{name}: cache {STEPS} tokens on", planned[1], measured[1])

    def _dynamic(self) -> DynamicCache:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @cached_property
    def _ids(self) -> Tensor:
        """Of the prefill; they are there before it, and no part of its peak."""
        # One token again and again: what it is makes no difference to the bytes.
        return torch.ones((self.batch, self.context), dtype=torch.long, device=self.model.device)

    def _feed(self, cache: Any) -> None:
        for ids in self._ids.split(self.step, dim=1):
            self._call(cache, ids)

    def _step(self, cache: Any) -> None:
        self._call(cache, self._ids[:, :1])

    @torch.no_grad()
    def _call(self, cache: Any, ids: Tensor) -> None:
        try:
            self.model(ids, use_cache=True, logits_to_keep=1, **{cache_name(self.model): cache})
        except Exception as error:  # what a model's code raises is as various as that code
            if isinstance(cache, Cache):  # a failure of ours
                raise
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise ValueError(f"model {self.name} can't be run: {reason}") from error


def packs(dtype: torch.dtype) -> bool:
    """Whether torch's attention on this CPU lays keys and values of `dtype` out anew."""
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def held_bytes(cache: DynamicCache) -> int:
    """Memory that a transformers cache keeps alive, each tensor's whole storage once."""
    held = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that `run` has at once, above what was there before it.

    Raises:
        ValueError: its allocator can't be watched.
    """
    _check_device(device)
    gc.collect()  # what goes away meanwhile would count against what comes
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    results: Any = profiled.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r}: memory is measured on cpu and cuda alone")


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps the profiler's own lines, which C++ writes, off standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _attention(model: Any, name: str) -> Iterator[str]:
    """The model with that attention, then as it was; gives why it has none, or nothing."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        yield str(error).split(". ")[0].splitlines()[0]
        return
    try:
        yield ""
    finally:
        model.set_attn_implementation(before)


def _free(device: torch.device) -> int | None:
    """Free bytes of the device; None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # Linux alone has it
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), None)
