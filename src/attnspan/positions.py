"""Rotary position embeddings (RoPE) and their interpolations.

RoPE (Su et al. 2021, https://arxiv.org/abs/2104.09864) turns pair number ``i`` of the dimensions of
a query or key at position ``p`` by the angle ``p * f[i]``, ``f[i] = theta ** (-2 i / rotary_dim)``.
An `Interpolation` changes ``f`` so that a model reads further than it was trained; some also
multiply cos and sin, and so the attention logits, by a constant.

Frequencies and angles are float64 and are rounded once, at the end. In float32, as models compute
them, the angle at position ``p`` is off by up to ``p * 2**-23``: 0.1 at one million.

>>> rope = Rope(rotary_dim=4, theta=100.0)
>>> rope.inverse_frequencies().tolist()
[1.0, 0.1]
>>> cos, sin = rope.cos_sin(torch.tensor([10]))
>>> turned = rotate(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), cos, sin)
>>> turned.equal(torch.cat((cos, sin), -1))
True
"""

import copy
import math
import operator
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


class Interpolation(ABC):
    """How the inverse frequencies of a `Rope` differ from the plain ones."""

    @abstractmethod
    def regime(self, length: int) -> int:
        """0, or another length: one that has the same frequencies as `length`."""

    @abstractmethod
    def frequencies(self, theta: float, rotary_dim: int, length: int) -> tuple[Tensor, float]:
        """What a sequence of `length` tokens has: the inverse frequencies in radians per position,
        ``(rotary_dim / 2,)``, float64 on the CPU, and the factor on cos and sin."""


