"""`with attach(model):` a Hugging Face model whose forward works with `attnspan.Cache`."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from attnspan.models.anatomy import (
    Anatomy,
    Rotated,
    Unrotated,
    device_of,
    probe,
    refuse_unknown,
)
from attnspan.models.cache import Cache
from attnspan.models.interface import (
    CACHE_NAMES,
    Interface,
    Refused,
    cache_name,
    full_precision,
    restore_forward,
)
from attnspan.models.patterned import Patterns, patterned
from attnspan.policies import KeepAll


@contextmanager
def attach(
    model: nn.Module, pattern: Patterns | None = None, *, ring: Any = None
) -> Iterator[nn.Module]:
    """For the block's length, `model` attends through attnspan; afterwards it is as before.

    Without a pattern it takes an `attnspan.Cache` as `past_key_values`, in eval mode; calls without
    such a cache run as ever. With a pattern its forward and backward, in training too, see what the
    pattern says and nothing else, padding and other documents of the same row left out; call
    `backward()` inside the block, in any thread. Under `torch.autocast` attention is computed in
    autocast's dtype, as torch's own is. Either way a few tokens must first come out as they do of
    the untouched model, without autocast.

    Args:
        model: a decoder of Hugging Face transformers.
        pattern: one for all layers, a list of one for each, or a mapping from the config's
            `layer_types`, such as `{"sliding_attention": SlidingWindow(512), "full_attention":
            Causal()}`. It replaces the masks that the model would have. With a ring, None is what
            the model has: causal layers and sliding windows.
        ring: the processes that share each sequence: an `attnspan.Ring`, or a process group or 1-D
            `DeviceMesh`, whose layout is then `Contiguous` where every layer has a window, and
            `ZigZag` otherwise. None: this process alone.

    Raises:
        ValueError: where the model can't be done exactly, or the pattern doesn't fit its layers;
            one sentence says why. With a ring, on every rank alike, and `RingMismatch` where the
            ranks' models, patterns or calls differ.
        TypeError: where `model` is no module, or `pattern` or `ring` is none of these.
        RingPeerLost: a process of the ring died or hangs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a transformers model is allowed")
    if "_attnspan" in model.__dict__ or "_attnspan_pattern" in model.__dict__:
        raise ValueError("model is attached already; one `with attnspan.attach(model):` is allowed")
    if ring is not None:
        from attnspan.models.ringed import ringed

        with ringed(model, pattern, ring):
            yield model
        return
    if pattern is not None:
        with patterned(model, pattern):
            yield model
        return
    attachment = _Attachment(model)
    attachment.install()
    try:
        attachment.check()
        yield model
    finally:
        attachment.remove()


