"""The attention that each key received, exact, on a GPU: what heavy-hitter policies rank keys by.

`received[b, h, j]` sums `exp(score - lse)` over all queries that see key j and all query heads of
KV head h: the column sums of the softmax (H2O, https://arxiv.org/abs/2306.14048), which a fused
forward never has. From its log-sum-exp they cost one more product of Q and K, half of a forward's
operations, and no memory beside the result. A tile of keys stays on the chip while the queries that
see it stream by, and every thread keeps sums of its own until the end. So results repeat to the
bit. The kernel here is in Triton, for any GPU and all that can be asked; `hopper_received` has one
for Hopper alone.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnspan.kernels import hopper_received

if TYPE_CHECKING:
    from attnspan.kernels.gpu_lists import Lists

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOG2E = 1.4426950408889634


def lacks(q: Tensor, k: Tensor) -> str | None:
    """What this implementation lacks for these inputs, as the end of a sentence; None: nothing."""
    if find_spec("triton") is None:
        return "it needs triton, which isn't installed"
    if q.device.type != "cuda":
        return f"it has no kernel for {q.device.type} tensors"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    if q.dtype not in _DTYPES:
        return f"it has no {str(q.dtype).removeprefix('torch.')} kernel"
    if q.shape[3] > 256:
        return f"it has heads of at most 256 channels, not {q.shape[3]}"
    return None


def received(
    q: Tensor, k: Tensor, lse: Tensor, lists: Lists, scale: float, softcap: float | None = None
) -> Tensor:
    """The attention that each key received: `(batch, Hkv, m)` float32.

    Args:
        q: `(batch, Hq, n, head_dim)`, any strides; bfloat16, float16 or float32.
        k: `(batch, Hkv, m, head_dim)`; `Hq % Hkv == 0`.
        lse: `(batch, Hq, n)` float32, of the whole attention: over all passes of a pattern, and
            with the sink logits if there are any.
        lists: which keys each query sees, for n queries and m keys.
        scale: factor of the scores.
        softcap: scores become `softcap * tanh(score / softcap)`, after the scale.
    """
    batch, kv_heads, m = k.shape[:3]
    out = lse.new_empty((batch, kv_heads, m))
    if not lse.numel() or not m:
        return out.zero_()
    if softcap is None and hopper_received.lacks(q, k) is None:
        return hopper_received.received(q, k, lse, lists, scale)
    from attnspan.kernels import triton_code

    code: Any = triton_code  # whose launch options no type checker knows

    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    heads, n, head_dim = q.shape[1:]
    padded = max(16, 1 << (head_dim - 1).bit_length())
    wide = q.dtype == torch.float32
    if wide:
        tile_q, tile_k, warps, stages = 32, 32, 4, 1
    else:
        tile_q, tile_k, warps, stages = (64, 128, 4, 3) if padded <= 128 else (64, 64, 4, 2)
    inner, outer = (1.0, scale * _LOG2E) if softcap is None else (scale / softcap, softcap * _LOG2E)
    groups = heads // kv_heads
    # As many of a group's heads in a tile as a power of two allows.
    pack = min(8, groups & -groups)
    ptr, items = lists.columns(tile_k, tile_q // pack)
    tiles = -(-m // tile_k)
    strides = [0 if x.shape[d] == 1 else x.stride(d) for x in (q, k) for d in range(3)]
    with torch.cuda.device_of(q):
        code.received[(tiles * batch * kv_heads,)](
            q, k, lse.contiguous(), out, lists.low, lists.high, ptr, items, *strides,
            n, m, kv_heads, groups, tiles, inner, outer,
            D=head_dim, BD=padded, TQ=tile_q, TK=tile_k, PACK=pack, RANGES=lists.low.shape[0],
            CAP=softcap is not None, PRECISION="ieee" if wide else "tf32",
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
