"""What a ring must know of a model, found by running it on a few tokens, in one process.

The model runs three times: as it is; with its attention diverted; and on some of the tokens alone,
at their own positions, with the others' keys and values put in from the run before. Where the last
run's logits equal the first's, nothing but attention looks at other tokens, and a shard is exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from attnspan.dispatch import attention
from attnspan.models.anatomy import device_of, refuse_unknown, text_config
from attnspan.models.interface import Carrier, Interface, Refused, full_precision
from attnspan.patterns import Causal, Pattern, SlidingWindow

TOKENS = 9
# Of which process 1 of 2 might hold these.
SOME = (1, 2, 3, 6, 8)

_latest: ContextVar[int | None] = ContextVar("attnspan_latest", default=None)


@dataclass(frozen=True)
class Found:
    """What the probe found.

    Attributes:
        windows: for each layer the sliding window that its attention is called with.
        sample: `(some,)`, logits that models of the same weights share.
        no_loss: why labels can't be honoured; None where they can.
    """

    windows: tuple[int | None, ...]
    sample: Tensor
    no_loss: str | None

    def own_patterns(self, config: Any) -> tuple[Pattern, ...]:
        """The pattern that each layer has by itself.

        Raises:
            Refused: one sentence names a layer whose pattern isn't known.
        """
        kinds = getattr(config, "layer_types", None) or [None] * len(self.windows)
        return tuple(
            _own_pattern(layer, kind, window, config)
            for layer, (kind, window) in enumerate(zip(kinds, self.windows, strict=True))
        )


def _own_pattern(layer: int, kind: str | None, window: int | None, config: Any) -> Pattern:
    if kind == "sliding_attention":
        window = window or getattr(config, "sliding_window", None)
    if kind not in (None, "full_attention", "sliding_attention") or (
        kind == "full_attention" and window
    ):
        raise Refused(
            f"layer {layer} of model type {config.model_type!r} is {kind!r}"
            f"{f' with a window of {window}' if window else ''}, whose pattern isn't known; "
            "attach(model, pattern=..., ring=...) is allowed"
        )
    return SlidingWindow(window) if window else Causal()


@contextmanager
def ending_at(latest: int) -> Iterator[None]:
    """For the block's length, rotary embeddings know the last position of the whole sequence."""
    token = _latest.set(latest)
    try:
        yield
    finally:
        _latest.reset(token)


def rotary(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A rotary embedding's forward over a shard, as over the whole sequence.

    Dynamic NTK and LongRoPE choose their frequencies by the largest position, so it goes in as one
    more column.
    """
    latest = _latest.get()
    if latest is None:
        return forward(*args, **kwargs)
    places = args[1] if len(args) > 1 else kwargs["position_ids"]
    places = torch.cat((places, places.new_full((*places.shape[:-1], 1), latest)), -1)
    if len(args) > 1:
        args = (args[0], places, *args[2:])
    else:
        kwargs = {**kwargs, "position_ids": places}
    result = forward(*args, **kwargs)
    if isinstance(result, tuple):
        return tuple(x[..., :-1, :] for x in result)
    return result[..., :-1, :]


@torch.no_grad()
def examine(model: nn.Module, interface: Interface) -> Found:
    """Runs `model` three times on nine tokens, without any ring.

    Raises:
        Refused: one sentence that names what can't be done exactly.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with full_precision(model):
            return _examine(model, interface)
    finally:
        for module in training:
            module.training = True
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # After a forward alone, the root keeps its whole weights, which steps then miss.
                module.reshard()


def _examine(model: nn.Module, interface: Interface) -> Found:
    config = text_config(model)
    count, kind = config.num_hidden_layers, f"model type {config.model_type!r}"
    device = device_of(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = (torch.arange(TOKENS, device=device) * 5 + 2)[None] % vocabulary
    some = torch.tensor(SOME, device=device)
    names = inspect.signature(model.forward).parameters
    passes_on = any(each.kind is each.VAR_KEYWORD for each in names.values())
    labelled = "labels" in names and passes_on
    no_loss = None if labelled else f"{kind} can't take labels that are shifted already"

    calls: list[tuple[int, int | None]] = []
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def whole(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        layer: Any = getattr(module, "layer_idx", None)
        calls.append((layer, kwargs.get("sliding_window")))
        kept[layer] = k, v
        return _attend(q, k, v, **kwargs)

    def part(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        layer: Any = getattr(module, "layer_idx", None)
        k, v = (x.index_copy(2, some, mine) for x, mine in zip(kept[layer], (k, v), strict=True))
        q = q.new_zeros(*q.shape[:2], TOKENS, q.shape[3]).index_copy(2, some, q)
        return _attend(q, k, v, **kwargs)[:, :, some]

    feed: dict[str, Any] = {"input_ids": ids, "use_cache": False, "return_dict": True}
    expected = model(**feed, **({"labels": ids} if labelled else {}))
    try:
        with interface.diverted(None, rotary):
            targets = nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
            more = {"labels": targets, "shift_labels": targets, "num_items_in_batch": TOKENS - 1}
            with interface.masked(Carrier(whole)):
                got = model(**feed, **(more if labelled else {}))
            if sorted(layer for layer, _ in calls) != list(range(count)):
                raise Refused(
                    f"{kind} has {count} layers, and layers {sorted(x for x, _ in calls)} call "
                    "attention through transformers' interface; a ring needs it of each layer, once"
                )
            feed |= {"input_ids": ids[:, some], "position_ids": some[None]}
            with interface.masked(Carrier(part)), ending_at(TOKENS - 1):
                shard = model(**feed)
    except Refused:
        raise
    except Exception as error:  # what breaks here would break in the ring
        raise Refused(
            f"{kind} can't run with its attention diverted "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    logits = _logits(expected)
    _close(_logits(got), logits, f"{kind} gives other outputs through attnspan")
    _close(
        _logits(shard),
        logits[:, some],
        f"{kind} gives other outputs where it holds some of the tokens only",
    )
    if labelled and not torch.allclose(got["loss"], expected["loss"], rtol=1e-4):
        no_loss = f"{kind} computes its loss otherwise when labels are shifted already"
    windows = tuple(window for _, window in sorted(calls, key=lambda call: call[0]))
    return Found(windows, logits[0, -1, :64].clone(), no_loss)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    refuse_unknown(kwargs)
    pattern = SlidingWindow(sliding_window) if sliding_window else Causal()
    return attention(q, k, v, pattern, scale=scaling, softcap=softcap, sink_logits=s_aux)


def _logits(output: Any) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    return output["logits"] if "logits" in output else output[0]


def _close(got: Tensor, expected: Tensor, wrong: str) -> None:
    error, scale = float((got - expected).abs().max()), max(1.0, float(expected.abs().max()))
    # Half the digits: far above what a deep model's rounding costs, far below a wrong mask.
    allowed = torch.finfo(expected.dtype).eps ** 0.5 * scale
    if not error <= allowed:
        raise Refused(
            f"{wrong} (off by {error:.2g}, {allowed:.2g} is allowed), so it can't be done exactly"
        )
