"""What a stream comes to: rows, their details, what they were measured with, and files."""

from __future__ import annotations

import json
import os
import platform
import secrets
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.evaluation.recompute import Ratio
from attnspan.evaluation.stream import Stream, trained_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def row(stream: Stream, ratio: Ratio | None = None) -> dict[str, Any]:
    """A stream in ten figures: nll in nats per token, sizes in bytes, speed in tokens a second."""
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
        "perplexity_ratio": ratio and ratio.ratio,
    }


def details(
    stream: Stream, notes: list[str], ratio: Ratio | None = None, continuation: str | None = None
) -> dict[str, Any]:
    """What a row has no place for: the last quarter, the ratio's error, notes, the series."""
    points = stream.score.series()
    return {
        "policy": str(stream.cache.policy),
        "storage": str(stream.cache.storage),
        "bytes": stream.score.bytes,
        "seconds": stream.seconds,
        "last_quarter": stream.score.last_quarter().figures(),
        "recompute": ratio and asdict(ratio),
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


def check_file(path: str | Path) -> None:
    """Refuses a path that `write_file` could not write, before the work that fills it.

    Raises:
        OSError: one sentence says why.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"file {path}: it is a folder; the name of a file is allowed")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"file {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"file {path}: the folder {path.parent} can't be written to")


def write_file(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all: under a temporary name, on the disk, then renamed.

    Raises:
        OSError: the disk is full, say; what the file held before stays.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file():  # a device or a pipe can't be replaced
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def to_json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
