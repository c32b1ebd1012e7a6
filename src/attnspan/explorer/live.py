"""A run of the bundled model that a page watches while it goes on: one at a time."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from attnspan.explorer.record import CHUNK, HEAD, LAYER, LIMIT, TEXTS, about, allowed, cut, watched
from attnspan.explorer.recording import MOST, nll_codes

PASTED = 65_536
"""Bytes of a pasted text at most."""

STORAGES = ("dense", "int8", "int4")


@dataclass(frozen=True)
class Wanted:
    """A run that a page asks for; `source` is the name of a shipped text, or None for `text`."""

    policy: str
    storage: str
    source: str | None
    text: bytes
    limit: int


def wanted(given: Any) -> Wanted:
    """Reads what a page sent.

    Raises:
        ValueError: one sentence names what is wrong and what is allowed.
    """
    if not isinstance(given, dict):
        raise ValueError("the request is no JSON object")
    if extra := sorted(set(given) - {"policy", "storage", "source", "text", "limit"}):
        raise ValueError(f"{str(extra[0])[:40]!r} is asked for, which a run doesn't have")
    if "policy" not in given:
        raise ValueError("policy is missing")
    policy = given["policy"]
    if not isinstance(policy, str) or len(policy) > 200:
        raise ValueError("policy is no text of up to 200 characters")
    storage = given.get("storage", "dense")
    if not isinstance(storage, str) or storage not in STORAGES:
        raise ValueError(f"storage is no one of {', '.join(STORAGES)}")
    limit = given.get("limit", LIMIT)
    if isinstance(limit, bool) or not isinstance(limit, int) or not 2 <= limit <= LIMIT:
        raise ValueError(f"limit is no whole number from 2 to {LIMIT}")
    source, text = given.get("source"), given.get("text")
    if (source is None) == (text is None):
        found = "neither is" if source is None else "both are"
        raise ValueError(f"source and text: {found} given; one of the two is allowed")
    if source is not None and (not isinstance(source, str) or source not in TEXTS):
        raise ValueError(f"source is no one of {', '.join(TEXTS)}")
    try:
        data = b"" if text is None else str(text).encode()
    except UnicodeEncodeError:
        raise ValueError("text holds half a character (a lone surrogate)") from None
    if text is not None and (not isinstance(text, str) or not 2 <= len(data) <= PASTED):
        raise ValueError(f"text is no text of 2 to {PASTED:,} bytes of UTF-8")
    return Wanted(str(allowed(policy)), storage, source, data, limit)


class Live:
    """The model, loaded when it is first needed, and the one run that may go on."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._loaded: Any = None

    def lines(self, run: Wanted) -> Iterator[str]:
        """A run as lines of JSON: `loading`, `head`, a `step` for each chunk, `end` or `error`.

        A step brings the text and the surprise of its tokens, as a recording does, and the tokens
        whose life has changed: their numbers, `left` and `pooled`.
        """
        try:
            yield from map(_line, self._events(run))
        except (ValueError, ArithmeticError, OSError) as error:
            yield _line({"type": "error", "sentence": str(error)})

    def _events(self, run: Wanted) -> Iterator[dict[str, Any]]:
        from attnspan.explorer.record import shipped_text

        yield {"type": "loading"}
        from attnspan.cache.storage import parse_storage
        from attnspan.models.loading import load

        if self._loaded is None:
            self._loaded = load("bundled", "cpu")
        whole = run.text if run.source is None else shipped_text(run.source)
        text = cut(whole, run.limit)
        model, tokenizer = self._loaded
        policy, storage = allowed(run.policy), parse_storage(run.storage)
        with watched(model, tokenizer, text, policy, storage, limit=run.limit) as going:
            most = min(len(text), going.stream.limit or len(text))
            yield {
                "type": "head",
                **about(going),
                "tokens": most,
                "chunk": CHUNK,
                "layer": LAYER,
                "head": HEAD,
                "nll_most": MOST,
            }
            more, done = True, 0
            while more:
                more = going.step()
                score = going.stream.score
                if score.tokens == done:
                    break
                look, news = going.looks[-1], going.lives.news()
                yield {
                    "type": "step",
                    "tokens": score.tokens,
                    "text": _bytes(text[done : score.tokens]),
                    "nll": _bytes(nll_codes(going.nlls[done:])),
                    "changed": [list(each) for each in zip(*news, strict=True)] or [[], [], []],
                    "held": look.held,
                    "cache_bytes": look.cache_bytes,
                    "perplexity": score.total.perplexity,
                }
                done = score.tokens
            yield {"type": "end", "tokens": done, "nll_mean": going.stream.score.total.mean}


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event, allow_nan=False, separators=(",", ":")) + "\n"


def _bytes(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
