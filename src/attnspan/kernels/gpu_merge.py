"""One more part of an attention taken into the others' result, in place, on a GPU.

What `kernels.merge` computes from tensors of their own in a dozen passes over memory, in one: each
row of the part is read once, each of the result read and written once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ROWS = 32


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Makes `out` and `lse` the attention over their keys and over the part's, which are others.

    Where a side saw no key (a log-sum-exp of minus infinity) its output isn't used.

    Args:
        out: `(batch, heads, n, value_dim)`, any strides but that the last one is 1; overwritten.
        lse: `(batch, heads, n)`, float32, any strides; overwritten.
        part: as `out`, 16-bit or float32 like it or not.
        part_lse: as `lse`.
    """
    from attnspan.kernels import triton_code

    code: Any = triton_code  # whose launch options no type checker knows
    batch, heads, n, width = out.shape
    if not lse.numel():
        return
    assert out.stride(3) == part.stride(3) == 1
    tiles = -(-n // _ROWS)
    with torch.cuda.device_of(out):
        code.merge[(tiles * batch * heads,)](
            out, lse, part, part_lse,
            *(s for x in (out, lse, part, part_lse) for s in x.stride()[:3]),
            n, heads, tiles,
            DV=width, BDV=max(16, 1 << (width - 1).bit_length()), ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
