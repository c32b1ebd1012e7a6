"""Caches on a GPU give what they give on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import random_ids, rounded, tiny, tiny_llama

from attnspan.cache import Dense, Int4, Int8
from attnspan.kernels import gpu_decode
from attnspan.models import Cache, attach
from attnspan.models.interface import Refused
from attnspan.policies import parse

pytestmark = pytest.mark.gpu

SPECS = (
    "keep-all",
    "window:9",
    "sinks:2+window:7",
    "heavy:4+window:5,block=4",
    "compressive:window=6,memory=3,rate=2,pooling=most-used,block=4",
    "snap:4+window:5,observed=2,block=4",
    "heads(keep-all; heavy:3+window:4,block=4)",
)
# Blocks move where a window ends, and pools other slots than the newest: all the ways of a view.
WIDE_SPECS = (*SPECS, "window:9,block=4", "sinks:3+window:8,block=5")
# Heads as the decode kernels take them.
WIDE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256}


def stream(model, cache, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    with attach(model), torch.inference_mode():
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in ids.to(model.device).split(cuts, dim=1)
        ]
    return torch.cat(parts, 1).cpu()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("cuts", [[90], [40, *[1] * 50]], ids=["whole", "steps"])
def test_a_gpu_gives_what_a_cpu_gives(spec, cuts) -> None:
    ids = random_ids(90)
    on_cpu, on_gpu = tiny_llama(), tiny_llama().cuda()
    expected = stream(on_cpu, Cache(on_cpu, parse(spec)), ids, cuts)
    got = stream(on_gpu, Cache(on_gpu, parse(spec)), ids, cuts)
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("storage", [Dense(), Int8(), Int4(group=8)], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_half_precision_stays_near(spec, storage) -> None:
    ids = random_ids(90)
    exact, half = tiny_llama(), tiny_llama().cuda().to(torch.bfloat16)
    expected = stream(exact, Cache(exact, parse(spec), storage), ids, [90])
    got = stream(half, Cache(half, parse(spec), storage), ids, [40, *[1] * 50]).float()
    # bf16 moves eviction decisions and codes, so single steps may differ; the bulk must not.
    assert (got - expected).abs().median() < 0.03
    assert torch.equal(got, got.nan_to_num())


def held_to_the_reference(make: Callable[[], Any], spec: str, storage, dtype) -> None:
    """A GPU's error is at most twice that of the same arithmetic on a CPU, and a rounding more."""
    ids, cuts = random_ids(120), [50, 30, 7, 3, *[1] * 30]
    low, on_gpu = rounded(make(), dtype), rounded(make(), dtype).cuda()
    exact = rounded(make(), dtype, torch.float32)
    expected = stream(exact, Cache(exact, parse(spec), storage), ids, cuts)
    reference = stream(low, Cache(low, parse(spec), storage), ids, cuts).double()
    got = stream(on_gpu, Cache(on_gpu, parse(spec), storage), ids, cuts).double()
    band = torch.finfo(dtype).eps * expected.abs().mean()
    # Of all logits together: decisions and codes on an edge fall either way, in the reference too.
    error, allowed = ((x - expected).abs().mean() for x in (got, reference))
    assert error <= 2 * allowed + band, f"{error:.2e} beside {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("storage", [Dense(), Int8(), Int4()], ids=str)
@pytest.mark.parametrize("spec", WIDE_SPECS)
def test_decode_kernels_read_what_every_cache_stores(spec, storage, dtype, monkeypatch) -> None:
    calls = []
    decode = gpu_decode.decode
    monkeypatch.setattr(gpu_decode, "decode", lambda *a, **k: calls.append(a) or decode(*a, **k))
    held_to_the_reference(lambda: tiny_llama(**WIDE), spec, storage, dtype)
    assert len(calls) >= 2 * 32  # two layers; every step of a few tokens


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3", "cohere2", "gpt_neox"])
def test_other_families(family) -> None:
    changes = {**WIDE, "hidden_size": 256}
    if family == "gpt_neox":
        changes.pop("head_dim")
    held_to_the_reference(
        lambda: tiny(family, **changes), "sinks:2+window:30", Int8(), torch.bfloat16
    )


@pytest.mark.parametrize("right", [0, 40], ids=["at once", "later"])
def test_a_wrong_length_is_seen(right, monkeypatch) -> None:
    """By the probe of `attach`, and past it by this file's comparison."""
    decode, calls = gpu_decode.decode, []

    def short(view, *args: Any, **options: Any):
        calls.append(view)
        if len(calls) <= right:
            return decode(view, *args, **options)
        part = view.parts[-1]
        size = (part.stored.fields["key"] if hasattr(part, "stored") else part.key).shape[2]
        length = torch.full((part.query.shape[0],), size - 1, device="cuda", dtype=torch.int32)
        return decode(
            replace(view, parts=(*view.parts[:-1], replace(part, length=length))), *args, **options
        )

    monkeypatch.setattr(gpu_decode, "decode", short)
    expected = (AssertionError, "beside") if right else (Refused, "other outputs through a cache")
    with pytest.raises(expected[0], match=expected[1]):
        held_to_the_reference(lambda: tiny_llama(**WIDE), "window:9", Int8(), torch.bfloat16)
