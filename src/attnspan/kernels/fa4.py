"""FlashAttention-4, where it is installed: full, causal and windowed attention.

It comes with the extra `fa4` (https://github.com/Dao-AILab/flash-attention); its own autograd
function takes gradients of the output and of the log-sum-exp.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from attnspan.patterns.algebra import Pattern
from attnspan.patterns.conventions import to_flash_attention


def lacks(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, q_offset: int) -> str | None:
    """What this implementation lacks for these inputs, as the end of a sentence; None: nothing."""
    if q.device.type != "cuda" or torch.version.hip is not None:
        return "it runs on an NVIDIA GPU"
    if torch.cuda.get_device_capability(q.device)[0] not in (9, 10):
        return "it runs on NVIDIA Hopper and Blackwell"
    if not _is_installed():
        return "flash-attn-4 isn't installed (pip install 'attnspan[fa4]')"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "it has bfloat16 and float16 alone"
    if any(not 8 <= x.shape[3] <= 128 or x.shape[3] % 8 for x in (q, v)):
        return "it has heads of 8 to 128 channels, a multiple of 8"
    if not q.numel() or not k.numel():
        return "it takes no empty tensors"
    if q_offset != k.shape[2] - q.shape[2] or q_offset < 0:
        return "its queries are the last ones of the keys"
    try:
        to_flash_attention(pattern)
    except ValueError:
        return f"it has no {pattern}"
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
        return "it has no torch.func transforms"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, differentiable; arguments as in `kernels.reference`."""
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    (left, right), causal = to_flash_attention(pattern)
    window = tuple(None if x == -1 else x for x in (left, right))
    out, lse = flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)),
        softmax_scale=scale,
        causal=causal,
        window_size=window,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_lse=True,
    )
    return out.transpose(1, 2), lse


@lru_cache(maxsize=1)
def _is_installed() -> bool:
    try:
        return find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False
