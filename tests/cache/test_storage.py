"""Storages: the error of a code is at most half a level, and no code depends on other tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.cache import Dense, Int4, Int8, parse_storage

STORAGES = (Dense(), Int8(), Int4())
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(seed: int, tokens: int, dim: int, spread: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, 2, 3, tokens, dim, generator=generator) * spread
    mean = torch.randn(2, 3, 1, dim, generator=generator).half().float()
    return key, value, mean


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 1000), st.integers(1, 9), st.sampled_from([32, 64, 128]), st.floats(1e-3, 100.0)
)
def test_codes_are_off_by_half_a_level(seed, tokens, dim, spread) -> None:
    key, value, mean = make(seed, tokens, dim, spread)
    for storage, levels in ((Int8(), 127), (Int4(), 7)):
        codes = storage.encode(key, value, mean)
        got_key, got_value = storage.decode(codes, mean, torch.float32)
        shifted = key - mean if isinstance(storage, Int4) else key
        groups = shifted.unflatten(-1, (-1, 32 if isinstance(storage, Int4) else dim))
        step = (groups.abs().amax(-1, keepdim=True) / levels).expand_as(groups).flatten(-2)
        # Half a level, and the rounding of the fp16 scale on up to `levels` of them.
        slack = 1 + levels * 2.0**-10 + 1e-3
        assert ((got_key - key).abs() <= 0.5 * step * slack + 1e-6).all()
        if isinstance(storage, Int4):
            span = value.amax(-1, keepdim=True) - value.amin(-1, keepdim=True)
            half = 0.5 * span / 15 + 17 * 2.0**-11 * value.abs().amax(-1, keepdim=True)
        else:
            half = 0.5 * value.abs().amax(-1, keepdim=True) / 127 * slack
        assert ((got_value - value).abs() <= half + 1e-6).all()


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_is_coded_by_itself(storage, dtype) -> None:
    key, value, mean = make(0, 7, 64, 1.0)
    key, value = key.to(dtype), value.to(dtype)
    together = storage.encode(key, value, mean)
    for t in range(7):
        alone = storage.encode(key[:, :, t : t + 1], value[:, :, t : t + 1], mean)
        for name, x in together.items():
            assert torch.equal(x[:, :, t : t + 1], alone[name])


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fields_are_as_laid_out(storage, dtype) -> None:
    key, value, mean = make(0, 5, 64, 1.0)
    fields = storage.encode(key.to(dtype), value.to(dtype), mean)
    layout = storage.layout(64, dtype)
    assert {n: (x.shape[-1], x.dtype) for n, x in fields.items()} == layout
    held = sum(x.nbytes for x in fields.values()) / (2 * 3 * 5)
    assert held == storage.bytes_per_token(64, dtype)
    got = storage.decode(fields, mean, dtype)
    assert all(x.dtype == dtype and x.shape == key.shape for x in got)


@pytest.mark.parametrize("storage", [Int8(), Int4()], ids=str)
def test_what_is_not_a_number_stays_so(storage) -> None:
    key, value, mean = make(0, 3, 64, 1.0)
    key[0, 0, 1, 5], value[1, 2, 0, 7] = torch.nan, torch.inf
    got_key, got_value = storage.decode(storage.encode(key, value, mean), mean, torch.float32)
    assert not got_key[0, 0, 1].isfinite().all()
    assert not got_value[1, 2, 0].isfinite().all()
    assert got_key[0, 0, 0].isfinite().all()


@pytest.mark.parametrize("storage", [Int8(), Int4()], ids=str)
def test_zeros_stay_zeros(storage) -> None:
    zero = torch.zeros(1, 1, 2, 64)
    key, value = storage.decode(
        storage.encode(zero, zero, torch.zeros(1, 1, 1, 64)), torch.zeros(1, 1, 1, 64), zero.dtype
    )
    assert torch.equal(key, zero)
    assert torch.equal(value, zero)


def test_names() -> None:
    for storage in STORAGES:
        assert parse_storage(str(storage)) == storage
    with pytest.raises(ValueError, match="storage 'int3' is not known"):
        parse_storage("int3")
    with pytest.raises(ValueError, match="head_dim is 40"):
        Int4().check(40)
