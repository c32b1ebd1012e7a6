"""What a model's layers are, found by running them on a few tokens.

A config says too little: which layers rotate, over how many dimensions and in which pairs, differs
by family and sits in its code. So the model runs twice on eight tokens at spread positions, once as
it is and once with rotation taken out (and the first run's attention outputs put in, so that both
runs see the same hidden states). What turns the second run's keys into the first's is the layer's
rotation; a layer that no known rotation explains is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnspan.cache.lane import LayerSpec
from attnspan.dispatch import attention
from attnspan.models.interface import Interface, Refused, full_precision
from attnspan.positions import Rope, rotate

PLACES = (0, 1, 2, 3, 5, 17, 101, 801)


@dataclass(frozen=True)
class Layer:
    """One attention layer: what a cache must know, and the band it was trained with, if any."""

    spec: LayerSpec
    sliding_window: int | None


@dataclass(frozen=True)
class Angles:
    """What one rotary embedding gives: cosines of `width`, laid out as its model applies them.

    `rope` is None where no layer's angles explain them. `layout` is "halves" (each cosine again in
    the second half), "pairs" (each cosine twice running) or "once".
    """

    width: int
    rope: Rope | None = None
    layout: str = ""

    def lay(self, x: Tensor) -> Tensor:
        if self.layout == "halves":
            return torch.cat((x, x), -1)
        return x.repeat_interleave(2, -1) if self.layout == "pairs" else x


@dataclass(frozen=True)
class Anatomy:
    """What the probe found: the layers, and what each rotary embedding gives.

    `angles` is keyed by the embedding's index in `Interface.embeddings` and its layer type.
    """

    layers: tuple[Layer, ...]
    angles: dict[tuple[int, str | None], Angles]


def anatomy_of(model: nn.Module) -> Anatomy:
    """What an attachment found of `model`, or what a probe finds now.

    Raises:
        Refused: where the model can't be done exactly; one sentence says why.
    """
    attached = model.__dict__.get("_attnspan")
    return attached.anatomy if attached is not None else probe(model, Interface(model))


@dataclass
class _Seen:
    query: Tensor
    key: Tensor
    out: Tensor
    sliding_window: int | None
    softcap: bool


@torch.no_grad()
def probe(model: nn.Module, interface: Interface) -> Anatomy:
    """Runs `model` twice on eight tokens and explains its layers.

    Raises:
        Refused: one sentence that names what can't be done exactly.
    """
    config = text_config(model)
    if model.training:
        raise Refused(
            "the model is in training mode, where dropout makes a cache inexact: call model.eval()"
        )
    if not interface.embeddings:
        raise Refused(f"{_family(config)} has no rotary embedding that could be taken over")
    given: dict[tuple[int, str | None], Tensor] = {}
    plain: list[_Seen] = []
    bare: list[Tensor] = []

    def record(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        refuse_unknown(kwargs)
        if v.shape != k.shape or q.shape[-1] != k.shape[-1]:
            raise Refused(
                f"{_family(config)} has keys of {k.shape[-1]} and values of {v.shape[-1]} "
                "dimensions (multi-head latent attention?), which a cache can't hold yet"
            )
        if getattr(module, "layer_idx", None) != len(plain):
            raise Refused(
                f"{_family(config)} calls attention for layer {getattr(module, 'layer_idx', None)}"
                f" where layer {len(plain)} is due, so its layers can't be told apart"
            )
        # By the definition: the fastest kernel may be one that compiles for seconds, or not at all.
        out = attention(q, k, v, scale=kwargs.get("scaling"), impl="reference")
        plain.append(_Seen(q, k, out, kwargs.get("sliding_window"), bool(kwargs.get("softcap"))))
        return out

    def measure(
        module: nn.Module, forward: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        result = forward(*args, **kwargs)
        if not (isinstance(result, tuple) and len(result) == 2 and not result[0].is_complex()):
            raise Refused(f"{_family(config)} rotates by complex numbers, which can't be taken out")
        given[interface.embeddings.index(module), layer_type(args, kwargs)] = result[0][0]
        return result

    def replay(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        bare.append(k)
        return plain[len(bare) - 1].out

    limit = getattr(config, "max_position_embeddings", None) or PLACES[-1] + 1
    places = torch.tensor([min(p, limit - 1) for p in PLACES], device=device_of(model))
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = (places * 7 + 1) % vocabulary
    feed = {"input_ids": ids[None], "position_ids": places[None], "use_cache": False}
    with interface.diverted(record, measure):
        _run(model, feed)
    if not plain:
        raise Refused(
            f"{_family(config)} doesn't compute attention through transformers' interface"
        )
    if len(plain) != config.num_hidden_layers:
        raise Refused(
            f"{_family(config)} has {config.num_hidden_layers} layers, {len(plain)} of which call "
            "attention; models that mix attention with other layers can't be cached yet"
        )
    bare_angles = {key: Angles(cos.shape[-1]) for key, cos in given.items()}
    with interface.diverted(replay, Unrotated(bare_angles, interface)):
        _run(model, feed)
    ropes: dict[Rope, Rope] = {}
    frequencies = [getattr(each, "inv_freq", None) for each in interface.embeddings]
    cast = next(
        (x.dtype for x in frequencies if isinstance(x, Tensor) and x.dtype.itemsize < 4), None
    )
    layers = tuple(
        _explain(i, seen, key, places, config, ropes, cast)
        for i, (seen, key) in enumerate(zip(plain, bare, strict=True))
    )
    return Anatomy(layers, {key: _angles(cos, places, ropes) for key, cos in given.items()})


def _run(model: nn.Module, feed: dict[str, Any]) -> None:
    try:
        with full_precision(model):
            model(**feed)
    except Refused:
        raise
    except Exception as error:  # what breaks here would break, or be wrong, with a cache
        raise Refused(
            f"{_family(text_config(model))} can't run with its attention diverted "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


class Unrotated:
    """Stands for rotary embeddings: cosines of one, sines of zero, so keys come out as they are."""

    def __init__(self, angles: dict[tuple[int, str | None], Angles], interface: Interface) -> None:
        self.angles = {(id(interface.embeddings[i]), kind): a for (i, kind), a in angles.items()}

    def __call__(
        self, module: nn.Module, forward: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        x, places = _inputs(args, kwargs)
        shape = (*places.shape, self.angles[id(module), layer_type(args, kwargs)].width)
        return x.new_ones(1).expand(shape), x.new_zeros(1).expand(shape)


class Rotated(Unrotated):
    """Stands for rotary embeddings: the model's own rotation, by angles from float64.

    All rows are at the same places, which count from `start`.
    """

    start = 0

    def __call__(
        self, module: nn.Module, forward: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        x, places = _inputs(args, kwargs)
        angles = self.angles[id(module), layer_type(args, kwargs)]
        assert angles.rope is not None
        positions = torch.arange(self.start, self.start + places.shape[-1], device=x.device)
        cos, sin = angles.rope.cos_sin(positions, 1, x.dtype)
        return angles.lay(cos)[None], angles.lay(sin)[None]


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`x` and `position_ids` of a rotary embedding's forward."""
    x = args[0] if args else kwargs["x"]
    return x, args[1] if len(args) > 1 else kwargs["position_ids"]


