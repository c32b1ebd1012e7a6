"""A model's layers under a policy or a pattern: what each sees, holds and reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attnspan.planner.engines import cache_bytes
from attnspan.planner.held import CacheBytes, LayerCache, layer_policies
from attnspan.planner.seen import View, of_pattern, of_policy, of_window
from attnspan.planner.spec import ModelSpec
from attnspan.policies import KeepAll, PerLayer, Policy, SinkWindow, Window

if TYPE_CHECKING:
    from attnspan.patterns.algebra import Pattern


@dataclass(frozen=True)
class Kind:
    """Layers that are alike.

    Attributes:
        name: "full", "sliding", "chunked", or "patterned" under a pattern that was asked for; with
            ", latent" and, where they read the keys and values of earlier layers, ", shared".
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


def every_layer(pattern: Pattern | Sequence[Pattern], spec: ModelSpec) -> tuple[Pattern, ...]:
    """One pattern for each layer.

    Raises:
        ValueError: there are more of them, or fewer.
    """
    given = tuple(pattern) if isinstance(pattern, Sequence) else (pattern,) * spec.layers
    if len(given) != spec.layers:
        raise ValueError(
            f"pattern has {len(given)} layers; one pattern, or one for each of the model's "
            f"{spec.layers}, is allowed"
        )
    return given


def layer_views(
    spec: ModelSpec, policy: Policy | PerLayer | None, patterns: Sequence[Pattern] | None
) -> tuple[tuple[View, ...], tuple[str, ...]]:
    """Each layer's view, and what it sees in words.

    Raises:
        ValueError: as in `attnspan.planner.engines.layer_policies`.
    """
    if patterns is not None:
        made = {each: of_pattern(each) for each in set(patterns)}
        return tuple(made[each] for each in patterns), tuple(str(each) for each in patterns)
    views, words = [], []
    for window, chosen in zip(spec.windows, _chosen(spec, policy), strict=True):
        if chosen is None:
            views.append(of_window(window, spec.chunked))
            kind = "its chunk of {:,}" if spec.chunked else "the last {:,}"
            words.append("all" if window is None else kind.format(window))
        else:
            views.append(of_policy(chosen))
            words.append(str(chosen))
    return tuple(views), tuple(words)


def _chosen(spec: ModelSpec, policy: Policy | PerLayer | None) -> tuple[Policy | None, ...]:
    """Each layer's policy; None where it is what the layer has of itself."""
    if policy is None:
        return (None,) * spec.layers
    return tuple(
        None
        if isinstance(each, KeepAll) or (window is not None and each == Window(window))
        else each
        for each, window in zip(layer_policies(spec, policy), spec.windows, strict=True)
    )


def needs_scores(spec: ModelSpec, policy: Policy | PerLayer | None) -> bool:
    """Whether some layer's policy decides by the attention that tokens received."""
    return any(each is not None and each.needs_scores for each in _chosen(spec, policy))


def ring_patterns(spec: ModelSpec, policy: Policy | PerLayer | None) -> list[Pattern]:
    """What each layer sees, as a ring computes it.

    Raises:
        ValueError: a policy decides token by token, where no device has all tokens.
    """
    from attnspan.patterns.library import Blockwise, Causal, Sinks, SlidingWindow

    patterns: list[Pattern] = []
    for window, chosen in zip(spec.windows, _chosen(spec, policy), strict=True):
        match chosen:
            case None:
                wide = Causal() if window is None else SlidingWindow(window)
                patterns.append(Blockwise(window) if window and spec.chunked else wide)
            case Window(kept, 1):
                patterns.append(SlidingWindow(kept))
            case SinkWindow(sinks, kept, 1):
                patterns.append(SlidingWindow(kept) | Sinks(sinks))
            case _:
                raise ValueError(
                    f"policy {chosen}: on a ring keep-all, window:W and sinks:S+window:W are "
                    "allowed; others decide where no device has all tokens"
                )
    return patterns


def token_bytes(spec: ModelSpec, storage: str) -> int:
    """Bytes of one token's keys and values in a layer of its own."""
    unbounded = replace(spec, windows=(None,) * spec.layers, chunked=False)
    return max(layer.bytes for layer in cache_bytes(unbounded, 1, storage=storage).layers)


def pattern_cache(
    spec: ModelSpec, views: tuple[View, ...], context: int, batch: int, token: int
) -> CacheBytes:
    """What must be held so that later queries find all that a pattern lets them see."""
    shares = spec.shares or (None,) * spec.layers
    held = {view: view.hold(context) for view in set(views)}
    return CacheBytes(
        "theory",
        tuple(
            LayerCache(held[view], held[view] * token * batch) if of is None else LayerCache(0, 0)
            for view, of in zip(views, shares, strict=True)
        ),
    )


def layer_kinds(
    spec: ModelSpec,
    views: tuple[View, ...],
    words: tuple[str, ...],
    cache: CacheBytes,
    context: int,
    patterned: bool,
) -> tuple[Kind, ...]:
    """Layers that are alike, counted together."""
    shares = spec.shares or (None,) * spec.layers
    found: dict[tuple[str, str, View, int], list[int]] = {}
    for layer, (view, word, window, of) in enumerate(
        zip(views, words, spec.windows, shares, strict=True)
    ):
        name = "full" if window is None else "chunked" if spec.chunked else "sliding"
        name = "patterned" if patterned else name
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