@dataclass(frozen=True)
class Linear(Interpolation):
    """Positions divided by `factor` (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        _require_number("factor", self.factor, 1)

    def regime(self, length: int) -> int:
        return 0

    def frequencies(self, theta: float, rotary_dim: int, length: int) -> tuple[Tensor, float]:
        return _powers(theta, rotary_dim) / self.factor, 1.0


@dataclass(frozen=True)
class NTK(Interpolation):
    """NTK-aware scaling: ``theta * factor ** (d / (d - 2))`` (bloc97 2023; see `Yarn`'s paper).

    The slowest pair turns `factor` times slower and the fastest as before. Transformers has no rope
    type for it; HunYuan's "dynamic" with a fixed ``alpha`` is ``NTK(alpha)``.
    """

    factor: float

    def __post_init__(self) -> None:
        _require_number("factor", self.factor, 1)

    def regime(self, length: int) -> int:
        return 0

    def frequencies(self, theta: float, rotary_dim: int, length: int) -> tuple[Tensor, float]:
        return _powers(ntk_theta(theta, self.factor, rotary_dim), rotary_dim), 1.0


@dataclass(frozen=True)
class DynamicNTK(Interpolation):
    """NTK-aware scaling that grows with the sequence (emozilla 2023; transformers' "dynamic").

    Up to `original_length` tokens the frequencies are plain; past it `NTK`'s factor is
    ``factor * length / original_length - (factor - 1)``, so every length has its own.
    """

    factor: float
    original_length: int

    def __post_init__(self) -> None:
        _require_number("factor", self.factor, 1)
        _require_integer("original_length", self.original_length, 1)

    def regime(self, length: int) -> int:
        return length if length > self.original_length else 0

    def frequencies(self, theta: float, rotary_dim: int, length: int) -> tuple[Tensor, float]:
        held = max(length, self.original_length)
        stretch = self.factor * held / self.original_length - (self.factor - 1)
        return _powers(ntk_theta(theta, stretch, rotary_dim), rotary_dim), 1.0


@dataclass(frozen=True)
class Yarn(Interpolation):
    """YaRN, "NTK by parts" (Peng et al. 2023, https://arxiv.org/abs/2309.00071).

    Pairs that turn more than `beta_fast` times in `original_length` tokens stay plain, those that
    turn fewer than `beta_slow` times are divided by `factor`, those between are blended by index.
    `truncate` rounds the two ends of the blend outwards to whole indices, as the paper's code does;
    gpt-oss doesn't. cos and sin are multiplied by `attention_factor`, or if that is None by
    ``0.1 ln(factor) + 1``, or if `mscale` and `mscale_all_dim` are given by DeepSeek's ratio
    ``(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)``.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _require_number("factor", self.factor, 1)
        _require_integer("original_length", self.original_length, 1)
        _require_number("beta_slow", self.beta_slow, 0, exclusive=True)
        _require_number("beta_fast", self.beta_fast, self.beta_slow)
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            if getattr(self, name) is not None:
                _require_number(name, getattr(self, name), 0)

    def regime(self, length: int) -> int:
        return 0

    def frequencies(self, theta: float, rotary_dim: int, length: int) -> tuple[Tensor, float]:
        def index_turning(times: float) -> float:
            turns = self.original_length / (times * 2 * math.pi)
            return rotary_dim * math.log(turns) / (2 * math.log(theta))

        low, high = index_turning(self.beta_fast), index_turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        if low == high:
            high += 0.001  # transformers' way round the division by zero
        index = torch.arange(rotary_dim // 2, dtype=torch.float64, device="cpu")
        blend = ((index - low) / (high - low)).clamp(0, 1)
        plain = _powers(theta, rotary_dim)
        return plain / self.factor * blend + plain * (1 - blend), self._attention_factor()

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        log = 0.1 * math.log(self.factor)
        if self.mscale and self.mscale_all_dim:
            return (self.mscale * log + 1) / (self.mscale_all_dim * log + 1)
        return log + 1


@dataclass(frozen=True)
class Llama3(Interpolation):
    """Llama 3.1's scaling by wavelength (Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783).

    Pairs that turn more than `high_freq_factor` times in `original_length` tokens stay plain, those
    that turn fewer than `low_freq_factor` times are divided by `factor`, those between are blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self) -> None:
        _require_number("factor", self.factor, 1)
        _require_number("low_freq_factor", self.low_freq_factor, 0, exclusive=True)
        _require_number(
            "high_freq_factor", self.high_freq_factor, self.low_freq_factor, exclusive=True
        )
        _require_integer("original_length", self.original_length, 1)

    def regime(self, length: int) -> int:
        return 0

    def frequencies(self, theta: float, rotary_dim: int, length: int) -> tuple[Tensor, float]:
        plain = _powers(theta, rotary_dim)
        turns = plain * (self.original_length / (2 * math.pi))
        span = self.high_freq_factor - self.low_freq_factor
        smooth = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return (1 - smooth) * plain / self.factor + smooth * plain, 1.0


@dataclass(frozen=True)
class LongRoPE(Interpolation):
    """LongRoPE (Ding et al. 2024, https://arxiv.org/abs/2402.13753): a searched divisor per pair.

    `short` divides the frequencies of sequences up to `original_length` tokens, `long` those of
    longer ones; each has ``rotary_dim / 2`` numbers. cos and sin are multiplied, on both sides of
    `original_length`, by `attention_factor`, or if that is None by
    ``sqrt(1 + ln(factor) / ln(original_length))``, and by 1 for a `factor` of at most 1.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    factor: float
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("short", "long"):
            divisors = tuple(getattr(self, name))
            for divisor in divisors:
                _require_number(name, divisor, 0, exclusive=True)
            object.__setattr__(self, name, divisors)  # a list from a config, made hashable
        _require_integer("original_length", self.original_length, 2)
        _require_number("factor", self.factor, 0, exclusive=True)
        if self.attention_factor is not None:
            _require_number("attention_factor", self.attention_factor, 0)

    def regime(self, length: int) -> int:
        return self.original_length + 1 if length > self.original_length else 0

    def frequencies(self, theta: float, rotary_dim: int, length: int) -> tuple[Tensor, float]:
        name = "long" if length > self.original_length else "short"
        divisors = getattr(self, name)
        if len(divisors) != rotary_dim // 2:
            raise ValueError(
                f"LongRoPE's {name} has {len(divisors)} numbers, but rotary_dim={rotary_dim} needs "
                f"{rotary_dim // 2}"
            )
        scaled = _powers(theta, rotary_dim) / torch.tensor(
            divisors, dtype=torch.float64, device="cpu"
        )
        if self.attention_factor is not None:
            return scaled, float(self.attention_factor)
        growth = math.log(max(self.factor, 1)) / math.log(self.original_length)
        return scaled, math.sqrt(1 + growth)


@dataclass(frozen=True)
class Rope:
    """The rotary positions of one kind of layer.

    Args:
        rotary_dim: how many dimensions are rotated, even: the first ones of head_dim.
        theta: the base of the frequencies, above 1.
        interpolation: None for plain RoPE.
        interleaved: False pairs dimensions ``(i, i + rotary_dim / 2)`` as llama and gpt_neox do,
            True pairs ``(2 i, 2 i + 1)`` as cohere2 and gpt-j do. Hand it on to `rotate`.

    Everywhere `length` is the number of tokens of the sequence, the one that a fresh forward would
    see: frequencies are a function of it alone, never of earlier calls. It counts only where
    `depends_on_length`.

    Raises:
        TypeError, ValueError: for a field out of range, or an interpolation that doesn't fit
            `rotary_dim`.
    """

    rotary_dim: int
    theta: float
    interpolation: Interpolation | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        _require_integer("rotary_dim", self.rotary_dim, 2)
        if self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even, got {self.rotary_dim}")
        _require_number("theta", self.theta, 1, exclusive=True)
        if not isinstance(self.interpolation, Interpolation | None):
            raise TypeError(
                f"interpolation must be an Interpolation or None, got {self.interpolation!r}"
            )
        for length in (1, sys.maxsize):  # an interpolation that doesn't fit is refused here
            self.attention_factor(length)

    @classmethod
    def from_config(
        cls, config: Any, layer_type: str | None = None, interleaved: bool = False
    ) -> "Rope":
        """The positions of a transformers text config, equal to the model's own.

        Args:
            config: a text config with ``rope_parameters``. It isn't changed.
            layer_type: which layers, such as ``"full_attention"``; needed where ``rope_parameters``
                holds one dict per layer type, as gemma3's.
            interleaved: how the model pairs dimensions, which no config says.

        Nor does a config say which layers rotate at all (cohere2's full layers and every fourth of
        smollm3 don't), or whether a "default" rope honours ``partial_rotary_factor``: it is
        honoured here, but a family without partial rotation, such as llama, ignores it.

        Raises:
            ValueError: no rope_parameters, an unknown `layer_type`, or a rope type or parameter
                that isn't done exactly: "proportional", "axial", multimodal sections, PhiMoE's
                mscales, HunYuan's alpha, an odd rotary dimension, sizes that differ by layer.
        """
        if not getattr(config, "rope_parameters", None):
            raise ValueError(
                f"config of type {type(config).__name__} has no rope_parameters, so its model "
                "doesn't use rotary positions in the way that transformers standardises"
            )
        if getattr(config, "is_heterogeneous", False):
            raise ValueError(
                f"config of type {type(config).__name__} differs by layer (is_heterogeneous), and "
                "one Rope can't be exact for it"
            )
        config = copy.deepcopy(config)
        config.standardize_rope_params()  # as transformers does itself before it reads the dict
        parameters = _layer_parameters(config, layer_type)
        for key, reason in _INEXACT_PARAMETERS.items():
            if parameters.get(key):
                raise ValueError(f"rope parameter {key}={parameters[key]!r} is refused: {reason}")
        if parameters.get("rope_theta") is None:
            raise ValueError("rope_parameters has no rope_theta")
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        interpolation = _interpolation(config, parameters)
        return cls(rotary_dim, float(parameters["rope_theta"]), interpolation, interleaved)

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies change with the length of the sequence (dynamic NTK, LongRoPE)."""
        return self.regime(sys.maxsize) != 0

    def regime(self, length: int) -> int:
        """Two lengths with equal regime have the same frequencies and attention factor.

        Dynamic NTK: 0 up to its original length, then every length its own. LongRoPE: two regimes.
        Otherwise always 0.

        Raises:
            ValueError: `length` is below 1.
        """
        length = operator.index(length)
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        return 0 if self.interpolation is None else self.interpolation.regime(length)

    def inverse_frequencies(self, length: int = 1) -> Tensor:
        """Radians per position of each pair: ``(rotary_dim / 2,)``, float64, on the CPU, a copy."""
        return _frequencies(self, self.regime(length), torch.device("cpu"))[0].clone()

    def frequencies_on(self, device: torch.device, length: int = 1) -> Tensor:
        """The very tensor that angles there are made from, float64 ``(rotary_dim / 2,)``.

        A CUDA graph that was captured with it reads it for as long as it is replayed.
        """
        return _frequencies(self, self.regime(length), device)[0]

    def attention_factor(self, length: int = 1) -> float:
        """What cos and sin are multiplied with; 1.0 but for YaRN and LongRoPE."""
        return _frequencies(self, self.regime(length), torch.device("cpu"))[1]

    def cos_sin(
        self, positions: Tensor, length: int = 1, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles at `positions`, times the attention factor.

        Args:
            positions: any shape, an integer dtype; negative ones turn backwards.
            length: tokens of the sequence, see `Rope`. It need not be ``positions.max() + 1``.
            dtype: of the result; angles are float64 and rounded to it last, so that float32 results
                are within 1e-7 of the true values up to position 10 million.

        Returns:
            Two tensors of shape ``positions.shape + (rotary_dim / 2,)`` on the positions' device.

        Raises:
            TypeError: positions that aren't integers, or a dtype that isn't floating point.
        """
        if positions.dtype not in _INTEGERS:
            raise TypeError(f"positions must be integers, got {positions.dtype}")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating point type, got {dtype}")
        frequencies, factor = _frequencies(self, self.regime(length), positions.device)
        angles = positions.unsqueeze(-1) * frequencies
        cos, sin = angles.cos(), angles.sin_()
        if factor != 1.0:
            cos, sin = cos.mul_(factor), sin.mul_(factor)
        return cos.to(dtype), sin.to(dtype)

    def spread(
        self,
        positions: Tensor,
        length: int = 1,
        dtype: torch.dtype = torch.float32,
        scaled: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """cos and sin as `turn` takes them: for halves, as wide as what is rotated.

        Spread out once, they turn each of a model's layers in three calls instead of six, which is
        what decoding one token on a CPU spends its time on. `scaled=False` leaves the attention
        factor out, for what was multiplied with it before.
        """
        wide = dtype if scaled else torch.float64
        cos, sin = self.cos_sin(positions, length, wide)
        if not scaled:
            factor = self.attention_factor(length)
            cos, sin = (cos / factor).to(dtype), (sin / factor).to(dtype)
        if self.interleaved:
            return cos, sin
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`rotate` with what `spread` gave; same arguments, result and errors.

        >>> rope, x = Rope(4, 100.0), torch.arange(12.0).view(3, 4)
        >>> places = torch.tensor([0, 5, 9])
        >>> expected = rotate(x, *rope.cos_sin(places))
        >>> bool((rope.turn(x, *rope.spread(places)) - expected).abs().max() < 1e-6)
        True
        """
        if self.interleaved:
            return rotate(x, cos, sin, interleaved=True)
        half = self.rotary_dim // 2
        if x.shape[-1] != self.rotary_dim:
            return rotate(x, cos[..., :half], sin[..., half:])
        wide = x if x.element_size() >= 4 else x.float()
        out = torch.addcmul(wide * cos, wide.roll(half, -1), sin)
        return out if out.dtype == x.dtype else out.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first ``2 * cos.shape[-1]`` dimensions of `x`; the others pass through.

    Args:
        x: ``(..., n, head_dim)``, floating point.
        cos, sin: from `Rope.cos_sin`, broadcastable to ``(..., n, rotary_dim / 2)``.
        interleaved: as in `Rope`.

    Returns:
        A new tensor of the shape and dtype of `x`, differentiable; computed in float32 at least.

    Raises:
        TypeError: `x` isn't floating point.
        ValueError: `x` has fewer dimensions than are to be rotated.

    >>> quarter = torch.tensor([[0.0]]), torch.tensor([[1.0]])
    >>> rotate(torch.tensor([[1.0, 2.0, 7.0]]), *quarter).tolist()
    [[-2.0, 1.0, 7.0]]
    """
    half, head_dim = cos.shape[-1], x.shape[-1]
    if head_dim < 2 * half:
        raise ValueError(f"x has {head_dim} dimensions, but cos and sin rotate {2 * half}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    dtype = x.dtype
    if x.element_size() < 4:
        x = x.float()
    if cos.element_size() < 4:
        cos, sin = cos.float(), sin.float()
    rest = ()
    if head_dim > 2 * half:
        x, *rest = x.split((2 * half, head_dim - 2 * half), -1)
    if interleaved:
        # one complex product: 8 us for one token where strided halves take 17, far less for many
        pairs = x.unflatten(-1, (half, 2)).contiguous()
        turned = torch.view_as_complex(pairs) * torch.complex(cos, sin)
        out = torch.view_as_real(turned).flatten(-2)
        out = torch.cat((out, *rest), -1) if rest else out
    else:
        a, b = x.chunk(2, -1)
        first = (a * cos).addcmul_(b, sin, value=-1)
        second = (b * cos).addcmul_(a, sin)
        out = torch.cat((first, second, *rest), -1)
    return out if out.dtype == dtype else out.to(dtype)


def ntk_theta(theta: float, factor: float, rotary_dim: int) -> float:
    """The base of `NTK`'s frequencies: plain RoPE with it is NTK-aware scaling by `factor`.

    >>> round(ntk_theta(10_000.0, 2.0, 128))
    20221

    Raises:
        ValueError: `rotary_dim` is 2, where no base does it.
    """
    if rotary_dim == 2:
        raise ValueError("NTK scaling needs a rotary_dim of at least 4, got 2")
    return theta * factor ** (rotary_dim / (rotary_dim - 2))


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_INEXACT_PARAMETERS = {
    "mrope_section": "multimodal positions have three axes, and a Rope has one",
    "short_mscale": "PhiMoE's factors on cos and sin aren't implemented",
    "long_mscale": "PhiMoE's factors on cos and sin aren't implemented",
    "alpha": "only HunYuan's models read it; Rope(..., NTK(alpha)) says the same",
}


@lru_cache(maxsize=256)
def _frequencies(rope: Rope, regime: int, device: torch.device) -> tuple[Tensor, float]:
    """`Interpolation.frequencies`, kept per device so that a decoding step copies nothing."""
    if rope.interpolation is None:
        return _powers(rope.theta, rope.rotary_dim).to(device), 1.0
    length = max(regime, 1)
    frequencies, factor = rope.interpolation.frequencies(rope.theta, rope.rotary_dim, length)
    return frequencies.to(device), factor


def _powers(theta: float, rotary_dim: int) -> Tensor:
    return theta ** -(
        torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim
    )


def _layer_parameters(config: Any, layer_type: str | None) -> dict[str, Any]:
    parameters = config.rope_parameters
    by_layer_type = any(isinstance(value, dict) for value in parameters.values())
    layer_types = sorted(
        parameters if by_layer_type else getattr(config, "layer_types", None) or ()
    )
    if layer_type is None and by_layer_type:
        raise ValueError(f"layer_type must be one of {layer_types}, each has its own positions")
    if layer_type is not None and layer_types and layer_type not in layer_types:
        raise ValueError(
            f"layer_type must be one of {sorted(set(layer_types))}, got {layer_type!r}"
        )
    if not by_layer_type:
        return parameters
    if parameters[layer_type] is None:
        raise ValueError(f"layers of type {layer_type!r} have no rotary positions in this config")
    # transformers 5.23 looks `truncate` up beside the layer types, where configs don't have it
    return {**parameters[layer_type], "truncate": parameters.get("truncate", True)}


def _interpolation(config: Any, parameters: dict[str, Any]) -> Interpolation | None:
    original: Any = parameters.get("original_max_position_embeddings")
    match parameters["rope_type"]:
        case "default":
            return None
        case "linear":
            return Linear(parameters["factor"])
        case "dynamic":
            return DynamicNTK(parameters["factor"], config.max_position_embeddings)
        case "yarn":
            return Yarn(
                factor=parameters["factor"] or config.max_position_embeddings / original,
                original_length=original,
                beta_fast=parameters.get("beta_fast") or 32,
                beta_slow=parameters.get("beta_slow") or 1,
                truncate=parameters.get("truncate", True),
                mscale=parameters.get("mscale"),
                mscale_all_dim=parameters.get("mscale_all_dim"),
                attention_factor=parameters.get("attention_factor"),
            )
        case "llama3":
            return Llama3(
                parameters["factor"],
                parameters["low_freq_factor"],
                parameters["high_freq_factor"],
                original,
            )
        case "longrope":
            return LongRoPE(
                short=parameters["short_factor"],
                long=parameters["long_factor"],
                original_length=original,
                factor=parameters.get("factor") or config.max_position_embeddings / original,
                attention_factor=parameters.get("attention_factor"),
            )
        case other:
            raise ValueError(
                f"rope type {other!r} isn't done exactly; the rope types are default, linear, "
                "dynamic, yarn, llama3 and longrope"
            )


def _require_integer(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    _require_number(name, value, minimum)


def _require_number(
    name: str, value: float | None, minimum: float, exclusive: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < minimum or (exclusive and value == minimum):
        bound = f"above {minimum}" if exclusive else f"at least {minimum}"
        raise ValueError(f"{name} must be {bound} and finite, got {value}")
