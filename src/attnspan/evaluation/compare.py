"""Stream one text under several policies and storages, each held against a fresh forward."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

from attnspan.cache import Storage
from attnspan.evaluation import report as reports
from attnspan.evaluation.loop import (
    CHUNK,
    Progress,
    Stream,
    continuation,
    first_token,
    run,
    sensible_limit,
)
from attnspan.evaluation.recompute import ratio, recompute, spaced
from attnspan.evaluation.text import TextReader
from attnspan.models import Cache, attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attnspan.policies import PerLayer, Policy


class Tokens:
    """A text's tokens in a file, so that each row reads them again.

    Id 0 of the sequence is BOS where there is one. At most `limit + 1` ids are taken, for the
    first is fed and not scored.
    """

    def __init__(
        self, file: BinaryIO, reader: TextReader, bos: int | None, limit: int | None
    ) -> None:
        self._file = file
        self.count = 0
        most = None if limit is None else limit + 1
        if bos is not None:
            self._append([bos], [0])
        while most is None or self.count < most:
            wanted = 4096 if most is None else min(4096, most - self.count)
            ids, widths = reader.read(wanted)
            self._append(ids, widths)
            if len(ids) < wanted:
                break

    def _append(self, ids: list[int], widths: list[int]) -> None:
        self._file.write(array("q", [n for pair in zip(ids, widths, strict=True) for n in pair]))
        self.count += len(ids)

    def pairs(self, start: int, stop: int) -> tuple[list[int], list[int]]:
        """Ids `start <= i < stop` and the bytes that each stands for."""
        self._file.seek(16 * start)
        both = array("q", self._file.read(16 * (stop - start))).tolist()
        return both[::2], both[1::2]

    def ids(self, start: int, stop: int) -> list[int]:
        return self.pairs(start, stop)[0]


class Replay:
    """`Tokens` from the first on, as a source of a stream."""

    place = None

    def __init__(self, tokens: Tokens) -> None:
        self._tokens, self._at = tokens, 0

    def read(self, count: int) -> tuple[list[int], list[int]]:
        start = self._at
        self._at = min(start + count, self._tokens.count)
        return self._tokens.pairs(start, self._at)


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: BinaryIO,
    kept: Sequence[tuple[Policy | PerLayer, Storage]],
    *,
    model_name: str = "model",
    name: str = "text",
    limit: int | None = None,
    chunk: int = CHUNK,
    generate: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Scores the text under each policy and storage, one after the other.

    A row's `perplexity_ratio` is to `recompute`: at `POSITIONS` evenly spaced tokens, a fresh
    forward of the untouched model over BOS and the last C - 1 tokens, C being the most tokens that
    the row's queries saw. Above 1 the cache lost something. A cache that keeps everything stops at
    the model's trained length.

    Args:
        model: in eval mode, not attached.
        file: binary, at the text's first byte; read once.
        kept: policies and storages; a row each.
        limit: how many tokens are scored at most.
        generate: how many tokens each row continues the text with.

    Returns:
        `{"meta": ..., "rows": ...}`; `meta["details"][i]` says more about row `i`.

    Raises:
        ValueError: the model, a policy or the text can't be used; one sentence says why.
    """
    bos = first_token(model, tokenizer)
    caches = [Cache(model, policy, storage) for policy, storage in kept]
    rows, details, watched = [], [], []
    with tempfile.TemporaryFile() as spool:
        tokens = Tokens(spool, TextReader(file, tokenizer, name), bos, limit)
        with attach(model):
            for cache in caches:
                count = sensible_limit(model, cache, tokens.count - 1) or 0
                stream = Stream(
                    model,
                    cache,
                    Replay(tokens),
                    first=None,
                    limit=count,
                    chunk=chunk,
                    watch=spaced(count),
                )
                run(stream, report, task=f"{cache.policy}, {cache.storage}")
                remarks = reports.notes(stream, stopped=count < tokens.count - 1)
                text = continuation(stream, tokenizer, generate)
                rows.append(reports.row(stream))
                details.append(reports.details(stream, remarks, text))
                watched.append(stream.watched)
                cache.reset()
        fresh: dict[tuple[int, int], list[float]] = {}
        for row, detail, streamed in zip(rows, details, watched, strict=True):
            held, count = row["tokens_held"], row["tokens"]
            if (held, count) not in fresh:
                positions = spaced(count)
                told = report and _told(report, held, len(positions))
                fresh[held, count] = recompute(
                    model, tokens.ids, held, positions, bos=bos is not None, report=told
                )
            against = ratio(streamed, fresh[held, count], held)
            row["perplexity_ratio"] = against.ratio
            detail["recompute"] = asdict(against)
    meta = reports.meta(
        "compare", model, model_name, name, limit=limit, chunk=chunk, bos=bos, details=details
    )
    return {"meta": meta, "rows": rows}


def _told(report: Callable[[Progress], None], held: int, total: int) -> Callable[[int], None]:
    return lambda done: report(Progress(f"recompute over {held} tokens", done, total))
