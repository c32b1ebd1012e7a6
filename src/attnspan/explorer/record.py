"""Run the bundled model over a text under several policies, and write down each token's life.

Memory is bounded by the most tokens that a recording may have: the cache by its policy, and some
bytes for each token's surprise and its life in one layer and KV head.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnspan.explorer.lives import Lives, Watched
from attnspan.explorer.recording import FORMAT, MOST, VERSION, nll_codes, pack, pack_lives
from attnspan.policies import Compressive, HeavyHitter, PerHead, PerLayer, Policy, SnapKV, parse

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attnspan.cache import Storage
    from attnspan.evaluation.loop import Progress, Stream

LIMIT = 100_000
"""Tokens of a recording at most."""

LARGEST = 4_096
"""Slots that a policy may hold in a recording at most."""

CHUNK = 256
"""Tokens that go through the model at once, and between two looks at the cache's bytes."""

LAYER, HEAD = 4, 1
"""Watched where nothing else is asked for: a head whose heavy hitters are dots and line breaks."""

KEPT = (
    "keep-all",
    "window:512",
    "sinks:4+window:508",
    "sinks:4+window:508 int4",
    "heavy:224+window:225",
    "compressive:window=314,memory=128,rate=4",
)
"""The runs of a recording where no others are asked for, 512 tokens each; dense but for one."""

TEXTS = {
    "python": "Python's asyncio, email, http and unittest, which the bundled model never saw",
    "english": "Python proposals on governance and elections, which the bundled model never saw",
}
"""The texts that come with the package."""


@dataclass(frozen=True)
class Look:
    """The cache after some tokens.

    Attributes:
        tokens: that went by.
        held: slots in use in a layer.
        cache_bytes: allocated.
    """

    tokens: int
    held: int
    cache_bytes: int


class Run:
    """A stream of `text` under one policy and storage, watched in one layer and KV head.

    Attributes:
        lives: the lives of the tokens that went by.
        looks: one after each step.
        slot_bytes: of a token's keys and values, all layers and KV heads together.
    """

    def __init__(self, stream: Stream, text: bytes, policy: Policy, lives: Lives) -> None:
        cache = stream.cache
        self.stream, self.text, self.policy, self.lives = stream, text, policy, lives
        self.looks: list[Look] = []
        self.slot_bytes = sum(
            layer.spec.num_kv_heads
            * cache.storage.bytes_per_token(layer.spec.head_dim, cache.dtype)
            for layer in cache.anatomy.layers
        )

    @property
    def nlls(self) -> list[float]:
        """Each scored token's surprise, in nats."""
        return self.stream.watched

    def step(self) -> bool:
        """Takes a chunk; whether there may be another.

        Raises:
            ValueError: the model's tokens are not bytes.
        """
        ids, widths = self.stream.take()
        done = self.stream.score.tokens
        if ids != list(self.text[done : done + len(ids)]):
            raise ValueError("the model's tokens are not bytes, as a recording's must be")
        if ids:
            self.stream.feed(ids, widths)
            seen, cache, band = self.stream.score.tokens, self.stream.cache, self.policy.band
            if band is None:
                self.lives.grow(seen)
            else:
                self.lives.roll(band, self.policy.block, seen)
            self.looks.append(Look(seen, cache.tokens_held, cache.nbytes))
        return len(ids) == self.stream.chunk


def allowed(spec: str) -> Policy:
    """The policy of a SPEC, if it can be recorded.

    Raises:
        ValueError: one sentence says why not.

    >>> str(allowed("window:512"))
    'window:512'
    >>> allowed("window:1000000")
    Traceback (most recent call last):
    ValueError: policy window:1000000 may hold 1,000,000 slots; up to 4,096 are allowed here
    """
    policy = parse(spec)
    if isinstance(policy, PerLayer | PerHead):
        raise ValueError(
            f"policy {spec} has several budgets; here one for all layers and heads is allowed"
        )
    if policy.capacity is not None and policy.capacity > LARGEST:
        raise ValueError(
            f"policy {spec} may hold {policy.capacity:,} slots; up to {LARGEST:,} are allowed here"
        )
    return policy


def kept(spec: str) -> tuple[Policy, Storage]:
    """The policy and the storage that a text such as `window:512 int8` names.

    Raises:
        ValueError: one sentence says what is wrong.
    """
    from attnspan.cache.storage import parse_storage

    policy, _, storage = spec.strip().partition(" ")
    return allowed(policy), parse_storage(storage or "dense")


