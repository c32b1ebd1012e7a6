"""The one place where a model's attention and rotary embeddings are diverted, for one forward.

transformers looks attention and masks up by name, so one name is registered. With a pattern, what
stands behind it comes with each call, in the place of a mask (`Carrier`): autograd may run a layer
again in a thread of its own. With a cache it is a context variable, set and read within a single
forward, so in one thread. Nothing is left changed once the forward is over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "attnspan"
CACHE_NAMES = ("past_key_values", "cache")
"""What a forward calls its cache: the second from transformers 5.24 on."""

Attend = Callable[..., Tensor]
"""`attend(module, q, k, v, **kwargs)`: one layer's attention, `(batch, num_heads, m, head_dim)`."""
Rotary = Callable[..., tuple[Tensor, Tensor]]
"""`rotary(module, forward, x, position_ids, ...)` stands for a rotary embedding's forward."""

_attend: ContextVar[Attend | None] = ContextVar("attnspan_attend", default=None)
_mask: ContextVar[Carrier | None] = ContextVar("attnspan_mask", default=None)


class Refused(ValueError):
    """A model that can't be done exactly; the message says why."""


@dataclass(frozen=True)
class Carrier:
    """What goes through the layers in the place of a mask, and brings their attention along."""

    attend: Attend


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    if isinstance(attention_mask, Carrier):
        out = attention_mask.attend(module, query, key, value, mask=attention_mask, **kwargs)
    else:
        attend = _attend.get()
        if attend is None:
            raise Refused("the model replaces its masks, so padding can't be honoured")
        out = attend(module, query, key, value, **kwargs)
    return out.transpose(1, 2).contiguous(), None


def _given_mask(*args: Any, **kwargs: Any) -> Any:
    """A cache knows what each query sees, and needs no mask; with a pattern it is a `Carrier`."""
    return _mask.get()


def cache_name(module: nn.Module) -> str:
    """What the forward of `module` calls its cache."""
    names = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])


def restore_forward(module: nn.Module, forward: Any) -> None:
    """Puts an instance's own forward back, or takes ours away where it had none."""
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """For the block's length, no autocast: what is held against the model needs all its digits."""
    kinds = {parameter.device.type for parameter in model.parameters()}
    with ExitStack() as stack:
        for kind in sorted(filter(torch.amp.is_autocast_available, kinds)):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class Interface:
    """The configs and rotary embeddings of one model, found once, diverted for single forwards."""

    def __init__(self, model: nn.Module) -> None:
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _given_mask)
        modules = list(model.modules())
        configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
        self.configs = [c for c in configs.values() if hasattr(c, "_attn_implementation_internal")]
        self.embeddings = [m for m in modules if type(m).__name__.endswith("RotaryEmbedding")]

    @contextmanager
    def masked(self, mask: Carrier) -> Iterator[None]:
        """For the block's length, what the model builds as its masks is `mask`."""
        token = _mask.set(mask)
        try:
            yield
        finally:
            _mask.reset(token)

    @contextmanager
    def diverted(self, attend: Attend | None, rotary: Rotary | None = None) -> Iterator[None]:
        """For the block's length, attention is `attend`, and each rotary embedding `rotary`.

        With an `attend` of None it is what the masks bring, in whatever thread.
        """
        before = [config._attn_implementation_internal for config in self.configs]
        # Another library may have put a forward of its own on an instance already.
        embeddings = [(m, m.__dict__.get("forward")) for m in self.embeddings]
        token = _attend.set(attend)
        try:
            for config in self.configs:
                config._attn_implementation_internal = NAME
            if rotary is not None:
                for module in self.embeddings:
                    module.__dict__["forward"] = partial(rotary, module, module.forward)
            yield
        finally:
            for module, forward in embeddings:
                restore_forward(module, forward)
            for config, name in zip(self.configs, before, strict=True):
                config._attn_implementation_internal = name
            _attend.reset(token)
