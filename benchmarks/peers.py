"""What else computes attention on an NVIDIA GPU, each called as its own documentation says.

Every function gives a closure that runs one call; what a peer doesn't have raises `Lacking`.
Tensors are `(batch, heads, sequence, head_dim)`, for prefill views of `(batch, sequence, heads,
head_dim)` memory, as a model's projections leave them: FlashAttention's own layout.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnspan.kernels import flex
from attnspan.patterns import Causal, Pattern, SlidingWindow
from attnspan.patterns.tiles import whole

Run = Callable[[], tuple[Tensor, Tensor | None]]
PREFILL = ("fa4", "cudnn", "flash", "flex")
DECODE = ("cudnn", "cudnn, packed", "flash", "flash, packed", "fa4")


class Lacking(Exception):
    """The peer has no such thing; the message is half a sentence."""


def prefill(name: str, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, lse: bool) -> Run:
    """One forward, differentiable; with `lse` it gives the log-sum-exp as well."""
    if name == "flex":
        return _flex(q, k, v, pattern, lse)
    plain = isinstance(pattern, SlidingWindow) and pattern == SlidingWindow(pattern.window)
    if not (plain or isinstance(pattern, Causal)):
        raise Lacking(f"it has no {pattern}")
    left = pattern.window - 1 if isinstance(pattern, SlidingWindow) else None
    if name == "fa4":
        return _fa4(q, k, v, left, lse)
    if left is None and not lse:
        return _sdpa(name, q, k, v, is_causal=True)
    if name == "cudnn":
        raise Lacking("torch's SDPA gives it no windows and no LSE")
    return _flash(q, k, v, left, lse)


def decode(name: str, q: Tensor, k: Tensor, v: Tensor) -> Run:
    """One query against all keys. "packed": the query heads of a KV head stand as its queries."""
    if name == "fa4":
        return _fa4(q, k, v, None, False, causal=False)
    name, _, packed = name.partition(", ")
    if packed:
        q = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
    return _sdpa(name, q, k, v)


def eager_received(q: Tensor, k: Tensor, pattern: Pattern) -> Callable[[], Tensor]:
    """What keys receive, as a model with `output_attentions` gets it: the weights, then a sum.

    A KV head at a time, since all heads' weights of 8192 tokens would take 4 GiB.
    """
    places = torch.arange(q.shape[2], device=q.device)
    hidden = ~pattern.sees(places[:, None], places)
    group = q.shape[1] // k.shape[1]

    def run() -> Tensor:
        sums = []
        for head in range(k.shape[1]):
            query = q[:, head * group : (head + 1) * group]
            scores = query @ k[:, head, None].mT * q.shape[3] ** -0.5
            weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
            sums.append(weights.sum((1, 2), dtype=torch.float32))
        return torch.stack(sums, 1)

    return run


def _fa4(q: Tensor, k: Tensor, v: Tensor, left: int | None, lse: bool, causal: bool = True) -> Run:
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    window = (None, None) if left is None else (left, 0)

    def run() -> tuple[Tensor, Tensor | None]:
        inputs = (x.transpose(1, 2) for x in (q, k, v))
        given = flash_attn_func(*inputs, causal=causal, window_size=window, return_lse=lse)
        out, rest = (given[0], given[1]) if isinstance(given, tuple) else (given, None)
        return out.transpose(1, 2), rest if lse else None

    return run


def _sdpa(name: str, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Run:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[name]

    def run() -> tuple[Tensor, None]:
        with sdpa_kernel(backend):
            gqa = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=gqa)
        return out, None

    return run


def _flash(q: Tensor, k: Tensor, v: Tensor, left: int | None, lse: bool) -> Run:
    """The flash kernel behind SDPA, called where it takes a window: forward alone."""
    if q.requires_grad:
        raise Lacking("torch's SDPA gives it no windows")
    call = partial(
        torch.ops.aten._flash_attention_forward,
        *(None, None, q.shape[2], k.shape[2], 0.0, True, False),
        window_size_left=left,
        window_size_right=None if left is None else 0,
    )

    def run() -> tuple[Tensor, Tensor | None]:
        options, (q_, k_, v_) = call.keywords, (x.transpose(1, 2) for x in (q, k, v))
        out, rest, *_ = call.func(q_, k_, v_, *call.args, **options)
        return out.transpose(1, 2), rest if lse else None

    return run


def _flex(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, lse: bool) -> Run:
    from torch.nn.attention.flex_attention import AuxRequest

    # The mask is made once, from our tiles: torch's own would evaluate every pair, minutes here.
    mask = _block_mask(pattern, q.shape[2], k.shape[2], q.device)
    wanted = AuxRequest(lse=True) if lse else None

    def run() -> tuple[Tensor, Tensor | None]:
        given = _compiled()(q, k, v, block_mask=mask, enable_gqa=True, return_aux=wanted)
        return (given[0], given[1].lse) if lse else (given, None)

    return run


@lru_cache(maxsize=32)
def _block_mask(pattern: Pattern, n: int, m: int, device: torch.device) -> Any:
    return flex._block_mask(whole(pattern, n, m, m - n, flex.BLOCK), device)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch._functorch import config
    from torch.nn.attention.flex_attention import flex_attention

    # One compilation for each shape and pattern; a backward that is timed keeps its graph.
    torch._dynamo.config.recompile_limit = 64
    config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def versions() -> dict[str, str | None]:
    """Of the peers, the compilers and the driver."""
    found: dict[str, str | None] = {"cuda": torch.version.cuda, "driver": _driver()}
    found["cudnn"] = str(torch.backends.cudnn.version())
    for name in ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "triton", "attnspan"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.splitlines()[0].strip() if said.stdout.strip() else None
