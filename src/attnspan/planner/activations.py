"""Bytes that prefill takes above weights and cache: the widest moment of a layer, named."""

from __future__ import annotations

from dataclasses import dataclass

from attnspan.planner.engines import cache_bytes
from attnspan.planner.phases import FAMILIES, steps
from attnspan.planner.spec import ModelSpec

ATTENTIONS = ("flash", "standard")
FOLLOWED = ("theory", "transformers")
"""Engines whose prefill is followed."""


@dataclass(frozen=True)
class Peak:
    """The widest moment of a prefill.

    Attributes:
        bytes: above weights and cache.
        phase: which step of a layer it is.
        parts: its tensors in words and their bytes, which sum to `bytes`.
        working: those of attention's working memory.
        notes: what else should be known, in sentences.
    """

    bytes: int
    phase: str
    parts: tuple[tuple[str, int], ...]
    working: int
    notes: tuple[str, ...] = ()


def prefill_peak(
    spec: ModelSpec,
    tokens: int,
    *,
    batch: int = 1,
    itemsize: int = 2,
    attention: str = "flash",
    engine: str = "theory",
    chunk: int | None = None,
    threads: int | None = 1,
    packs: bool = False,
) -> Peak:
    """The most that prefill holds at once, above weights and cache.

    Args:
        spec: the model.
        tokens: of each sequence.
        batch: sequences.
        itemsize: bytes of a number.
        attention: "flash", which keeps a log-sum-exp for each query, or "standard", which keeps the
            scores of all pairs of a layer.
        engine: "theory": each tensor once, nothing kept longer than it is read. "transformers":
            what its code holds, with attention by sdpa ("flash") or eager ("standard"); bytes are
            above the cache that `attnspan.planner.engines` has for it.
        chunk: tokens that go through the model at once; None: all.
        threads: of the CPU that `transformers` runs on, each of which has a tile of flash
            attention; None: it runs on a GPU.
        packs: that CPU multiplies bf16 by tiles (Intel's AMX), for which torch lays keys and values
            out anew.

    Raises:
        ValueError: one sentence: a size is wrong, or there is no such attention or engine.

    >>> from attnspan.planner.presets import model
    >>> llama = model("llama-3.1-8b")
    >>> prefill_peak(llama, 131_072, attention="standard").working // 2**30  # GiB, of one layer
    1024
    >>> prefill_peak(llama, 131_072).phase
    'feed-forward'
    """
    sizes = {"tokens": tokens, "batch": batch, "itemsize": itemsize}
    optional = {"chunk": chunk, "threads": threads}
    for name, value in {**sizes, **{n: v for n, v in optional.items() if v is not None}}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; a whole number of at least 1 is allowed")
    for name, value, allowed in (
        ("attention", attention, ATTENTIONS),
        ("engine", engine, FOLLOWED),
    ):
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is not known; allowed are {', '.join(allowed)}")
    new = tokens if chunk is None else min(chunk, tokens)
    if engine == "theory":
        phases = _theory(spec, new, tokens, batch, itemsize, attention)
    else:
        phases = _transformers(spec, new, tokens, batch, itemsize, attention, threads, packs)
    return max(phases, key=lambda peak: peak.bytes)


def _peak(phase: str, parts: dict[str, int], working: int = 0, notes: tuple[str, ...] = ()) -> Peak:
    parts = {name: size for name, size in parts.items() if size}
    return Peak(sum(parts.values()), phase, tuple(parts.items()), working, notes)


def _theory(
    spec: ModelSpec, new: int, tokens: int, batch: int, itemsize: int, attention: str
) -> list[Peak]:
    """Keys and values are the cache's own, so they count there; but for those of all heads, which
    prefill makes from latents, of all tokens so far."""
    rows = batch * new
    hidden = rows * spec.hidden * itemsize
    queries = rows * spec.heads * spec.head_dim * itemsize
    values = rows * spec.heads * spec.value_dim * itemsize
    if attention == "flash":
        name, working = "log-sum-exp of each query and head, fp32", rows * spec.heads * 4
    else:
        name, working = "scores of every pair and head", rows * spec.heads * tokens * itemsize
    inner = spec.intermediate
    if spec.experts is not None:
        each = spec.experts.active + spec.experts.shared
        dense = spec.intermediate if spec.experts.layers < spec.layers else 0
        inner = max(each * spec.experts.intermediate, dense)
    residual = {"residual stream": hidden}
    expanded = 0
    if spec.latent is not None:
        expanded = batch * tokens * spec.heads * (spec.head_dim + spec.value_dim) * itemsize
    return [
        _peak("queries, keys, values", {**residual, "normed input": hidden, "queries": queries}),
        _peak(
            "attention",
            {
                **residual,
                "queries": queries,
                "keys and values of all heads": expanded,
                "attention's output": values,
                name: working,
            },
            working,
        ),
        _peak(
            "feed-forward",
            {
                **residual,
                "normed input": hidden,
                "gate and its product with the other half": rows * inner * itemsize,
                "the other half": rows * inner * itemsize,
            },
        ),
        _peak(
            "output layer",
            {**residual, "logits of the last token": batch * spec.vocabulary * itemsize},
        ),
    ]


def _transformers(
    spec: ModelSpec,
    new: int,
    tokens: int,
    batch: int,
    itemsize: int,
    attention: str,
    threads: int | None,
    packs: bool,
) -> list[Peak]:
    """Those of the first call, of the last one that brings `new` tokens, and of the last.

    Bytes are above the cache as it is at the end, so an earlier call has less of it by so many.
    """
    rest = tokens % new or new
    notes = ()
    if spec.family not in FAMILIES:
        notes = (
            f"Layers are taken to be built as Llama's: model type {spec.family!r} wasn't followed.",
        )

    def cache(upto: int, call: int) -> int:
        held = cache_bytes(
            spec, upto, batch=batch, itemsize=itemsize, engine="transformers", call=call
        )
        return held.total

    found, total = [], cache(tokens, rest)
    for call, upto in {(new, new), (new, tokens - tokens % new), (rest, tokens)}:
        later = total - cache(upto, call)
        for step in steps(
            spec,
            call,
            upto,
            batch=batch,
            itemsize=itemsize,
            eager=attention == "standard",
            threads=threads,
            packs=packs,
        ):
            parts = {**step.parts, "keys and values of later calls": -later}
            found.append(_peak(step.name, parts, step.working, notes))
    return found
