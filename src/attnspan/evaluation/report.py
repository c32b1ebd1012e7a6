"""What a stream comes to: rows, their details, and what they were measured with."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from attnspan.evaluation.loop import Stream, trained_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def row(stream: Stream) -> dict[str, Any]:
    """A stream in ten figures: nll in nats per token, sizes in bytes, speed in tokens a second.

    `perplexity_ratio` is None: it needs a fresh forward, which `compare` makes.
    """
    cache, total = stream.cache, stream.score.total
    return {
        "policy": str(cache.policy),
        "storage": str(cache.storage),
        "tokens": total.tokens,
        "nll": total.mean,
        "perplexity": total.perplexity,
        "bits_per_byte": total.bits_per_byte,
        "cache_bytes_peak": cache.peak_bytes,
        "tokens_held": cache.peak_tokens_held,
        "tokens_per_second": total.tokens / stream.seconds,
        "perplexity_ratio": None,
    }


def details(stream: Stream, notes: list[str], continuation: str | None) -> dict[str, Any]:
    """What a row has no place for: the last quarter, notes, the series."""
    points = stream.score.series()
    return {
        "policy": str(stream.cache.policy),
        "storage": str(stream.cache.storage),
        "bytes": stream.score.bytes,
        "seconds": stream.seconds,
        "last_quarter": stream.score.last_quarter().figures(),
        "recompute": None,
        "notes": notes,
        "continuation": continuation,
        "series": {name: [getattr(p, name) for p in points] for name in type(points[0])._fields},
    }


def meta(
    command: str, model: PreTrainedModel, model_name: str, text_name: str, **more: Any
) -> dict[str, Any]:
    """What the figures were measured with."""
    import torch

    place = model.device
    return {
        "command": command,
        "model": {
            "name": model_name,
            "type": model.config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "trained_length": trained_length(model),
        },
        "text": text_name,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("attnspan", "torch", "transformers")},
        },
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


def notes(stream: Stream, stopped: bool) -> list[str]:
    """What a reader of the figures must know; `stopped` says that text was left."""
    trained, cache = trained_length(stream.model), stream.cache
    remarks = []
    if trained is not None and stopped:
        remarks.append(
            f"stopped after {stream.score.tokens:,} tokens: keeping everything makes sense up to "
            f"the {trained:,} positions that the model's config gives it"
        )
    if trained is not None and cache.peak_tokens_held > trained:
        remarks.append(
            f"holds {cache.peak_tokens_held:,} tokens, more than the {trained:,} positions that "
            "the model's config gives it"
        )
    return remarks
