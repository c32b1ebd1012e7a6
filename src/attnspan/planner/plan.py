"""What a context costs: memory, operations, bytes and seconds, before anything is loaded.

Every figure is a formula of the model's shape; `Plan.explain` prints each with its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner import activations
from attnspan.planner.activations import Peak, prefill_peak
from attnspan.planner.configs import from_config
from attnspan.planner.engines import cache_bytes
from attnspan.planner.held import CacheBytes, layer_policies
from attnspan.planner.layers import (
    Kind,
    every_layer,
    layer_kinds,
    layer_views,
    needs_scores,
    pattern_cache,
    ring_patterns,
    token_bytes,
)
from attnspan.planner.links import GPUS, Device, Link, Machine, find_device, machine
from attnspan.planner.operations import Phase, decode, prefill
from attnspan.planner.presets import model as find_model
from attnspan.planner.quantities import MOST_TOKENS, shown, size
from attnspan.planner.reach import bound
from attnspan.planner.spec import ModelSpec
from attnspan.planner.stack import Factor, stack
from attnspan.planner.weight_bytes import distinct, weight_bytes
from attnspan.policies import PerLayer, Policy, parse

if TYPE_CHECKING:
    from attnspan.patterns.algebra import Pattern
    from attnspan.planner.compare import Row
    from attnspan.planner.explain import Line
    from attnspan.planner.prefill import Prefill

ITEMSIZE = 2  # bytes of a number in bf16, which everything dense is held in


@dataclass(frozen=True)
class Working:
    """Attention's working memory in prefill.

    Attributes:
        head: bytes of one head's and layer's matrix of scores, in bf16.
        standard: what an implementation that makes it has alive at once, of all heads.
        flash: what one has that goes through the keys block by block.
    """

    head: int
    standard: int
    flash: int


@dataclass(frozen=True)
class Plan:
    """What a context costs. `str(plan)` is the report.

    Sizes are bytes, and of one device where there are several.

    Attributes:
        spec: the model.
        context: tokens of each sequence.
        batch: sequences.
        policy, pattern: as asked; None: what the model has.
        storage: of the cache.
        weights_kind: of the weights.
        engine: whose allocation the cache's bytes are.
        chunk: tokens of a prefill's step; None: all at once.
        devices: how many share the context.
        device, link: their rates.
        memory: of a device; None: not known.
        kinds: the layers.
        cache: keys and values, allocated, of all devices.
        cache_share: the same, of one device.
        weights: bytes.
        activations: the most that prefill holds beside weights and cache; on a ring with what its
            schedule holds.
        working: of it, attention's.
        prefill, decode: decode is the step that adds the context's last token.
        token_bytes: keys and values of one token in one layer, as stored.
        ring: the prefill on several devices.
        notes: what else should be known, in sentences.
    """

    spec: ModelSpec
    context: int
    batch: int
    policy: Policy | PerLayer | None
    pattern: str | None
    storage: str
    weights_kind: str
    engine: str
    chunk: int | None
    devices: int
    device: Device
    link: Link | None
    memory: int | None
    kinds: tuple[Kind, ...]
    cache: CacheBytes
    cache_share: int
    weights: int
    activations: Peak
    working: Working
    prefill: Phase
    decode: Phase | None
    token_bytes: int
    ring: Prefill | None
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """Weights, cache and activations of a device."""
        return self.weights + self.cache_share + self.activations.bytes

    @property
    def spare(self) -> int | None:
        """Bytes of a device that are left, or lack where it is negative."""
        return None if self.memory is None else self.memory - self.total

    @property
    def fits(self) -> bool | None:
        return None if self.spare is None else self.spare >= 0

    @property
    def reach(self) -> int | None:
        """How many tokens back one can influence the present one at most, kept sinks left out.

        None: any number, or, under a pattern or where scores choose what is kept, not told.
        """
        if self.pattern is not None:
            return None
        kept = layer_policies(self.spec, self.policy)
        if any(policy.band is None for policy in kept):
            return None
        windows = [None if p.capacity is None else p.capacity - p.leading for p in kept]
        chunked = self.spec.chunked and self.policy is None
        return bound(windows, chunked=chunked, shares=self.spec.shares)

    @cached_property
    def stack(self) -> tuple[Factor, ...]:
        """What each optimisation does, and to what; the cache's factors multiply to their whole."""
        return stack(self)

    def compare(self, budget: int | None = None) -> tuple[Row, ...]:
        """The same with other policies and patterns of the same budget of tokens."""
        from attnspan.planner.compare import compare

        return compare(self, budget)

    def explain(self) -> tuple[Line, ...]:
        """Each figure's formula with the numbers in it."""
        from attnspan.planner.explain import explain

        return explain(self)

    def as_dict(self) -> dict[str, Any]:
        """All of it, fit for JSON."""
        from attnspan.planner.report import as_dict

        return as_dict(self)

    def __str__(self) -> str:
        from attnspan.planner.report import report

        return report(self)


