"""Caches on a GPU give what they give on a CPU."""

from __future__ import annotations

import pytest
import torch
from tiny import random_ids, tiny_llama

from attnspan.cache import Dense, Int4, Int8
from attnspan.models import Cache, attach
from attnspan.policies import parse

pytestmark = pytest.mark.gpu

SPECS = (
    "keep-all",
    "window:9",
    "sinks:2+window:7",
    "heavy:4+window:5,block=4",
    "compressive:window=6,memory=3,rate=2,pooling=most-used,block=4",
)


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
