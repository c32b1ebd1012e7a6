"""What an attention may read of a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Angles:
    """What turns keys: `cos` and `sin`, float32 `(n, rotary_dim / 2)`, and which pairs they turn.

    A head's dimension i goes with i + rotary_dim / 2, or, interleaved, 2 i with 2 i + 1.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


@dataclass(frozen=True)
class Stored:
    """Keys and values as a storage holds them; `attnspan.cache.storage` says what they mean.

    Attributes:
        kind: the storage's name.
        fields: `(batch, num_kv_heads, n, width)` each.
        mean: of int4, what was taken off the keys, float32 `(batch, num_kv_heads, 1, head_dim)`.
        group: of int4, the channels of a key that share a scale.
        angles: what the keys are still to be turned by; None: nothing.
    """

    kind: Literal["dense", "int8", "int4"]
    fields: dict[str, Tensor]
    mean: Tensor | None = None
    group: int = 0
    angles: Angles | None = None


@dataclass(frozen=True)
class Part:
    """Some of the keys that a group of queries sees, in one frame of positions.

    Attributes:
        query: `(batch, num_heads, m, head_dim)`, rotated for these keys.
        key: `(batch, num_kv_heads, n, head_dim)`, rotated.
        value: `(batch, num_kv_heads, n, head_dim)`.
        mask: None where every query sees every key, else additive, 0 or minus infinity, `(m, n)`.
        length: int32 `(batch,)` on the device: of each row, only so many of the first keys are
            there (where no decode kernel serves, as many in every row). None: all of them. Read
            when the attention runs, so a captured graph goes with a cache that fills.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    length: Tensor | None = None


@dataclass(frozen=True)
class RawPart:
    """A part that is read as it is stored; the other attributes are those of `Part`."""

    query: Tensor
    stored: Stored
    mask: Tensor | None = None
    length: Tensor | None = None


@dataclass(frozen=True)
class KVView:
    """The same queries against disjoint parts of the held keys; one softmax runs over them all."""

    parts: tuple[Part | RawPart, ...]