class _Attachment:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base: nn.Module = getattr(model, getattr(model, "base_model_prefix", ""), model)
        self.interface = Interface(model)
        self.anatomy: Anatomy = probe(model, self.interface)
        self.unrotated = Unrotated(self.anatomy.angles, self.interface)
        self.rotated = Rotated(self.anatomy.angles, self.interface)
        self.turned = False  # whether the forward under way rotates q and k itself
        self.before: dict[nn.Module, Callable[..., Any] | None] = {}  # forwards of their own
        self.cache: Cache | None = None
        self.busy = threading.Lock()

    def install(self) -> None:
        self.model.__dict__["_attnspan"] = self
        if self.base is not self.model:
            self._wrap(self.base, self._base_forward)
        self._wrap(self.model, self._in_chunks)

    def remove(self) -> None:
        for module, forward in self.before.items():
            restore_forward(module, forward)
        self.model.__dict__.pop("_attnspan", None)

    def _wrap(self, module: nn.Module, wrapper: Callable[..., Any]) -> None:
        forward = module.forward
        signature = inspect.signature(forward)

        @wraps(forward)  # generate reads the signature to learn what the model takes
        def call(*args: Any, **kwargs: Any) -> Any:
            names = list(signature.parameters)
            kwargs |= dict(zip(names, args, strict=False))
            given = [name for name in CACHE_NAMES if isinstance(kwargs.get(name), Cache)]
            if not given:
                return forward(**kwargs)
            cache = kwargs.pop(given[0])
            for name in CACHE_NAMES:
                if kwargs.pop(name, None) is not None:
                    raise ValueError(f"{given[0]} and {name} are given; one of them is allowed")
            return wrapper(forward, kwargs | {cache_name(module): cache})

        self.before[module] = module.__dict__.get("forward")
        module.__dict__["forward"] = call

    def check(self) -> None:
        """Holds a few tokens through a cache, in two calls, against the untouched model."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        ids = (torch.arange(9, device=device_of(self.model)) * 5 + 2)[None] % vocabulary
        with torch.no_grad(), full_precision(self.model):
            expected = _first(self.model(input_ids=ids, use_cache=False))
            cache = Cache(self.model, KeepAll())
            parts = [
                _first(self.model(input_ids=part, past_key_values=cache, use_cache=True))
                for part in (ids[:, :6], ids[:, 6:])
            ]
        got = torch.cat(parts, dim=1)
        error = float((got - expected).abs().max())
        scale = max(1.0, float(expected.abs().max()))
        # Half the digits: far above what a deep model's rounding costs, far below a wrong rotation.
        allowed = torch.finfo(expected.dtype).eps ** 0.5 * scale
        if not error <= allowed:
            raise Refused(
                f"model type {self.model.config.model_type!r} gives other outputs through a cache "  # type: ignore[union-attr]
                f"(off by {error:.2g}, {allowed:.2g} is allowed), so it can't be done exactly"
            )

    def _in_chunks(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """A long input goes through in chunks, so that no layer ever sees it whole."""
        cache = _cache_of(kwargs)
        name = "input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"
        whole = kwargs.get(name)
        before = cache.columns
        try:
            if whole is None or whole.shape[1] <= cache.chunk:
                return self._one(forward, kwargs)
            return self._each_chunk(forward, kwargs, cache, name, whole)
        except BaseException:
            # What was taken in before the error can't be taken back.
            cache.broken = cache.broken or cache.columns != before
            raise

    def _each_chunk(
        self,
        forward: Callable[..., Any],
        kwargs: dict[str, Any],
        cache: Cache,
        name: str,
        whole: Tensor,
    ) -> Any:
        batch, length = whole.shape[:2]
        cache.agree(kwargs)
        self._check_whole(cache, kwargs, batch, length)
        keep = kwargs.get("logits_to_keep") or 0
        outputs, results = [], None
        for start in range(0, length, cache.chunk):
            stop = min(start + cache.chunk, length)
            part = dict(kwargs)
            for each in (name, "position_ids", "cache_position"):
                if kwargs.get(each) is not None:
                    part[each] = (
                        kwargs[each][..., start:stop]
                        if each != "inputs_embeds"
                        else (kwargs[each][:, start:stop])
                    )
            mask = kwargs.get("attention_mask")
            if mask is not None:
                part["attention_mask"] = mask[:, mask.shape[1] - length :][:, start:stop]
            results = self._one(forward, part)
            if not (isinstance(keep, int) and keep and stop <= length - keep):
                outputs.append(_first(results))
        joined = torch.cat(outputs, dim=1)
        if isinstance(keep, int) and keep:
            joined = joined[:, -keep:]
        if isinstance(results, tuple):
            return (joined, *results[1:])
        assert results is not None
        results[next(iter(results))] = joined
        return results

    def _check_whole(self, cache: Cache, kwargs: dict[str, Any], batch: int, length: int) -> None:
        """What would fail, or come out wrong, in a later chunk is refused before the first."""
        flags = ("output_hidden_states", "output_attentions", "output_router_logits")
        for wanted in ("labels", *flags):
            if self._asked(wanted, kwargs):
                raise ValueError(
                    f"{wanted} is given with {length} tokens, which go through in chunks of "
                    f"{cache.chunk}; a chunk's length or less is allowed"
                )
        keep = kwargs.get("logits_to_keep", 0)
        keep = 0 if keep is None else keep
        if not isinstance(keep, int) or keep < 0:
            got = "a tensor" if isinstance(keep, Tensor) else repr(keep)
            raise ValueError(
                f"logits_to_keep is {got} with {length} tokens, which go through in chunks of "
                f"{cache.chunk}; a whole number of at least 0 is allowed"
            )
        new = cache.new_tokens(batch, length, kwargs.get("attention_mask"))
        self._check_positions(kwargs.get("position_ids"), cache, new, batch, length)

    def _asked(self, name: str, kwargs: dict[str, Any]) -> bool:
        """Whether a call, or else the model's config, asks for something."""
        value = kwargs.get(name)
        if value is None and name != "labels":
            value = getattr(self.model.config, name, None)
        return value is not None and value is not False

    def _base_forward(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        cache = _cache_of(kwargs)
        name = "input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"
        width = kwargs[name].shape[1]
        if width > cache.chunk:
            raise ValueError(
                f"{name} has {width} tokens; the decoder by itself takes the cache's chunk of "
                f"{cache.chunk} or less (the whole model takes any number)"
            )
        with self._alone():
            return self._one_forward(forward, kwargs)

    def _one(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        if self.model is self.base:
            with self._alone():
                return self._one_forward(forward, kwargs)
        return forward(**kwargs)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """What is diverted is the model's, so two forwards at once would meet each other's."""
        if not self.busy.acquire(blocking=False):
            raise RuntimeError(
                "the model is in another thread's forward with an attnspan.Cache; one at a time is "
                "allowed"
            )
        try:
            yield
        finally:
            self.busy.release()

    def _one_forward(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """One forward of the decoder with an attnspan.Cache."""
        cache = _cache_of(kwargs)
        if cache.model is not self.model:
            raise ValueError("past_key_values is an attnspan.Cache made for another model")
        cache.agree(kwargs)
        if self._asked("output_attentions", kwargs):
            raise ValueError("output_attentions is True; a bounded cache has no weights to return")
        whole = (
            kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        )
        batch, width = whole.shape[:2]
        if cache.clock is not None:
            if width != 1:
                raise ValueError(f"a step by a clock takes one token a row, not {width}")
            for name in ("attention_mask", "position_ids"):
                if kwargs.get(name) is not None:
                    raise ValueError(f"{name} is given; a step by a clock knows its place itself")
            return self._stepped(lambda: forward(**kwargs), cache)
        new = cache.new_tokens(batch, width, kwargs.pop("attention_mask", None))
        self._check_positions(kwargs.pop("position_ids", None), cache, new, batch, width)
        cache.begin(batch, width, new)
        failed = True
        self.cache, self.turned = cache, cache.in_step
        self.rotated.start = cache.columns - width
        try:
            rotary = self.rotated if self.turned else self.unrotated
            with self.interface.diverted(self._attend, rotary):
                result = forward(**kwargs)
            failed = False
        finally:
            cache.end(failed)
            self.cache = None
        return result

    def _stepped(self, forward: Callable[[], Any], cache: Cache) -> Any:
        """One forward whose place the cache's clock knows; the cache counts nothing."""
        self.cache, self.turned = cache, False
        try:
            # Compiled layers leave it to itself: what it reads of a cache is no constant of them.
            attend: Any = torch.compiler.disable(self._attend)
            with self.interface.diverted(attend, self.unrotated):
                return forward()
        finally:
            self.cache = None

    def _check_positions(
        self,
        positions: Tensor | None,
        cache: Cache,
        new: Tensor | None,
        batch: int,
        width: int,
    ) -> None:
        """A cache counts positions itself, so those given must be what it counts."""
        if width == 0 and cache.tokens_seen:
            raise ValueError(
                f"input_ids has 0 tokens for a cache that has seen {cache.tokens_seen:,}; those "
                "that come next, or a new cache, are allowed"
            )
        if positions is None:
            return
        if (
            positions.dim() != 2
            or positions.shape[0] not in (1, batch)
            or (positions.shape[1] != width)
        ):
            raise ValueError(
                f"position_ids has the shape {tuple(positions.shape)}; {(batch, width)} is allowed"
            )
        start = torch.zeros(batch, 1, dtype=torch.long)
        for rows, count in zip(cache.rows, cache.seen, strict=True):
            start[rows] = count
        given = positions.cpu()
        if new is None:
            agrees = given == start + torch.arange(width)
        else:
            agrees = (given == start + new.long().cumsum(1) - 1) | ~new
        if not agrees.all():
            raise ValueError(
                "position_ids don't count on from the tokens that the cache has seen, padding left "
                "out; leave them out, or give those"
            )

    def _attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        refuse_unknown(kwargs)
        layer = getattr(k, "attnspan_layer", None)
        if layer is None or self.cache is None:
            raise Refused(
                "the model changes keys after the cache saw them, so it can't be done exactly"
            )
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            raise RuntimeError(
                "attnspan.Cache holds no graph: call the model under torch.no_grad() or "
                "torch.inference_mode()"
            )
        return self.cache.attend(
            layer,
            q,
            k,
            v,
            scale=scaling,
            softcap=softcap,
            sink_logits=s_aux,
            rotated=self.turned,
        )


def _cache_of(kwargs: dict[str, Any]) -> Cache:
    return next(kwargs[name] for name in CACHE_NAMES if name in kwargs)


def _first(output: Any) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    return output[0]