@contextmanager
def watched(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: bytes,
    policy: Policy,
    storage: Storage,
    *,
    layer: int = LAYER,
    head: int = HEAD,
    limit: int = LIMIT,
    chunk: int = CHUNK,
) -> Iterator[Run]:
    """A run over the text that has not begun; inside the block the model is attached.

    Args:
        model: the bundled one, or another whose tokens are bytes; not attached.
        text: UTF-8.
        layer, head: the layer and the KV head whose slots are watched.
        limit: how many tokens are scored at most; a cache that keeps everything stops at the
            model's trained length.

    Raises:
        ValueError: the layer, the head, the text or the policy can't be used, in one sentence.
    """
    from attnspan.evaluation.loop import Stream, first_token, sensible_limit
    from attnspan.evaluation.text import TextReader
    from attnspan.models import Cache, attach

    lives = Lives(head)
    chosen: Policy | PerLayer = policy
    with attach(model):
        cache = Cache(model, policy, storage)
        layers = cache.anatomy.layers
        for name, value, count in (
            ("layer", layer, len(layers)),
            ("head", head, layers[0].spec.num_kv_heads),
        ):
            if not 0 <= value < count:
                raise ValueError(f"{name} is {value}; one of 0 to {count - 1} is allowed")
        if policy.band is None:
            each = [policy] * len(layers)
            each[layer] = Watched(policy, lives)
            chosen = PerLayer(tuple(each))
        cache = Cache(model, chosen, storage)
        most = min(limit, sensible_limit(model, cache, limit) or limit)
        reader = TextReader(io.BytesIO(text), tokenizer)
        first = first_token(model, tokenizer)
        if first is None:
            raise ValueError("the model has no first token (BOS), which a recording begins with")
        yield Run(
            Stream(
                model,
                cache,
                reader,
                first=first,
                limit=most,
                chunk=chunk,
                watch=range(1, most + 1),
            ),
            text,
            policy,
            lives,
        )


def record(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: bytes,
    each: Sequence[tuple[Policy, Storage]],
    *,
    title: str,
    layer: int = LAYER,
    head: int = HEAD,
    limit: int = LIMIT,
    chunk: int = CHUNK,
    report: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """A recording (`attnspan.explorer.recording`) of a run for each policy and storage.

    Args:
        text: UTF-8; at most `limit` bytes of it are read.
        title: what the text is.

    Raises:
        ValueError: as `watched`.
    """
    from attnspan.evaluation.loop import Progress
    from attnspan.evaluation.report import meta

    runs, most = [], 0
    for policy, storage in each:
        with watched(
            model,
            tokenizer,
            text,
            policy,
            storage,
            layer=layer,
            head=head,
            limit=limit,
            chunk=chunk,
        ) as run:
            more = True
            while more:
                more = run.step()
                if report is not None:
                    total = run.stream.score.total
                    report(
                        Progress(
                            f"{policy}, {storage}",
                            total.tokens,
                            run.stream.limit,
                            total.perplexity,
                            run.stream.cache.nbytes,
                        )
                    )
            runs.append(as_json(run))
            most = max(most, run.stream.score.tokens)
    about = meta("explore --record", model, "bundled", title, chunk=chunk)
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": title,
        "tokens": most,
        "layer": layer,
        "head": head,
        "nll_most": MOST,
        "meta": about,
        "text": pack(text[:most]),
        "runs": runs,
    }


def about(run: Run) -> dict[str, Any]:
    """What is known of a run before it begins."""
    policy, cache = run.policy, run.stream.cache
    band = policy.band
    window = band.window if band is not None else getattr(policy, "window", None)
    return {
        "policy": str(policy),
        "storage": str(cache.storage),
        "block": policy.block,
        "sinks": policy.leading,
        "window": window,
        "capacity": policy.capacity,
        "heavy": policy.heavy if isinstance(policy, HeavyHitter | SnapKV) else 0,
        "rate": policy.rate if isinstance(policy, Compressive) else 1,
        "slot_bytes": run.slot_bytes,
    }


def shipped_text(name: str) -> bytes:
    """One of `TEXTS`."""
    from attnspan.evaluation.texts import english_heldout, python_heldout

    text = {"python": python_heldout, "english": english_heldout}[name]()
    return text.encode()


def cut(text: bytes, most: int) -> bytes:
    """The first characters of a text, of at most so many bytes.

    >>> cut("né".encode(), 2)
    b'n'
    """
    return text[:most].decode(errors="ignore").encode() if len(text) > most else text


def as_json(run: Run) -> dict[str, Any]:
    """A run that has ended, as a recording holds it."""
    lives, block, looks, total = run.lives, run.policy.block, run.looks, run.stream.score.total
    return {
        **about(run),
        "tokens": total.tokens,
        "nll_mean": total.mean,
        "nll": pack(nll_codes(run.nlls)),
        "left": pack_lives(lives.left, block) if any(lives.left) else None,
        "pooled": pack_lives(lives.pooled, block) if any(lives.pooled) else None,
        "looks": {name: [getattr(look, name) for look in looks] for name in Look.__annotations__},
        "perplexity": _so_far(run),
    }


def _so_far(run: Run) -> list[float]:
    """The perplexity of all tokens up to each look."""
    import math
    from itertools import accumulate

    sums = list(accumulate(run.nlls))
    return [round(math.exp(min(709.0, sums[n - 1] / n)), 5) for n in (x.tokens for x in run.looks)]
