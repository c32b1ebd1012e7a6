"""Stream one text through a model under one policy and storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from attnspan.cache import Storage, snapshot
from attnspan.evaluation import report as reports
from attnspan.evaluation import saving
from attnspan.evaluation.loop import (
    CHUNK,
    Progress,
    Stream,
    continuation,
    first_token,
    run,
    sensible_limit,
)
from attnspan.evaluation.text import TextReader
from attnspan.models import Cache, attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attnspan.policies import PerLayer, Policy

SAVE_EVERY = 16_384
"""Tokens between two snapshots."""


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: BinaryIO,
    policy: Policy | PerLayer,
    storage: Storage,
    *,
    model_name: str = "model",
    name: str = "text",
    limit: int | None = None,
    chunk: int = CHUNK,
    seed: int = 0,
    generate: int = 0,
    graphs: bool = False,
    save_to: Path | None = None,
    save_every: int = SAVE_EVERY,
    resume_from: Path | None = None,
    report: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Scores the text, in memory that depends on the policy and not on the text's length.

    Snapshots fall between whole chunks. A stream that goes on from one scores every token, and
    draws its continuation, as the stream that was saved would have: bit for bit on the same
    machine, with as many threads and the same options. A cache that keeps everything stops at the
    model's trained length.

    Args:
        model: in eval mode, not attached.
        file: binary, at the text's first byte; read once and forwards, so that a pipe will do.
        limit: how many tokens are scored at most, those before the snapshot included.
        chunk: tokens that go through the model at once.
        seed: of the continuation.
        generate: how many tokens the text is continued with.
        graphs: steps of one token, so with `chunk=1` all and else the continuation's, are replayed
            from a CUDA graph; what can't be captured is refused.
        save_to: the folder of a snapshot, written every `save_every` tokens and at the end. One
            that holds a snapshot already must be `resume_from`.
        resume_from: the folder of the snapshot to go on from.

    Returns:
        `{"meta": ..., "rows": [row]}` as `compare`, without the ratio to a fresh forward.

    Raises:
        FileNotFoundError: there is no snapshot in `resume_from`.
        OSError: a snapshot can't be written; the one before it stays.
        ValueError: the model, the policy, the text or the snapshot can't be used, or `save_to`
            holds another stream's snapshot; one sentence says why.
    """
    if graphs and model.device.type != "cuda":
        raise ValueError(
            f"graphs is True with a model on {model.device}; CUDA graphs need a CUDA device"
        )
    if graphs and chunk != 1 and not generate:
        raise ValueError(
            f"graphs is True with chunk {chunk} and no continuation; only steps of one token are "
            "replayed, so chunk 1, or generate above 0, is allowed"
        )
    if (
        save_to is not None
        and snapshot.exists(save_to)
        and (resume_from is None or save_to.resolve() != resume_from.resolve())
    ):
        raise ValueError(
            f"{save_to} holds a snapshot already: go on from it, or save to another folder"
        )
    cache = Cache(model, policy, storage)
    bos = first_token(model, tokenizer)
    most = sensible_limit(model, cache, limit)
    identity = saving.identity(tokenizer, bos, chunk, seed)
    if resume_from is None:
        reader = TextReader(file, tokenizer, name)
        stream = Stream(model, cache, reader, first=bos, limit=most, chunk=chunk, seed=seed)
    else:
        stream = saving.resume(
            resume_from, model, cache, file, tokenizer, identity, name=name, limit=most
        )

    def save(stream: Stream) -> None:
        assert save_to is not None
        saving.save(stream, save_to, identity)

    stream.graphs = graphs
    with attach(model):
        run(stream, report, save if save_to is not None else None, save_every)
        stopped = stream.score.tokens == most and most != limit
        remarks = reports.notes(stream, stopped)
        row = reports.row(stream)
        text = continuation(stream, tokenizer, generate)
    details = reports.details(stream, remarks, text)
    meta = reports.meta(
        "stream", model, model_name, name, limit=limit, chunk=chunk, bos=bos, details=[details]
    )
    return {"meta": meta, "rows": [row]}
