"""How keys and values travel: as they are, or as int8 codes that are made once, at their source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from attnspan.ring.exchange import Piece

Shape = tuple[tuple[int, ...], torch.dtype]
Pair = tuple[Tensor, Tensor]
"""A key and a value, or their gradients: `(batch, kv_heads, tokens, width)` each."""


def as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """The numbers of some tensors, one after the other: int8 `(bytes,)`."""
    rows = [_row(x) for x in tensors]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _row(x: Tensor) -> Tensor:
    row = x.reshape(-1)
    if row.stride(0) != 1:  # an expanded one, such as the gradient of a sum
        row = row.clone(memory_format=torch.contiguous_format)
    return row.view(torch.int8)


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
    def parts(self, pieces: Sequence[Piece], heads: slice) -> list[Tensor]:
        """What is sent of some rows of some heads of this rank's shard."""

    @abstractmethod
    def shapes(self, pieces: Sequence[Piece], heads: slice) -> list[Shape]:
        """Those of `parts`, for pieces of whichever rank."""

    def size(self, pieces: Sequence[Piece], heads: slice) -> int:
        """Bytes of `parts`."""
        shapes = self.shapes(pieces, heads)
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)

    @abstractmethod
    def unpack(self, buffer: Tensor, pieces: Sequence[Piece], heads: slice) -> list[Pair]:
        """The keys and values of each piece, in the model's dtype."""


@final
@dataclass(frozen=True)
class Plain(Wire):
    """Keys and values in a dtype of torch's: the model's, or that of gradients."""

    key: Tensor
    value: Tensor

    def shapes(self, pieces: Sequence[Piece], heads: slice) -> list[Shape]:
        count = heads.stop - heads.start
        return [
            ((x.shape[0], count, piece.tokens, x.shape[3]), x.dtype)
            for piece in pieces
            for x in (self.key, self.value)
        ]

    def parts(self, pieces: Sequence[Piece], heads: slice) -> list[Tensor]:
        both = self.key, self.value
        return [x[:, heads, p.start : p.stop] for p in pieces for x in both]

    def unpack(self, buffer: Tensor, pieces: Sequence[Piece], heads: slice) -> list[Pair]:
        found = list(taken(buffer, self.shapes(pieces, heads)))
        return list(zip(found[::2], found[1::2], strict=True))


@final
class Int8(Wire):
    """Codes of 8 bits: keys with a scale for each channel of a chunk, values for each token.

    Channels of keys differ by orders of magnitude in trained models, so a scale for each token
    would lose the small ones (KIVI, https://arxiv.org/abs/2402.02750). A chunk's scales tell of
    its own tokens alone, and under a causal pattern whoever sees one of another rank's chunks
    comes after all of it.

    Args:
        key: `(batch, kv_heads, tokens, head_dim)`.
        value: likewise.
        chunks: the rows of the shard that are adjacent tokens.
    """

    def __init__(self, key: Tensor, value: Tensor, chunks: Sequence[Piece]) -> None:
        self.dtype, self.batch = key.dtype, key.shape[0]
        self.stops = [piece.stop for piece in chunks]
        coded = [_codes(key[:, :, piece.start : piece.stop], 2) for piece in chunks]
        self.key_scale = [scale for scale, _ in coded]
        self.key = torch.cat([codes for _, codes in coded], 2)
        self.value_scale, self.value = _codes(value, 3)

    def parts(self, pieces: Sequence[Piece], heads: slice) -> list[Tensor]:
        tensors = []
        for p in pieces:
            chunk = next(i for i, stop in enumerate(self.stops) if p.start < stop)
            tensors += [self.key_scale[chunk][:, heads]]
            tensors += [self.value_scale[:, heads, p.start : p.stop]]
        both = self.key, self.value
        tensors += [x[:, heads, p.start : p.stop] for p in pieces for x in both]
        return [*tensors, self.key.new_zeros(self.shapes(pieces, heads)[-1][0])]

    def shapes(self, pieces: Sequence[Piece], heads: slice) -> list[Shape]:
        front = self.batch, heads.stop - heads.start
        found: list[Shape] = []
        for piece in pieces:
            found += [((*front, 1, self.key.shape[3]), torch.float32)]
            found += [((*front, piece.tokens, 1), torch.float32)]
        widths = self.key.shape[3], self.value.shape[3]
        found += [((*front, p.tokens, w), torch.int8) for p in pieces for w in widths]
        # What lies behind begins with float32 again, which has to stand at a multiple of 4.
        codes = front[0] * front[1] * sum(p.tokens for p in pieces) * sum(widths)
        return [*found, ((-codes % 4,), torch.int8)]

    def unpack(self, buffer: Tensor, pieces: Sequence[Piece], heads: slice) -> list[Pair]:
        *found, _ = taken(buffer, self.shapes(pieces, heads))
        scales, codes = found[: 2 * len(pieces)], found[2 * len(pieces) :]
        return [
            ((key * key_scale).to(self.dtype), (value * value_scale).to(self.dtype))
            for key_scale, value_scale, key, value in zip(
                scales[::2], scales[1::2], codes[::2], codes[1::2], strict=True
            )
        ]


def _codes(x: Tensor, dim: int) -> Pair:
    """Scales and codes, with one scale along `dim`."""
    wide = x.float()
    scale = wide.abs().amax(dim, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return scale, (wide / scale).round_().to(torch.int8)
