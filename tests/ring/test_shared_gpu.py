"""The shared cache's lanes on a GPU give what one lane gives on a CPU."""

from __future__ import annotations

import pytest
import torch

from attnspan.cache import Dense, Int4, Int8
from attnspan.cache.lane import Call, LayerSpec
from attnspan.cache.layer import LayerCache, Span
from attnspan.cache.tables import Tables
from attnspan.policies import parse
from attnspan.positions import Rope
from attnspan.ring.cache import SharedStream
from attnspan.ring.simulated import simulate

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, DIM, TOKENS = 8, 2, 64, 160  # heads as the decode kernels take them
LAYER = LayerSpec(HEADS, KV_HEADS, DIM, Rope(DIM, 10000.0))


def run(cache: LayerCache, qkv: list[torch.Tensor]) -> torch.Tensor:
    """One prompt and then steps of one token."""
    q, k, v = qkv
    cache.start([q.shape[0]], q.dtype, q.device)
    outs = []
    for a, b in [(0, 100), *((i, i + 1) for i in range(100, TOKENS))]:
        spans, call = [Span(0, None, 0, b - a)], Call(Tables())
        outs.append(cache.attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], spans, call))
    return torch.cat(outs, 2).double().cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("storage", [Dense(), Int8(), Int4()], ids=str)
@pytest.mark.parametrize("spec", ["keep-all", "window:30", "sinks:3+window:40,block=5"])
def test_lanes_on_a_gpu(spec, storage, dtype) -> None:
    make, policy = torch.Generator().manual_seed(0), parse(spec)
    shapes = [(2, h, TOKENS, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
    qkv = [torch.randn(shape, generator=make).to(dtype) for shape in shapes]
    exact = run(LayerCache(LAYER, policy, storage), [x.double() for x in qkv])
    moved = [x.cuda() for x in qkv]
    low = run(LayerCache(LAYER, policy, storage), moved)

    def work(transport):
        stream = SharedStream(transport, [policy], 0)
        return run(LayerCache(LAYER, policy, storage, maker=stream.maker(0)), moved)

    bound = 2 * (low - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    for ranks in (2, 4):
        results = simulate(ranks, work)
        for got in results:
            assert torch.equal(got, results[0]), "ranks differ"
            assert (got - exact).abs().max() <= bound
