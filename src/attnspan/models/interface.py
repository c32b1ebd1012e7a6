"""The one place where a model's attention and rotary embeddings are diverted, for one forward.

transformers looks attention and masks up by name, so one name is registered, and what stands behind
it is chosen per forward by a context variable. Nothing is left changed once the forward is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "attnspan"

Attend = Callable[..., Tensor]
"""`attend(module, q, k, v, **kwargs)`: one layer's attention, `(batch, num_heads, m, head_dim)`."""
Rotary = Callable[..., tuple[Tensor, Tensor]]
"""`rotary(module, forward, x, position_ids, ...)` stands for a rotary embedding's forward."""

_attend: ContextVar[Attend] = ContextVar("attnspan_attend")
_mask: ContextVar[Any] = ContextVar("attnspan_mask", default=None)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    if attention_mask is not None:
        kwargs["mask"] = attention_mask
    out = _attend.get()(module, query, key, value, **kwargs)
    return out.transpose(1, 2).contiguous(), None


def _given_mask(*args: Any, **kwargs: Any) -> Any:
    """A cache knows what each query sees, and needs no mask; with a pattern it is `Rows`."""
    return _mask.get()


def restore_forward(module: nn.Module, forward: Any) -> None:
    """Puts an instance's own forward back, or takes ours away where it had none."""
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


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
    def masked(self, mask: Any) -> Iterator[None]:
        """For the block's length, what the model builds as its masks is `mask`."""
        token = _mask.set(mask)
        try:
            yield
        finally:
            _mask.reset(token)

    @contextmanager
    def diverted(self, attend: Attend, rotary: Rotary | None = None) -> Iterator[None]:
        """For the block's length, attention is `attend`, and each rotary embedding `rotary`."""
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
