"""One token on its way into a cache: turned, encoded and written to its slot, in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspan.kernels.capability import lacks_hopper


def lacks(q: Tensor, fields: dict[str, Tensor], angles: tuple[Tensor, Tensor]) -> str | None:
    """What this implementation lacks for these inputs, as the end of a sentence; None: nothing."""
    if lack := lacks_hopper(q.device):
        return lack
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it has no {str(q.dtype).removeprefix('torch.')}"
    if q.shape[2] != 1:
        return f"it takes one token, not {q.shape[2]}"
    width = q.shape[3]
    if width < 16 or width & (width - 1):
        return f"its heads have a power of two of channels, 16 at least, not {width}"
    if angles[0].shape != (1, width) or angles[1].shape != (1, width):
        return "it turns whole heads, by halves"
    if set(fields) not in ({"key", "value"}, {"key", "value", "key_scale", "value_scale"}):
        return "it writes dense and int8 storages"
    return None


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fields: dict[str, Tensor],
    slot: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Writes a token to `fields` and returns its queries, turned; see `attnspan.views.append`.

    Codes and scales are those of `attnspan.cache.storage.Int8`, keys rounded to the model's dtype
    once they are turned.
    """
    from attnspan.kernels import gpu_append_code

    batch, heads, _, width = q.shape
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    turned = torch.empty((batch, heads, 1, width), dtype=q.dtype, device=q.device)
    strides = {}
    for name, short in (("key", "ks"), ("value", "vs")):
        for x, prefix in ((fields[name], name), (fields.get(f"{name}_scale"), short)):
            at = (0, 0, 0) if x is None else x.stride()[:3]
            strides |= dict(
                zip((f"{prefix}_batch", f"{prefix}_head", f"{prefix}_row"), at, strict=True)
            )
    kernel: Any = gpu_append_code.append_token
    with torch.cuda.device(q.device):
        kernel[(batch, heads + k.shape[1])](
            q,
            k,
            v,
            cos,
            sin,
            slot,
            turned,
            fields["key"],
            fields["value"],
            fields.get("key_scale"),
            fields.get("value_scale"),
            *(x.stride(i) for x in (q, k, v) for i in (0, 1)),
            **strides,
            HEADS=heads,
            D=width,
            INT8="key_scale" in fields,
            num_warps=1,
            launch_pdl=True,
        )
    return turned
