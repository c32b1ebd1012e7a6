"""Attention and its gradients in Triton, for any GPU that Triton serves: the portable kernels.

Forward is FlashAttention's (https://arxiv.org/abs/2307.08691): a tile of queries stays, keys and
values stream by, the softmax's maximum and sum run along. Backward recomputes the weights from the
log-sum-exp, in two kernels: dK and dV for each tile of keys, dQ for each tile of queries. That
costs 7 products where one kernel with atomic additions takes 5, and buys results that repeat to
the bit and no memory beside one float32 per query and head.

Which tiles a kernel visits stands in the pattern's lists; tiles without a mask have a loop of their
own. Lengths and windows are run-time arguments: other ones compile nothing anew.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnspan.kernels.capability import compute_capability, shared_bytes_of
from attnspan.kernels.triton_launch import launch

if TYPE_CHECKING:
    from attnspan.kernels.gpu_lists import Lists

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOG2E = 1.4426950408889634


def lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What this implementation lacks for these inputs, as the end of a sentence; None: nothing."""
    if find_spec("triton") is None:
        return "it needs triton, which isn't installed"
    if q.device.type != "cuda":
        return f"it has no kernel for {q.device.type} tensors"
    if torch.version.hip is None and compute_capability(q.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    if q.dtype not in DTYPES:
        return f"it has no {str(q.dtype).removeprefix('torch.')} kernel"
    widest = max(q.shape[-1], v.shape[-1])
    if widest > 256:
        return f"it has heads of at most 256 channels, not {widest}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, without autograd.

    Args:
        q: `(batch, Hq, n, head_dim)`, any strides; bfloat16, float16 or float32.
        k: `(batch, Hkv, m, head_dim)`; `Hq % Hkv == 0`.
        v: `(batch, Hkv, m, value_dim)`.
        lists: which keys each query sees, for n queries and m keys.
        scale: factor of the scores.
        softcap: scores become `softcap * tanh(score / softcap)`, after the scale.

    Returns:
        `out (batch, Hq, n, value_dim)` in the dtype of `q`, laid out as `q` is, and
        `lse (batch, Hq, n)` float32. A query that sees no key gives zeros and minus infinity.
    """
    batch, heads, n, head_dim = q.shape
    m, value_dim = v.shape[2], v.shape[3]
    out = _like(q, value_dim)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not lse.numel() or not m:
        return out.zero_(), lse.fill_(-torch.inf)
    from attnspan.kernels import triton_code

    code: Any = triton_code  # whose launch options no type checker knows

    q, scale = _rising(q, scale)
    q, k, v = _dense(q), _dense(k), _dense(v)
    tile_q, tile_k, warps, stages = _configuration("forward", q, v)
    ptr, items = lists.rows(tile_q, tile_k)
    tiles = -(-n // tile_q)
    with torch.cuda.device_of(q):
        launch(
            code.forward, (tiles * batch * heads,),
            q, k, v, out, lse, lists.low, lists.high, ptr, items,
            *_strides(q), *_strides(k), *_strides(v), *_strides(out),
            n, m, heads, heads // k.shape[1], tiles, *_factors(scale, softcap),
            D=head_dim, DV=value_dim, BD=padded(head_dim), BDV=padded(value_dim),
            TQ=tile_q, TK=tile_k, RANGES=lists.low.shape[0], CAP=softcap is not None,
            PRECISION=_precision(q), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, laid out as those; equal to the bit from run to run.

    Args:
        grad_out: the gradient that comes in for `out`.
        grad_lse: that for `lse`; None is zeros.
        q: as in `forward`, with k, v, lists, scale and softcap.
        k: see q.
        v: see q.
        out: what `forward` gave, or the part's share in a merged whole: with `lse` the global
            log-sum-exp and `out` the global output, a part's gradients are its share.
        lse: see out.
        lists: see q.
        scale: see q.
        softcap: see q.
    """
    batch, heads, n, head_dim = q.shape
    kv_heads, m, value_dim = k.shape[1], k.shape[2], v.shape[3]
    dq, dk, dv = _like(q, head_dim), _like(k, head_dim), _like(v, value_dim)
    if not lse.numel() or not m:
        return dq.zero_(), dk.zero_(), dv.zero_()
    from attnspan.kernels import triton_code

    code: Any = triton_code  # whose launch options no type checker knows

    sign = -1.0 if scale < 0 else 1.0
    q, scale = _rising(q, scale)
    grad_out, q, k, v, out = (_dense(x) for x in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    widths: dict[str, Any] = {
        "D": head_dim, "DV": value_dim, "BD": padded(head_dim), "BDV": padded(value_dim),
        "RANGES": lists.low.shape[0], "CAP": softcap is not None, "PRECISION": _precision(q),
    }  # fmt: skip
    factors = _factors(scale, softcap)
    with torch.cuda.device_of(q):
        tiles = -(-n // 64)
        launch(
            code.pull, (tiles * batch * heads,),
            grad_out, out, lse if grad_lse is None else grad_lse.float().contiguous(), delta,
            *_strides(grad_out), *_strides(out), n, heads, tiles,
            DV=value_dim, BDV=padded(value_dim), TQ=64, LSE=grad_lse is not None, num_warps=4,
        )  # fmt: skip
        tile_q, tile_k, warps, stages = _configuration("keys", q, v)
        ptr, items = lists.columns(tile_k, tile_q)
        tiles = -(-m // tile_k)
        launch(
            code.backward_keys, (tiles * batch * kv_heads,),
            grad_out, q, k, v, dk, dv, lse, delta, lists.low, lists.high, ptr, items,
            *_strides(grad_out), *_strides(q), *_strides(k), *_strides(v), *_strides(dk),
            *_strides(dv), n, m, kv_heads, heads // kv_heads, tiles, scale, *factors,
            TQ=tile_q, TK=tile_k, num_warps=warps, num_stages=stages, **widths,
        )  # fmt: skip
        tile_q, tile_k, warps, stages = _configuration("queries", q, v)
        ptr, items = lists.rows(tile_q, tile_k)
        tiles = -(-n // tile_q)
        launch(
            code.backward_queries, (tiles * batch * heads,),
            grad_out, q, k, v, dq, lse, delta, lists.low, lists.high, ptr, items,
            *_strides(grad_out), *_strides(q), *_strides(k), *_strides(v), *_strides(dq),
            n, m, heads, heads // kv_heads, tiles, scale * sign, *factors,
            TQ=tile_q, TK=tile_k, num_warps=warps, num_stages=stages, **widths,
        )  # fmt: skip
    return dq, dk, dv


def padded(width: int) -> int:
    """The next power of two, at least 16: what a matrix product takes."""
    return max(16, 1 << (width - 1).bit_length())


# (query tile, key tile, warps, stages) for 16-bit inputs, by the wider of the padded head_dim and
# value_dim: for 160 KiB of shared memory and more (A100, H100), and for less.
_LARGE = {
    "forward": {64: (128, 64, 4, 3), 128: (64, 64, 4, 3), 256: (128, 32, 8, 2)},
    "keys": {64: (64, 128, 8, 2), 128: (64, 64, 4, 2), 256: (64, 64, 8, 1)},
    "queries": {64: (128, 64, 8, 2), 128: (64, 64, 4, 2), 256: (64, 64, 8, 1)},
}
_SMALL = {
    "forward": {64: (128, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 4, 2)},
    "keys": {64: (64, 64, 4, 2), 128: (32, 64, 4, 1), 256: (16, 32, 4, 1)},
    "queries": {64: (64, 64, 4, 2), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1)},
}


def _configuration(kernel: str, q: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    widest = max(64, padded(q.shape[3]), padded(v.shape[3]))
    if q.dtype == torch.float32:
        # Its products run on the plain units, where small tiles keep operands in registers.
        return (32, 32, 4, 1) if widest <= 128 else (16, 16, 4, 1)
    return (_LARGE if _roomy(q.device) else _SMALL)[kernel][widest]


def _roomy(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return shared_bytes_of(device) >= 160 * 1024


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"


def _factors(scale: float, softcap: float | None) -> tuple[float, float]:
    if softcap is None:
        return 1.0, scale * _LOG2E
    return scale / softcap, softcap * _LOG2E


def _rising(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernels take a product's maximum for its score's, which holds for no negative scale."""
    return (-q, -scale) if scale < 0 else (q, scale)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Batch, head and row stride; that of a single one is 0, so that it compiles nothing anew."""
    (batch, heads, n, _), (of_batch, of_head, of_row, _) = x.shape, x.stride()
    return (
        0 if batch == 1 else of_batch,
        0 if heads == 1 else of_head,
        0 if n == 1 else of_row,
    )


def _like(x: Tensor, width: int) -> Tensor:
    """Uninitialised `(*x.shape[:3], width)` whose dimensions lie in memory in the order of x's."""
    if width == x.shape[3]:
        out = torch.empty_like(x)
        if out.stride(3) == 1:
            return out
    order = sorted(range(3), key=lambda d: x.stride(d), reverse=True)
    out = x.new_empty([*(x.shape[d] for d in order), width])
    return out.permute([*(order.index(d) for d in range(3)), 3])
