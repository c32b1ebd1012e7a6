"""Bytes that prefill takes above weights and cache: the widest moment of a layer, named."""

from __future__ import annotations

from dataclasses import dataclass

from attnspan.planner.engines import cache_bytes
from attnspan.planner.phases import steps
from attnspan.planner.spec import ModelSpec

ATTENTIONS = ("flash", "standard")
ENGINES = ("theory", "transformers")


@dataclass(frozen=True)
class Peak:
    """The widest moment of a prefill.

    Attributes:
        bytes: above weights and cache.
        phase: which step of a layer it is.
        parts: its tensors in words and their bytes, which sum to `bytes`.
        working: those of attention's working memory.
    """

    bytes: int
    phase: str
    parts: tuple[tuple[str, int], ...]
    working: int


def prefill_peak(
    spec: ModelSpec,
    tokens: int,
    *,
    batch: int = 1,
    itemsize: int = 2,
    attention: str = "flash",
    engine: str = "theory",
    chunk: int | None = None,
    threads: int = 1,
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
            what its code holds on a CPU, with attention by sdpa ("flash") or eager ("standard");
            bytes are above the cache that `attnspan.planner.engines` has for it.
        chunk: tokens that go through the model at once; None: all.
        threads: of the CPU, each of which has a tile of flash attention.

    Raises:
        ValueError: one sentence: a size is wrong, or there is no such attention or engine.

    >>> from attnspan.planner.spec import model
    >>> llama = model("llama-3.1-8b")
    >>> prefill_peak(llama, 131_072, attention="standard").working // 2**30  # GiB, of one layer
    1024
    >>> prefill_peak(llama, 131_072).phase
    'feed-forward'
    """
    sizes = {"tokens": tokens, "batch": batch, "itemsize": itemsize, "threads": threads}
    for name, value in sizes.items():
        _check(name, value)
    if chunk is not None:
        _check("chunk", chunk)
    for name, value, allowed in (
        ("attention", attention, ATTENTIONS),
        ("engine", engine, ENGINES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is not known; allowed are {', '.join(allowed)}")
    new = tokens if chunk is None else min(chunk, tokens)
    if engine == "theory":
        phases = _theory(spec, new, tokens, batch, itemsize, attention)
    else:
        phases = _transformers(spec, new, tokens, batch, itemsize, attention, threads)
    return max(phases, key=lambda peak: peak.bytes)


def _check(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; a whole number of at least 1 is allowed")


def _peak(phase: str, parts: dict[str, int], working: int = 0) -> Peak:
    parts = {name: size for name, size in parts.items() if size}
    return Peak(sum(parts.values()), phase, tuple(parts.items()), working)


def _theory(
    spec: ModelSpec, new: int, tokens: int, batch: int, itemsize: int, attention: str
) -> list[Peak]:
    """Keys and values are the cache's own, so they count there."""
    rows = batch * new
    hidden = rows * spec.hidden * itemsize
    queries = rows * spec.heads * spec.head_dim * itemsize
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
    return [
        _peak("queries, keys, values", {**residual, "normed input": hidden, "queries": queries}),
        _peak(
            "attention",
            {**residual, "queries": queries, "attention's output": queries, name: working},
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
    threads: int,
) -> list[Peak]:
    """The widest moment of the first call, of the last whole one, and of what is left.

    Bytes count from the cache as it is at the end, so an earlier call has the rest to its credit.
    """
    calls = {(new, new)}
    calls |= {(new, tokens - tokens % new), (tokens % new or new, tokens)}
    found = []
    for count, upto in calls:
        later = (
            cache_bytes(
                spec,
                tokens,
                batch=batch,
                itemsize=itemsize,
                engine="transformers",
                call=tokens % new or new,
            ).total
            - cache_bytes(
                spec, upto, batch=batch, itemsize=itemsize, engine="transformers", call=count
            ).total
        )
        for step in steps(
            spec,
            count,
            upto,
            batch=batch,
            itemsize=itemsize,
            eager=attention == "standard",
            threads=threads,
        ):
            parts = {**step.parts, "keys and values of later calls": -later}
            found.append(_peak(step.name, parts, step.working))
    return found