def plan(
    model: str | Path | Mapping[str, Any] | ModelSpec,
    context: int,
    *,
    policy: Policy | PerLayer | str | None = None,
    pattern: Pattern | str | Sequence[Pattern] | None = None,
    storage: object = "dense",
    batch: int = 1,
    devices: int = 1,
    memory: int | str | None = None,
    device: str | Device = "h100",
    link: str | None = None,
    weights: str = "bf16",
    engine: str = "theory",
    chunk: int | None = None,
) -> Plan:
    """What a context costs, from formulas alone: nothing is loaded, and no torch.

    Args:
        model: a preset's name, the path of a `config.json` or its folder, what it holds, or a spec.
        context: tokens of each sequence.
        policy: which tokens the cache keeps, a value or its SPEC text. It acts on the layers that
            see everything, or on all where all slide. None: all that the model can see.
        pattern: which pairs see each other, of all layers or one for each, instead of a policy.
        storage: how the cache holds them: "dense", "int8" or "int4".
        batch: sequences.
        devices: that share the context in a ring; each holds all weights.
        memory: bytes of a device, or text such as "80GiB"; None: the device's own.
        device: a preset, "calibrated", or a file (`attnspan.planner.links.find_device`).
        link: between devices (`attnspan.planner.links.machine`); None: "ib" where there are any.
        weights: "bf16", "int8" or "int4" (`attnspan.planner.weight_bytes.weight_bytes`).
        engine: whose allocation is counted (`attnspan.planner.engines`).
        chunk: tokens of a step of prefill; None: the whole prompt at once.

    Raises:
        ValueError: one sentence that names the argument, its value and what is allowed.

    >>> found = plan("mistral-7b", 131_072)
    >>> found.cache.total, found.weights, found.fits
    (536870912, 14483464192, True)
    >>> plan("mistral-7b", 131_072, policy="sinks:4+window:4092", storage="int8").cache.total
    272629760
    """
    spec = _spec(model)
    _check_counts(context=(context, MOST_TOKENS), batch=(batch, 2**20), devices=(devices, 1024))
    if chunk is not None:
        _check_counts(chunk=(chunk, MOST_TOKENS))
    if isinstance(policy, str):
        policy = parse(policy)
    if isinstance(pattern, str):
        from attnspan.patterns.text import parse as parse_pattern

        pattern = parse_pattern(pattern)
    _check_combination(policy, pattern, engine, devices, chunk, link)
    rates = device if isinstance(device, Device) else find_device(device)
    if memory is None:
        limit = None if rates.memory is None else int(rates.memory)
    else:
        limit = size(memory) if isinstance(memory, str) else memory
        _check_counts(memory=(limit, 2**62))

    patterns = None if pattern is None else every_layer(pattern, spec)
    views, words = layer_views(spec, policy, patterns)
    token = token_bytes(spec, str(storage))
    if patterns is None:
        cache = cache_bytes(
            spec, context, batch=batch, policy=policy, storage=storage, engine=engine
        )
    else:
        cache = pattern_cache(spec, views, context, batch, token)
    kinds = layer_kinds(spec, views, words, cache, context, patterns is not None)
    held_weights = weight_bytes(spec, weights)
    peak, working = _activations(spec, context, batch, engine, chunk, devices, rates)
    if engine == "transformers":
        peak = _with_slices(peak, spec, context, batch, chunk, cache.total)
    ring, share, hop = None, cache.total, None
    if devices > 1:
        from attnspan.planner.prefill import Simulation

        hop = machine(link or "ib").link
        patterns = ring_patterns(spec, policy) if patterns is None else patterns
        simulation = Simulation(spec, context, Machine(rates, hop), pattern=patterns)
        ring = simulation.prefill(devices, "ring")  # of all schedules it holds the least
        # `attnspan.Cache(..., ring=...)` deals its slots out evenly.
        share = sum(batch * -(-layer.slots // devices) * token for layer in cache.layers)
        held = ring.memory - ring.weights - ring.cache
        peak = Peak(held, "a layer", (("a layer, and what the ring's schedule holds", held),), 0)
    received = 0 if ring is None else ring.sent
    ahead = prefill(spec, kinds, context, batch, weights, rates, devices, token, received, chunk)
    if ring is not None:
        ahead = replace(ahead, seconds=batch * ring.seconds)
    step = None
    if all(view.decodes(context) for view in set(views)):
        step = decode(spec, kinds, batch, weights, rates, devices, token, hop)
    return Plan(
        spec=spec,
        context=context,
        batch=batch,
        policy=policy,
        pattern=None if pattern is None else _pattern_text(pattern),
        storage=str(storage),
        weights_kind=weights,
        engine=engine,
        chunk=chunk,
        devices=devices,
        device=rates,
        link=hop,
        memory=limit,
        kinds=kinds,
        cache=cache,
        cache_share=share,
        weights=held_weights,
        activations=peak,
        working=working,
        prefill=ahead,
        decode=step,
        token_bytes=token,
        ring=ring,
        notes=_notes(
            spec,
            context,
            batch,
            cache,
            weights,
            devices,
            kinds,
            step is not None,
            pattern is not None,
            needs_scores(spec, policy),
        )
        + peak.notes,
    )


def _spec(model: str | Path | Mapping[str, Any] | ModelSpec) -> ModelSpec:
    if isinstance(model, ModelSpec):
        return model
    return from_config(model) if isinstance(model, Mapping) else find_model(str(model))


def _check_counts(**values: tuple[Any, int]) -> None:
    for name, (value, most) in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name} is {value!r}; a whole number from 1 to {most} is allowed")


def _check_combination(
    policy: Policy | PerLayer | None,
    pattern: object,
    engine: str,
    devices: int,
    chunk: int | None,
    link: str | None,
) -> None:
    if policy is not None and pattern is not None:
        raise ValueError(f"policy is {policy} and pattern {pattern}; one of them is allowed")
    if link is not None and devices == 1:
        raise ValueError(f"link is {link} with one device; it is allowed with more")
    if pattern is not None and engine != "theory":
        raise ValueError(
            f"pattern {pattern}: engine {engine} holds what the model's own layers see; theory is "
            "allowed"
        )
    if devices > 1 and engine != "theory":
        raise ValueError(
            f"devices is {devices}: engine {engine} isn't planned on a ring; theory is allowed"
        )
    if devices > 1 and chunk is not None:
        raise ValueError(
            f"chunk is {chunk} on {devices} devices; a ring's prefill is planned in one step alone"
        )


def _pattern_text(pattern: Pattern | Sequence[Pattern]) -> str:
    if isinstance(pattern, Sequence):
        return "; ".join(str(each) for each in pattern)
    return str(pattern)


def _activations(
    spec: ModelSpec,
    context: int,
    batch: int,
    engine: str,
    chunk: int | None,
    devices: int,
    device: Device,
) -> tuple[Peak, Working]:
    """Engines whose prefill isn't known are given the least there is."""
    known = engine if engine in activations.FOLLOWED else "theory"
    threads = None if device.name in GPUS else 1
    flash, standard = (
        prefill_peak(
            spec,
            context,
            batch=batch,
            attention=kind,
            engine=known,
            chunk=chunk,
            threads=threads,
        )
        for kind in ("flash", "standard")
    )
    rows = min(-(-context // devices), chunk or context)
    head, every = rows * context * ITEMSIZE, batch * spec.heads
    if devices > 1:
        return flash, Working(head, every * head, 4 * every * rows)
    # Where something else of a layer is wider, the peak isn't attention's.
    alive = standard.working or every * head
    return flash, Working(head, alive, flash.working or 4 * every * rows)


def _with_slices(
    peak: Peak, spec: ModelSpec, context: int, batch: int, chunk: int | None, cache: int
) -> Peak:
    """Its bytes are above the cache as the prefill leaves it, of which sliding layers hold all that
    the last call joined; the plan's cache is that of a step of decoding, which frees it."""
    call = min(chunk or context, context)
    last = context % call or call
    left = cache_bytes(spec, context, batch=batch, engine="transformers", call=last).total - cache
    if not left:
        return peak
    parts = (*peak.parts, ("what sliding layers keep of the last call", left))
    return replace(peak, bytes=peak.bytes + left, parts=parts)


def _notes(
    spec: ModelSpec,
    context: int,
    batch: int,
    cache: CacheBytes,
    weights: str,
    devices: int,
    kinds: Sequence[Kind],
    decodes: bool,
    patterned: bool,
    scored: bool,
) -> tuple[str, ...]:
    notes = []
    if spec.trained_length is not None and context > spec.trained_length:
        notes.append(
            f"{spec.name} was trained for {spec.trained_length:,} positions; {context:,} tokens "
            "are beyond."
        )
    if cache.full_pages is not None and cache.full_pages != cache.total:
        notes.append(
            f"Where sliding layers are given room for all tokens, the cache is "
            f"{shown(cache.full_pages)} instead of {shown(cache.total)}."
        )
    notes += cache.notes
    if scored:
        notes.append(
            "The policy needs the attention that each token received: one more pass over queries "
            "and keys in prefill, which isn't counted."
        )
    if weights != "bf16":
        notes.append(
            f"{weights} weights: codes and an fp16 scale for each 128; the embedding and the "
            "output layer stay in bf16. They are multiplied as bf16, at its rate."
        )
    if spec.experts is not None:
        total, active = spec.experts.total, spec.experts.active
        notes.append(
            f"A token takes {active} of {total} experts; on average a decoding step of {batch} "
            f"reads {distinct(total, active, batch):.4g} of them, this prefill "
            f"{distinct(total, active, batch * context):.4g}."
        )
    if devices > 1:
        if batch > 1:
            notes.append(
                "On a ring the sequences of a batch go through the prefill one after another: "
                "activations are those of one."
            )
        notes.append(
            f"{devices} devices share the context, and each holds all weights; figures are of one "
            "device. Tensor parallelism is planned by `attnspan ring simulate`."
        )
    if not decodes:
        notes.append("The pattern lets queries see later keys, so it can't decode token by token.")
    elif patterned and any(kind.held > kind.read for kind in kinds):
        notes.append(
            "Under this pattern later queries see keys that the last one doesn't, so more is held "
            "than a token reads."
        )
    return tuple(notes)
