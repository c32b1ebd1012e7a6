"""How keys and values travel: as they are, or as int8 codes that are made once, at their source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from attnspan.ring.exchange import Piece

Pair = tuple[Tensor, Tensor]
"""A key and a value, or their gradients: `(batch, kv_heads, tokens, width)` each."""


def as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """The numbers of some tensors, one after the other: int8 `(bytes,)`."""
    if len(tensors) == 1:
        return tensors[0].contiguous().view(-1).view(torch.int8)
    return torch.cat([x.reshape(-1).view(torch.int8) for x in tensors])


def taken(
    buffer: Tensor, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]
) -> Iterator[Tensor]:
    """Tensors that lie in `buffer` one after the other."""
    start = 0
    for shape, dtype in shapes:
        size = dtype.itemsize
        for length in shape:
            size *= length
        yield buffer[start : start + size].view(dtype).view(shape)
        start += size


class Wire(ABC):
    """Packs pieces of keys and values for a peer, and reads what comes.

    Attributes:
        key: what it holds of the keys, on their device.
    """

    key: Tensor

    @abstractmethod
    def pack(self, pieces: Sequence[Piece], heads: slice) -> Tensor:
        """Some rows of some heads of this rank's shard: int8 `(bytes,)`."""

    @abstractmethod
    def size(self, pieces: Sequence[Piece], heads: slice) -> int:
        """Bytes of `pack`, for pieces of whichever rank."""

    @abstractmethod
    def unpack(self, buffer: Tensor, pieces: Sequence[Piece], heads: slice) -> list[Pair]:
        """The keys and values of each piece, in the model's dtype."""


@final
@dataclass(frozen=True)
class Plain(Wire):
    """Keys and values in a dtype of torch's: the model's, or that of gradients."""

    key: Tensor
    value: Tensor

    def _shapes(
        self, pieces: Sequence[Piece], heads: slice
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        count = heads.stop - heads.start
        return [
            ((x.shape[0], count, piece.tokens, x.shape[3]), x.dtype)
            for piece in pieces
            for x in (self.key, self.value)
        ]

    def pack(self, pieces: Sequence[Piece], heads: slice) -> Tensor:
        both = self.key, self.value
        return as_bytes([x[:, heads, p.start : p.stop] for p in pieces for x in both])

    def size(self, pieces: Sequence[Piece], heads: slice) -> int:
        return sum(
            torch.Size(shape).numel() * dtype.itemsize
            for shape, dtype in self._shapes(pieces, heads)
        )

    def unpack(self, buffer: Tensor, pieces: Sequence[Piece], heads: slice) -> list[Pair]:
        found = list(taken(buffer, self._shapes(pieces, heads)))
        return list(zip(found[::2], found[1::2], strict=True))


@final
class Int8(Wire):
    """Codes of 8 bits: keys with a scale for each channel of the shard, values for each token.

    Channels of keys differ by orders of magnitude in trained models, so a scale for each token
    would lose the small ones (KIVI, https://arxiv.org/abs/2402.02750).
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.dtype, self.batch = key.dtype, key.shape[0]
        self.key_scale, self.key = _codes(key, 2)
        self.value_scale, self.value = _codes(value, 3)

    def pack(self, pieces: Sequence[Piece], heads: slice) -> Tensor:
        tensors = [self.key_scale[:, heads]]
        tensors += [self.value_scale[:, heads, p.start : p.stop] for p in pieces]
        both = self.key, self.value
        tensors += [x[:, heads, p.start : p.stop] for p in pieces for x in both]
        return as_bytes(tensors)

    def _shapes(
        self, pieces: Sequence[Piece], heads: slice
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        front = self.batch, heads.stop - heads.start
        shapes = [((*front, 1, self.key.shape[3]), torch.float32)]
        shapes += [((*front, piece.tokens, 1), torch.float32) for piece in pieces]
        shapes += [
            ((*front, piece.tokens, x.shape[3]), torch.int8)
            for piece in pieces
            for x in (self.key, self.value)
        ]
        return shapes

    def size(self, pieces: Sequence[Piece], heads: slice) -> int:
        return sum(
            torch.Size(shape).numel() * dtype.itemsize
            for shape, dtype in self._shapes(pieces, heads)
        )

    def unpack(self, buffer: Tensor, pieces: Sequence[Piece], heads: slice) -> list[Pair]:
        key_scale, *found = taken(buffer, self._shapes(pieces, heads))
        scales, codes = found[: len(pieces)], found[len(pieces) :]
        return [
            ((key * key_scale).to(self.dtype), (value * scale).to(self.dtype))
            for scale, key, value in zip(scales, codes[::2], codes[1::2], strict=True)
        ]


def _codes(x: Tensor, dim: int) -> Pair:
    """Scales and codes, with one scale along `dim`."""
    wide = x.float()
    scale = wide.abs().amax(dim, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return scale, (wide / scale).round_().to(torch.int8)
