"""Snapshots of streams: one that is killed goes on from its last, bit for bit."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from attnspan.cache import snapshot
from attnspan.evaluation.loop import Stream
from attnspan.evaluation.score import Score
from attnspan.evaluation.text import Place, TextReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attnspan.models import Cache


def identity(
    tokenizer: PreTrainedTokenizerBase, bos: int | None, chunk: int, seed: int
) -> dict[str, Any]:
    """What a snapshot and the stream that goes on from it must agree on, beside the cache's own."""
    backend: Any = tokenizer.backend_tokenizer
    core = backend.to_str() + str(tokenizer.split_special_tokens)
    digest = hashlib.sha256(core.encode()).hexdigest()
    return {"tokenizer": digest, "bos": bos, "chunk": chunk, "seed": seed}


def save(stream: Stream, folder: str | Path, identity: dict[str, Any]) -> None:
    """Writes the stream, as it is between two steps, as the folder's snapshot.

    Raises:
        OSError: the disk is full, say; the snapshot before stays.
    """
    tensors, cache = stream.cache.state(copy=False)
    assert stream.boundary is not None, "only a text can be gone on with"
    meta = {
        "identity": identity,
        "cache": cache,
        "score": stream.score.state(),
        "place": asdict(stream.boundary),
        "pending": stream.pending,
        "seconds": stream.seconds,
    }
    named = {f"cache.{name}": tensor for name, tensor in tensors.items()}
    snapshot.write(folder, {**named, "random": stream.random.get_state()}, meta)


def resume(
    folder: str | Path,
    model: PreTrainedModel,
    cache: Cache,
    file: BinaryIO,
    tokenizer: PreTrainedTokenizerBase,
    identity: dict[str, Any],
    *,
    name: str = "text",
    limit: int | None = None,
) -> Stream:
    """The stream that a snapshot was taken of, ready to go on.

    Raises:
        FileNotFoundError: the folder holds no snapshot.
        ValueError: the snapshot is damaged, or of another model, tokenizer, policy, storage, chunk,
            seed or text, or `limit` lies before it; one sentence says which.
    """
    tensors, meta = snapshot.read(folder)
    try:
        theirs, place, score = meta["identity"], Place(**meta["place"]), meta["score"]
        pending, seconds, state = meta["pending"], meta["seconds"], meta["cache"]
        random = tensors.pop("random")
    except (KeyError, TypeError):
        raise ValueError(f"snapshot {folder}: it is not of a stream") from None
    for key, ours in identity.items():
        if theirs.get(key) != ours:
            raise ValueError(
                f"snapshot {folder}: it was saved with {key} {theirs.get(key)!r}; "
                f"this stream has {ours!r}"
            )
    if limit is not None and limit < score["tokens"]:
        raise ValueError(
            f"limit is {limit}; the snapshot {folder} has scored {score['tokens']} tokens already, "
            "and as many or more are allowed"
        )
    try:
        cache.load_state({key.removeprefix("cache."): x for key, x in tensors.items()}, state)
    except ValueError as error:
        raise ValueError(f"snapshot {folder}: {error}") from None
    reader = TextReader(file, tokenizer, name, place)
    stream = Stream(model, cache, reader, first=pending, limit=limit, chunk=identity["chunk"])
    stream.score, stream.seconds = Score.from_state(score), seconds
    stream.random.set_state(random)
    return stream