def layer_type(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The layer type that a rotary embedding with one set of angles per type was called for."""
    return kwargs.get("layer_type") or (args[2] if len(args) > 2 else None)


def refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Refuses what an attention call may bring that a cache can't honour."""
    for name in ("position_bias", "head_mask", "indices"):
        if kwargs.get(name) is not None:
            raise Refused(f"the model's attention uses {name}, which a cache can't honour")
    if kwargs.get("is_causal") is False:
        raise Refused("the model's attention isn't causal, and a cache has no use there")
    if kwargs.get("dropout"):
        raise Refused("the model's attention drops out at random: call model.eval()")


def text_config(model: nn.Module) -> Any:
    """The config of the model's text decoder."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]


def device_of(model: nn.Module) -> torch.device:
    return model.get_input_embeddings().weight.device  # type: ignore[operator]


def _family(config: Any) -> str:
    return f"model type {config.model_type!r}"


def _explain(
    index: int,
    seen: _Seen,
    bare: Tensor,
    places: Tensor,
    config: Any,
    ropes: dict[Rope, Rope],
    cast: torch.dtype | None,
) -> Layer:
    """The layer whose rotation turns the bare keys into those that the model made.

    `cast` is what the rotary frequencies were rounded to, if they were.
    """
    # Angles of transformers are fp32 (off by position * 2^-23), the keys in the model's dtype.
    allowed = max(float(places[-1]) * 2.0**-21, 8 * torch.finfo(seen.key.dtype).eps)
    allowed *= float(seen.key.float().abs().amax())
    errors: list[str] = []
    found: list[tuple[float, float, Rope | None]] = []
    for rope in _candidates(index, config, errors):
        rotated = bare.float()
        if rope is not None:
            rope = ropes.setdefault(rope, rope)  # equal layers share one, and what it computes
            cos, sin = rope.cos_sin(places, int(places[-1]) + 1)
            rotated = rotate(rotated, cos, sin, rope.interleaved)
        off = (rotated - seen.key.float()).abs()
        found.append((float(off.mean()), float(off.amax()), rope))
    # The nearest, not the first within what is allowed: keys with one outlying channel allow much.
    _, worst, rope = min(found, key=lambda each: each[0])
    if worst <= allowed:
        heads, kv_heads, head_dim = seen.query.shape[1], seen.key.shape[1], seen.key.shape[3]
        return Layer(LayerSpec(heads, kv_heads, head_dim, rope, seen.softcap), seen.sliding_window)
    why = errors[0] if errors else "its keys aren't turned by any known rotary embedding"
    if cast is not None:
        why += (
            f" (its rotary frequencies were cast to {str(cast).removeprefix('torch.')}: load it "
            "with dtype=..., which leaves them in float32)"
        )
    raise Refused(f"layer {index} of {_family(config)} can't be cached exactly: {why}")


def _candidates(index: int, config: Any, errors: list[str]) -> Iterator[Rope | None]:
    yield None
    types = getattr(config, "layer_types", None)
    for interleaved in (False, True):
        try:
            kind = types[index] if types else None
            yield Rope.from_config(config, kind, interleaved)
        except ValueError as error:
            errors.append(str(error))


def _angles(cos: Tensor, places: Tensor, ropes: dict[Rope, Rope]) -> Angles:
    """The rope and the layout that give a rotary embedding's cosines at the probe's places."""
    width = cos.shape[-1]
    for rope in ropes:
        ours, _ = rope.cos_sin(places, int(places[-1]) + 1)
        for layout in ("once", "halves", "pairs"):
            angles = Angles(width, rope, layout)
            laid = angles.lay(ours)
            if laid.shape == cos.shape and float((laid - cos.float()).abs().max()) < 1e-3:
                return angles
    return Angles(width)
