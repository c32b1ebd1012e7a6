"""What an attention may read of a cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Some of the keys that a group of queries sees, in one frame of positions.

    Attributes:
        query: `(batch, num_heads, m, head_dim)`, rotated for these keys.
        key: `(batch, num_kv_heads, n, head_dim)`, rotated.
        value: `(batch, num_kv_heads, n, head_dim)`.
        mask: None where every query sees every key, else additive, 0 or minus infinity, `(m, n)`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class KVView:
    """The same queries against disjoint parts of the held keys; one softmax runs over them all."""

    parts: tuple[Part, ...]
