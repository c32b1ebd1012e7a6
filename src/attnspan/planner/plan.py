"""What a context costs: memory, operations, bytes and seconds, before anything is loaded.

Every figure is a formula of the model's shape; `Plan.explain` prints each with its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.activations import Peak, prefill_peak
from attnspan.planner.engines import CacheBytes, LayerCache, cache_bytes, layer_policies
from attnspan.planner.links import Device, Link, find_device, machine
from attnspan.planner.quantities import MOST_TOKENS, size
from attnspan.planner.seen import CAUSAL, Capped, Chunks, View, of_pattern, of_policy, of_window
from attnspan.planner.spec import ModelSpec, from_config, model as find_model
from attnspan.planner.weights import embeddings, multiplied, read_bytes, weight_bytes
from attnspan.policies import KeepAll, PerLayer, Policy, SinkWindow, Window, parse

if TYPE_CHECKING:
    from attnspan.patterns.algebra import Pattern
    from attnspan.planner.compare import Row
    from attnspan.planner.explain import Line
    from attnspan.planner.prefill import Prefill

ITEMSIZE = 2  # bytes of a number in bf16, which everything dense is held in


@dataclass(frozen=True)
class Kind:
    """Layers that are alike.

    Attributes:
        name: "full", "sliding", "chunked" or "latent"; "shared, ..." where they read the keys and
            values of earlier layers.
        sees: what of the stream, in words: a policy, a window, a pattern.
        layers: how many.
        held: tokens whose keys and values a layer holds, of one sequence.
        bytes: of keys and values, all of these layers and the batch.
        read: keys that the last token of the context sees, in one layer.
        pairs: of a query and a key that it sees, in one layer's prefill of one sequence.
        view: what the figures come from.
    """

    name: str
    sees: str
    layers: int
    held: int
    bytes: int
    read: int
    pairs: int
    view: View


@dataclass(frozen=True)
class Phase:
    """The prefill, or one step of decoding, of the whole batch. On a ring: of one device.

    Attributes:
        linear: operations of matrix products with weights, two for each weight and token.
        attention: operations of attention, two for each number that is multiplied.
        bytes: that must be moved at the least.
        seconds: by the device's rates.
        ridge: operations a byte from which on the device computes longer than it reads.
    """

    linear: int
    attention: int
    bytes: int
    seconds: float
    ridge: float

    @property
    def operations(self) -> int:
        return self.linear + self.attention

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes

    @property
    def bound(self) -> str:
        return "compute" if self.intensity >= self.ridge else "memory"


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
class Factor:
    """One optimisation, and what it does to one quantity: `before / after`."""

    name: str
    quantity: str
    before: int
    after: int

    @property
    def ratio(self) -> float:
        return self.before / self.after if self.after else float("inf")


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

    @cached_property
    def stack(self) -> tuple[Factor, ...]:
        """What each optimisation does, and to what; the cache's factors multiply to their whole."""
        return _stack(self)

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
    link: str = "ib",
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
        link: between devices (`attnspan.planner.links.machine`).
        weights: "bf16", "int8" or "int4" (`attnspan.planner.weights.weight_bytes`).
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
    _check_combination(policy, pattern, engine, devices, chunk)
    rates = device if isinstance(device, Device) else find_device(device)
    if memory is None:
        limit = None if rates.memory is None else int(rates.memory)
    else:
        limit = size(memory) if isinstance(memory, str) else memory
        _check_counts(memory=(limit, 2**62))

    patterns = _patterns(pattern, spec)
    views, words = _views(spec, policy, patterns)
    token = _token(spec, str(storage))
    if patterns is None:
        cache = cache_bytes(
            spec, context, batch=batch, policy=policy, storage=storage, engine=engine
        )
    else:
        cache = _pattern_cache(spec, views, context, batch, token)
    held_weights = weight_bytes(spec, weights)
    read_token = token
    if engine == "transformers" and spec.latent is not None:
        first = next(layer for layer in cache.layers if layer.slots)
        read_token = first.bytes // (first.slots * batch)
    kinds = _kinds(spec, views, words, cache, context)
    flash = prefill_peak(
        spec, context, batch=batch, attention="flash", engine=_peak(engine), chunk=chunk
    )
    standard = prefill_peak(
        spec, context, batch=batch, attention="standard", engine=_peak(engine), chunk=chunk
    )
    working = Working(context * min(context, chunk or context) * ITEMSIZE, standard.working, flash.working)
    ring, share, hop = None, cache.total, None
    if devices > 1:
        ring, hop = _ring(spec, views, context, devices, rates, link)
        share = sum(batch * -(-layer.slots // devices) * token for layer in cache.layers)
        flash = _ring_peak(ring)
    decodes = all(view.decodes(context) for view in set(views))
    ahead = _prefill(spec, kinds, context, batch, weights, rates, devices, token)
    if ring is not None:
        ahead = replace(ahead, seconds=batch * ring.seconds)
    step = _decode(spec, kinds, batch, weights, rates, devices, read_token, hop) if decodes else None
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
        activations=flash,
        working=working,
        prefill=ahead,
        decode=step,
        token_bytes=read_token,
        ring=ring,
        notes=_notes(spec, context, cache, weights, devices, decodes, kinds),
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
    policy: Policy | PerLayer | None, pattern: object, engine: str, devices: int, chunk: int | None
) -> None:
    if policy is not None and pattern is not None:
        raise ValueError(f"policy is {policy} and pattern {pattern}; one of them is allowed")
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


def _patterns(
    pattern: Pattern | Sequence[Pattern] | None, spec: ModelSpec
) -> tuple[Pattern, ...] | None:
    if pattern is None:
        return None
    given = tuple(pattern) if isinstance(pattern, Sequence) else (pattern,) * spec.layers
    if len(given) != spec.layers:
        raise ValueError(
            f"pattern has {len(given)} layers; one pattern, or one for each of the model's "
            f"{spec.layers}, is allowed"
        )
    return given


def _views(
    spec: ModelSpec, policy: Policy | PerLayer | None, patterns: tuple[Pattern, ...] | None
) -> tuple[tuple[View, ...], tuple[str, ...]]:
    """Each layer's view, and what it sees in words."""
    if patterns is not None:
        made = {each: of_pattern(each) for each in set(patterns)}
        return tuple(made[each] for each in patterns), tuple(str(each) for each in patterns)
    views, words = [], []
    policies = layer_policies(spec, policy) if policy is not None else (None,) * spec.layers
    for window, chosen in zip(spec.windows, policies, strict=True):
        if chosen is None or isinstance(chosen, KeepAll) or chosen == Window(window or 0 + 1):
            views.append(of_window(window, spec.chunked))
            kind = "the last {:,}" if not spec.chunked else "its chunk of {:,}"
            words.append("all" if window is None else kind.format(window))
        else:
            views.append(of_policy(chosen))
            words.append(str(chosen))
    return tuple(views), tuple(words)


def _token(spec: ModelSpec, storage: str) -> int:
    """Bytes of one token's keys and values in a layer of its own."""
    open_spec = replace(spec, windows=(None,) * spec.layers, chunked=False)
    return max(layer.bytes for layer in cache_bytes(open_spec, 1, storage=storage).layers)


def _pattern_cache(
    spec: ModelSpec, views: tuple[View, ...], context: int, batch: int, token: int
) -> CacheBytes:
    shares = spec.shares or (None,) * spec.layers
    held = {view: view.hold(context) for view in set(views)}
    layers = tuple(
        LayerCache(held[view], held[view] * token * batch) if of is None else LayerCache(0, 0)
        for view, of in zip(views, shares, strict=True)
    )
    return CacheBytes("theory", layers)


def _peak(engine: str) -> str:
    """Whose prefill is counted: engines without one of their own are given the least."""
    return engine if engine in ("theory", "transformers") else "theory"


def _kinds(
    spec: ModelSpec,
    views: tuple[View, ...],
    words: tuple[str, ...],
    cache: CacheBytes,
    context: int,
) -> tuple[Kind, ...]:
    shares = spec.shares or (None,) * spec.layers
    found: dict[tuple[str, str, View, int], list[int]] = {}
    for layer, (view, word, window, of) in enumerate(
        zip(views, words, spec.windows, shares, strict=True)
    ):
        name = "full" if window is None else "chunked" if spec.chunked else "sliding"
        name = f"{name}, latent" if spec.latent is not None else name
        name = name if of is None else f"{name}, shared"
        found.setdefault((name, word, view, cache.layers[layer].slots), []).append(layer)
    counted = {view: (view.read(context), view.pairs(context)) for view in set(views)}
    return tuple(
        Kind(
            name,
            word,
            len(layers),
            slots,
            sum(cache.layers[layer].bytes for layer in layers),
            *counted[view],
            view,
        )
        for (name, word, view, slots), layers in found.items()
    )


def pair_operations(spec: ModelSpec) -> int:
    """Operations of attention for a pair and query head, in prefill.

    `2 * head_dim` for the score and as many for the value; with latent attention the key is
    `nope + rope` wide and the value as it is.
    """
    if spec.latent is None:
        return 4 * spec.head_dim
    return 2 * (spec.latent.nope + spec.latent.rope) + 2 * spec.latent.value


def read_operations(spec: ModelSpec) -> int:
    """The same for a key that a decoded token reads.

    Latents are read as they are: a query is turned into their space (DeepSeek-V2, section 2.1.2),
    which takes `2 * (rank + rope)` for a score and `2 * rank` for a value.
    """
    if spec.latent is None:
        return 4 * spec.head_dim
    return 2 * (spec.latent.rank + spec.latent.rope) + 2 * spec.latent.rank


def _prefill(
    spec: ModelSpec,
    kinds: tuple[Kind, ...],
    context: int,
    batch: int,
    weights: str,
    device: Device,
    devices: int,
    token: int,
) -> Phase:
    """The output layer sees the last token alone. Weights are read once, all experts of them; keys
    and values are written once and read once; activations aren't counted."""
    output = spec.vocabulary * spec.hidden
    linear = 2 * batch * (context * multiplied(spec) + output)
    pairs = sum(kind.layers * kind.pairs for kind in kinds)
    attention = pair_operations(spec) * spec.heads * batch * pairs
    weighed = weight_bytes(spec, weights) - (0 if spec.tied else 2 * output)
    owners = sum(kind.layers for kind in kinds if kind.held)
    moved = weighed + 2 * batch * context * token * owners
    return _phase(spec, -(-linear // devices), -(-attention // devices), moved, device)


def _decode(
    spec: ModelSpec,
    kinds: tuple[Kind, ...],
    batch: int,
    weights: str,
    device: Device,
    devices: int,
    token: int,
    link: Link | None,
) -> Phase:
    linear = 2 * batch * (multiplied(spec) + spec.vocabulary * spec.hidden)
    share = [(kind.layers, -(-kind.read // devices)) for kind in kinds]
    reads = sum(layers * read for layers, read in share)
    attention = read_operations(spec) * spec.heads * batch * reads
    moved = read_bytes(spec, weights, batch) + batch * token * reads
    found = _phase(spec, linear, attention, moved, device)
    if link is None:
        return found
    # As attnspan.planner.ring.decode_cost: partial outputs and log-sum-exps, in fp32.
    part = batch * spec.heads * (spec.head_dim + 1) * 4 * (devices - 1)
    return replace(
        found,
        seconds=found.seconds + spec.layers * (link.latency + part / link.bandwidth),
    )


def _phase(spec: ModelSpec, linear: int, attention: int, moved: int, device: Device) -> Phase:
    """Computing and moving go on side by side; each layer's attention takes a call's time more."""
    computing = linear / device.linear + attention / device.forward
    seconds = max(computing, moved / device.memory_bandwidth) + spec.layers * device.call
    return Phase(linear, attention, moved, seconds, device.linear / device.memory_bandwidth)


def _ring(
    spec: ModelSpec,
    views: tuple[View, ...],
    context: int,
    devices: int,
    device: Device,
    link: str,
) -> tuple[Prefill, Link]:
    """The prefill on a ring, by its cheapest schedule."""
    from attnspan.planner.links import Machine
    from attnspan.planner.prefill import Simulation

    hop = machine(link).link
    simulation = Simulation(
        spec, context, Machine(device, hop), pattern=[_as_pattern(view) for view in views]
    )
    return simulation.prefill(devices, simulation.choose(devices)), hop


def _as_pattern(view: View) -> Pattern:
    from attnspan.patterns.library import Blockwise, Causal, SlidingWindow, Strided
    from attnspan.planner.seen import Counted, Strides

    match view:
        case Capped(None):
            return Causal()
        case Capped(kept, 1):
            return SlidingWindow(kept + 1)
        case Chunks(block, before):
            return Blockwise(block, before)
        case Strides(window, stride):
            return Strided(window, stride)
        case Counted(pattern):
            return pattern
    raise ValueError(
        "policy: on a ring keep-all, windows and sinks with a window of block 1 are allowed; others "
        "decide token by token, where no device has all tokens"
    )


def _ring_peak(ring: Prefill) -> Peak:
    held = ring.memory - ring.weights - ring.cache
    return Peak(held, "a layer, and what the ring's schedule holds", (("a device's shard", held),), 0)
