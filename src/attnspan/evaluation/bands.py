"""What a config says of windows, beside what each layer of the model really sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnspan.models.anatomy import text_config

FIELDS = (
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "sliding_window_pattern",
    "attention_chunk_size",
)

_BEYOND = 8  # tokens behind a window, which must see no change


@dataclass(frozen=True)
class Bands:
    """Windows of the layers: said, passed on, and seen.

    Attributes:
        declared: the config's own fields on windows.
        windows: for each layer what its attention is called with; None: all of the past.
        seen: for each layer how many keys a query sees, itself included, by a change of the hidden
            state that goes into the layer; None: up to the end of what was tried.
        tried: tokens of that sequence; 0: the attentions can't be run one by one.
    """

    declared: dict[str, Any]
    windows: tuple[int | None, ...]
    seen: tuple[int | None, ...]
    tried: int

    @property
    def agrees(self) -> bool | None:
        """Whether each layer sees what it is called with; None where that can't be told."""
        if not self.tried:
            return None
        pairs = list(zip(self.windows, self.seen, strict=True))
        # The changed token stands at `_BEYOND` at most; a window that ends there can't be told.
        if any(w is not None and w >= self.tried - _BEYOND for w, _ in pairs):
            return None
        return all(window == seen for window, seen in pairs)

    def as_dict(self) -> dict[str, Any]:
        return {
            "declared": self.declared,
            "windows": list(self.windows),
            "seen": list(self.seen),
            "tokens_tried": self.tried,
            "agrees": self.agrees,
            "sentence": self.sentence,
        }

    @property
    def sentence(self) -> str:
        count = len(self.windows)
        sizes = sorted({w for w in self.windows if w is not None})
        window, used = self.declared.get("sliding_window"), self.declared.get("use_sliding_window")
        checked = {
            None: f"can't be checked within {self.tried:,} tokens" if self.tried else "unchecked",
            True: f"checked by changing a token, over {self.tried:,} tokens",
            False: f"but the layers really see {sorted({s or 0 for s in self.seen})} (0: all)",
        }[self.agrees]
        if not sizes:
            if window is None:
                return (
                    f"the config declares no window: all {count} layers see all of the past "
                    f"({checked})"
                )
            why = "use_sliding_window is false" if used is False else "the family takes no notice"
            return (
                f"sliding_window is {window:,} in the config, but no layer uses it ({why}): all "
                f"{count} see all of the past ({checked})"
            )
        sliding = sum(w is not None for w in self.windows)
        W = sizes[-1]
        named = " and ".join(f"{w:,}" for w in sizes)
        return (
            f"{sliding} of {count} layers have a window of {named}: a query sees that many keys, "
            f"itself included, the farthest at distance {W - 1:,} ({checked}); FlashAttention "
            f"calls it ({W - 1}, 0), FlashInfer window_left={W - 1}, and Mistral's reference "
            f"prefill would see {W + 1:,}"
        )


def examine(
    model: nn.Module,
    ids: Tensor,
    windows: Sequence[int | None],
    declared: Mapping[str, Any] | None = None,
) -> Bands:
    """Runs each attention twice on what comes into it, once with one token's state changed.

    Where the outputs differ is where the layer lets that token be seen from. Both runs have the
    same shapes, so outputs that don't depend on it have the same bits.

    Args:
        ids: `(n,)`, on the model's device; a window of n or more can't be told from all.
        windows: for each layer what its attention is called with (`models.anatomy`).
        declared: the config as it was written; families may drop a field that they don't use.
    """
    config = text_config(model)
    inner = (declared or {}).get("text_config")
    written = {**(declared or {}), **inner} if isinstance(inner, Mapping) else declared or {}
    said = {
        field: written.get(field, getattr(config, field, None))
        for field in FIELDS
        if written.get(field, getattr(config, field, None)) is not None
    }
    attentions = _attentions(model, len(windows))
    seen: list[int | None] = []
    if attentions is not None:
        largest = max((w for w in windows if w is not None), default=len(ids))
        ids = ids[: min(len(ids), largest + 2 * _BEYOND)]
        seen = _seen(model, attentions, ids)
    tried = len(ids) if seen else 0
    return Bands(said, tuple(windows), tuple(seen) or (None,) * len(windows), tried)


def _attentions(model: nn.Module, count: int) -> list[nn.Module] | None:
    """The attention module of each layer, in order: the innermost one that knows its layer."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        inner = (getattr(part, "layer_idx", None) for part in module.children())
        if isinstance(index, int) and all(each is None for each in inner):
            found.setdefault(index, module)
    return [found[i] for i in range(count)] if set(range(count)) <= found.keys() else None


def _seen(model: nn.Module, modules: Sequence[nn.Module], ids: Tensor) -> list[int | None]:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        with torch.inference_mode():
            model(input_ids=ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    place = min(_BEYOND, len(ids) // 4)
    found: list[int | None] = []
    with torch.inference_mode():
        for module, (args, kwargs) in zip(modules, calls, strict=True):
            hidden = args[0] if args else kwargs["hidden_states"]
            other = hidden.clone()
            other[:, place] = hidden[:, place].roll(1, -1) + 1
            before, after = (_run(module, x, args, kwargs) for x in (hidden, other))
            apart = (before != after).any(-1)[0].nonzero()[:, 0]
            far = int(apart[-1]) if len(apart) else place
            found.append(None if far == len(ids) - 1 else far - place + 1)
    return found


def _run(module: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    out = module(x, *args[1:], **kwargs) if args else module(**{**kwargs, "hidden_states": x})
    return out[0] if isinstance(out, tuple) else out
