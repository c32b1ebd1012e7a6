"""How kept keys and values are held: as they come, or as int8 or int4 codes.

A storage is a value with two functions, `encode` and `decode`, over named fields of shape
`(batch, num_kv_heads, tokens, width)`. No field spans tokens, so a policy may keep or drop any
token by moving fields; nothing is ever encoded twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Fields = dict[str, Tensor]

# fp16's smallest subnormal: a scale of zero would turn an all-zero vector into NaN.
_TINY = 2.0**-24


class Storage(ABC):
    """How keys and values are held. Final subclasses are frozen dataclasses."""

    kind: ClassVar[Literal["dense", "int8", "int4"]]

    @property
    def warmup(self) -> int:
        """Tokens after the sinks that are held dense, while the means of the keys are learned."""
        return 0

    @abstractmethod
    def layout(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        """Each field's width and dtype, for one token of one KV head."""

    @abstractmethod
    def encode(self, key: Tensor, value: Tensor, mean: Tensor | None) -> Fields:
        """Fields of keys and values `(batch, num_kv_heads, tokens, head_dim)`."""

    @abstractmethod
    def decode(self, fields: Fields, mean: Tensor | None, dtype: torch.dtype) -> tuple:
        """The keys and values of `fields`, in `dtype`."""

    @abstractmethod
    def __str__(self) -> str: ...

    def check(self, head_dim: int) -> None:  # noqa: B027  most storages take any head_dim
        """Raises ValueError if this storage can't hold heads of `head_dim`."""

    def bytes_per_token(self, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one token's key and value in one KV head."""
        return sum(width * kind.itemsize for width, kind in self.layout(head_dim, dtype).values())


@dataclass(frozen=True)
class Dense(Storage):
    """Keys and values in the model's own dtype."""

    kind = "dense"

    def layout(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        return {"key": (head_dim, dtype), "value": (head_dim, dtype)}

    def encode(self, key: Tensor, value: Tensor, mean: Tensor | None) -> Fields:
        return {"key": key, "value": value}

    def decode(
        self, fields: Fields, mean: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return fields["key"], fields["value"]

    def __str__(self) -> str:
        return "dense"


@dataclass(frozen=True)
class Int8(Storage):
    """Symmetric int8 with one fp16 scale per token and head: 66 bytes for a head of 64."""

    kind = "int8"

    def layout(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        fields = {}
        for name in ("key", "value"):
            fields[name] = (head_dim, torch.int8)
            fields[f"{name}_scale"] = (1, torch.float16)
        return fields

    def encode(self, key: Tensor, value: Tensor, mean: Tensor | None) -> Fields:
        fields = {}
        for name, x in (("key", key), ("value", value)):
            x = x.float()
            # Codes come from the scale as it is stored, so its rounding is no error of its own.
            scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(_TINY).half()
            fields[name] = (x / scale).round_().clamp_(-127, 127).to(torch.int8)
            fields[f"{name}_scale"] = scale
        return fields

    def decode(
        self, fields: Fields, mean: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return (
            fields["key"].to(dtype) * fields["key_scale"].to(dtype),
            fields["value"].to(dtype) * fields["value_scale"].to(dtype),
        )

    def __str__(self) -> str:
        return "int8"


@dataclass(frozen=True)
class Int4(Storage):
    """Int4: 36 bytes for a head of 64.

    Keys have a strong mean per channel, which costs most of the sixteen levels if it stays in. It
    is learned from the 64 tokens after the sinks (dense until then), frozen, and taken off; what is
    left has an fp16 scale per token and group of `group` channels. Values have an fp16 scale and
    an fp16 least value per token and head. The frozen means follow KIVI's finding that keys vary by
    channel and values by token (https://arxiv.org/abs/2402.02750), without its groups over tokens.
    """

    kind = "int4"
    group: int = 32

    @property
    def warmup(self) -> int:
        return 64

    def check(self, head_dim: int) -> None:
        if head_dim % 2 or head_dim % self.group:
            raise ValueError(
                f"storage int4: head_dim is {head_dim}; a multiple of {self.group} is allowed"
            )

    def layout(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        return {
            "key": (head_dim // 2, torch.uint8),
            "key_scale": (head_dim // self.group, torch.float16),
            "value": (head_dim // 2, torch.uint8),
            "value_scale": (1, torch.float16),
            "value_least": (1, torch.float16),
        }

    def encode(self, key: Tensor, value: Tensor, mean: Tensor | None) -> Fields:
        assert mean is not None, "the cache holds keys dense until their means are known"
        x = (key.float() - mean).unflatten(-1, (-1, self.group))
        scale = (x.abs().amax(-1, keepdim=True) / 7).clamp_min(_TINY).half()
        codes = (x / scale).round_().clamp_(-7, 7).add_(8).flatten(-2)
        value = value.float()
        least, most = value.amin(-1, keepdim=True).half(), value.amax(-1, keepdim=True)
        value_scale = ((most - least) / 15).clamp_min(_TINY).half()
        return {
            "key": _pack(codes),
            "key_scale": scale.squeeze(-1),
            "value": _pack(((value - least) / value_scale).round_().clamp_(0, 15)),
            "value_scale": value_scale,
            "value_least": least,
        }

    def decode(
        self, fields: Fields, mean: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        assert mean is not None
        codes = _unpack(fields["key"], dtype).sub_(8).unflatten(-1, (-1, self.group))
        key = codes.mul_(fields["key_scale"].to(dtype).unsqueeze(-1)).flatten(-2)
        value = _unpack(fields["value"], dtype).mul_(fields["value_scale"].to(dtype))
        return key.add_(mean.to(dtype)), value.add_(fields["value_least"].to(dtype))

    def __str__(self) -> str:
        return "int4"


def parse_storage(text: str) -> Storage:
    """The storage that a name stands for: `dense`, `int8` or `int4`.

    >>> parse_storage("int8")
    Int8()
    """
    kinds = {"dense": Dense, "int8": Int8, "int4": Int4}
    if text.strip() not in kinds:
        raise ValueError(f"storage {text!r} is not known; allowed are {', '.join(kinds)}")
    return kinds[text.strip()]()


def _pack(codes: Tensor) -> Tensor:
    """Two codes 0..15 a byte: channel i in the low half, channel i + width/2 in the high half."""
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def _unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=-1).to(dtype)
