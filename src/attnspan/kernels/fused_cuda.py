"""cuDNN's and FlashAttention-2's kernels behind `scaled_dot_product_attention` on CUDA.

They are called for what torch gives them without a mask: full attention, and causal attention of
as many queries as keys. Torch keeps their log-sum-exp to itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn import functional as F

from attnspan.patterns.algebra import Pattern
from attnspan.patterns.library import Causal, Full


def lacks(
    impl: str, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, q_offset: int, wants_lse: bool
) -> str | None:
    """What "cudnn" or "flash" lacks for these inputs, as the end of a sentence; None: nothing."""
    if q.device.type != "cuda":
        return "it runs on a GPU"
    if impl == "cudnn" and torch.version.hip is not None:
        return "it runs on an NVIDIA GPU"
    if wants_lse:
        return "torch gives no log-sum-exp with it, which learned sinks need too"
    if not q.numel() or not k.numel():
        return "it takes no empty tensors"
    is_causal = isinstance(pattern, Causal)
    if not (isinstance(pattern, Full) or (is_causal and q.shape[2] == k.shape[2] and not q_offset)):
        return "torch gives it full attention, and causal of as many queries as keys"
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
        return "it is called without torch.func transforms"
    asks = cuda.can_use_cudnn_attention if impl == "cudnn" else cuda.can_use_flash_attention
    if not asks(cuda.SDPAParams(q, k, v, None, 0.0, is_causal, q.shape[1] != k.shape[1])):
        return "torch refuses it for these tensors, or for deterministic algorithms"
    return None


def forward(impl: str, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """Attention, differentiable; arguments as in `kernels.reference`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = SDPBackend.CUDNN_ATTENTION if impl == "cudnn" else SDPBackend.FLASH_ATTENTION
    is_causal, grouped = isinstance(pattern, Causal), q.shape[1] != k.shape[1]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
