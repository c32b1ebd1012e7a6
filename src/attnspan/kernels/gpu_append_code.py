"""Device code, in Triton: one token turned, encoded and written to its slot."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice


@triton.jit
def _scale_of(x):
    """int8's scale of a vector, as it is stored; see `attnspan.cache.storage.Int8`."""
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), 127.0), 5.960464477539063e-08)
    return scale.to(tl.float16)


@triton.jit
def _code(x, scale):
    code = libdevice.rint(tl.div_rn(x, tl.zeros_like(x) + scale.to(tl.float32)))
    return tl.minimum(tl.maximum(code, -127.0), 127.0).to(tl.int8)


@triton.jit
def append_token(
    q, k, v, cos, sin, slot, turned, key, value, key_scale, value_scale,
    q_batch, q_head, k_batch, k_head, v_batch, v_head,
    key_batch, key_head, key_row, value_batch, value_head, value_row,
    ks_batch, ks_head, ks_row, vs_batch, vs_head, vs_row,
    HEADS: tl.constexpr, D: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Grid (batch, HEADS + kv_heads): turns a query head; turns, encodes and writes a KV head."""
    gdc_launch_dependents()
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dtype: tl.constexpr = q.dtype.element_ty
    d = tl.arange(0, D)
    half = tl.arange(0, D // 2)
    gdc_wait()
    by_cos = tl.load(cos + half)
    by_sin = tl.load(sin + D // 2 + half)
    if head < HEADS:
        from_ = q + b * q_batch + head * q_head + half
        low = tl.load(from_).to(tl.float32)
        high = tl.load(from_ + D // 2).to(tl.float32)
        to = turned + (b * HEADS + head) * D + half
        tl.store(to, (low * by_cos - high * by_sin).to(dtype))
        tl.store(to + D // 2, (high * by_cos + low * by_sin).to(dtype))
    else:
        kv = (head - HEADS).to(tl.int64)
        place = tl.load(slot)
        key_from = k + b * k_batch + kv * k_head + half
        key_low = tl.load(key_from).to(tl.float32)
        key_high = tl.load(key_from + D // 2).to(tl.float32)
        new_low = (key_low * by_cos - key_high * by_sin).to(dtype)
        new_high = (key_high * by_cos + key_low * by_sin).to(dtype)
        x = tl.load(v + b * v_batch + kv * v_head + d)
        key_to = key + b * key_batch + kv * key_head + place * key_row + half
        value_to = value + b * value_batch + kv * value_head + place * value_row + d
        if INT8:
            scale = tl.maximum(
                _scale_of(new_low.to(tl.float32)), _scale_of(new_high.to(tl.float32))
            )
            tl.store(key_to, _code(new_low.to(tl.float32), scale))
            tl.store(key_to + D // 2, _code(new_high.to(tl.float32), scale))
            tl.store(key_scale + b * ks_batch + kv * ks_head + place * ks_row, scale)
            value_by = _scale_of(x.to(tl.float32))
            tl.store(value_to, _code(x.to(tl.float32), value_by))
            tl.store(value_scale + b * vs_batch + kv * vs_head + place * vs_row, value_by)
        else:
            tl.store(key_to, new_low)
            tl.store(key_to + D // 2, new_high)
            tl.store(value_to, x)
