"""What a ring's lanes give is what one lane gives: float64, every policy, storage and rotation."""

from __future__ import annotations

import itertools

import pytest
import torch

from attnspan.cache import Dense, Int4, Int8
from attnspan.cache.lane import Call, LayerSpec
from attnspan.cache.layer import LayerCache, Span
from attnspan.cache.tables import Tables
from attnspan.policies import parse
from attnspan.positions import DynamicNTK, LongRoPE, Rope, Yarn
from attnspan.ring.cache import SharedLane, SharedStream
from attnspan.ring.simulated import simulate

HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 16, 90
SPECS = (
    "keep-all",
    "window:9",
    "window:1",
    "window:9,block=4",
    "sinks:3+window:8",
    "sinks:3+window:8,block=5",
    "sinks:5+window:1",
)
PLAIN = Rope(DIM, 10000.0)
ROPES = {
    "none": None,
    "plain": PLAIN,
    "interleaved": Rope(DIM, 10000.0, interleaved=True),
    "yarn": Rope(DIM, 10000.0, Yarn(4.0, 16)),
    "dynamic": Rope(DIM, 10000.0, DynamicNTK(2.0, 5)),
    "longrope": Rope(DIM, 10000.0, LongRoPE((1.0,) * 8, (2.0,) * 8, 6, 40)),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Ranks are threads already: more of them in each operation only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(dtype=torch.float64, batch=2):
    make = torch.Generator().manual_seed(0)
    q = torch.randn(batch, HEADS, TOKENS, DIM, generator=make, dtype=torch.float64)
    k, v = torch.randn(2, batch, KV_HEADS, TOKENS, DIM, generator=make, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(cache: LayerCache, qkv, size: int, forget: bool = False, **call) -> torch.Tensor:
    q, k, v = qkv
    cache.start([q.shape[0]], q.dtype, q.device)
    outs = []
    for start in range(0, TOKENS, size):
        stop = min(start + size, TOKENS)
        part = slice(start, stop)
        spans, tables = [Span(0, None, 0, stop - start)], Tables()
        if forget and start > 20:
            for x in cache.lanes[0].fields.values():
                x.zero_()
        outs.append(
            cache.attend(q[:, :, part], k[:, :, part], v[:, :, part], spans, Call(tables, **call))
        )
    return torch.cat(outs, 2)


def both(spec, storage, rope, ranks, size, dtype=torch.float64, cap=None, forget=None, **call):
    """What one process gives, and each rank; with the caches."""
    layer, qkv = LayerSpec(HEADS, KV_HEADS, DIM, rope, cap is not None), made(dtype)
    policy = parse(spec)
    alone = LayerCache(layer, policy, storage)
    expected = run(alone, qkv, size, softcap=cap, **call)

    def work(transport):
        stream = SharedStream(transport, [policy], 0)
        cache = LayerCache(layer, policy, storage, maker=stream.maker(0))
        out = run(cache, qkv, size, forget == transport.rank, softcap=cap, **call)
        return out, cache, transport.sent

    return expected, alone, simulate(ranks, work)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("spec", SPECS)
def test_outputs_equal_one_lane_s(spec, ranks) -> None:
    for size, rope in ((1, "plain"), (7, "dynamic"), (TOKENS, "plain")):
        expected, alone, results = both(spec, Dense(), ROPES[rope], ranks, size)
        for got, _, _ in results:
            assert torch.equal(got, results[0][0]), "ranks differ"
            assert (got - expected).abs().max() < 1e-13, (size, rope)
        held = [cache.lanes[0].tokens_held for _, cache, _ in results]
        assert alone.lanes[0].tokens_held <= sum(held) <= alone.lanes[0].tokens_held + 2 * ranks


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("storage", [Dense(), Int8(), Int4(group=8)], ids=str)
def test_storages_and_rotations(storage, rope) -> None:
    for spec, size, dtype in (
        ("sinks:3+window:8,block=5", 1, torch.float32),
        ("sinks:3+window:8,block=5", 7, torch.float64),
        ("keep-all", 7, torch.float32),
    ):
        expected, _, results = both(spec, storage, ROPES[rope], 3, size, dtype)
        bound = 1e-5 if dtype == torch.float32 else 1e-12
        assert (results[0][0] - expected).abs().max() < bound, (spec, size, dtype)


@pytest.mark.parametrize("size", [1, 7])
def test_logits_of_sinks_soft_caps_and_what_models_rotate(size) -> None:
    logits = torch.randn(HEADS, generator=torch.Generator().manual_seed(3))
    for spec, options in itertools.product(
        ("sinks:3+window:8", "window:5"),
        ({"sink_logits": logits}, {"cap": 2.0}, {"rotated": True}, {"scale": 0.4}),
    ):
        expected, _, results = both(spec, Dense(), PLAIN, 2, size, **options)
        assert (results[0][0] - expected).abs().max() < 1e-12, (spec, options)


def test_a_share_that_is_lost_is_seen() -> None:
    expected, _, results = both("window:9", Dense(), PLAIN, 3, 1, forget=1)
    assert (results[0][0] - expected).abs().max() > 1e-2


def test_bytes_are_a_share_and_sent_by_the_formula() -> None:
    for spec in ("window:64", "sinks:4+window:64", "sinks:3+window:31,block=5"):
        for storage in (Dense(), Int8(), Int4(group=8)):
            _, alone, results = both(spec, storage, PLAIN, 4, 7)
            lanes = [cache.lanes[0] for _, cache, _ in results]
            assert all(isinstance(lane, SharedLane) for lane in lanes)
            assert len({lane.nbytes for lane in lanes}) == 1
            slots = alone.lanes[0]._slots_full(), lanes[0]._slots_full()
            front = 4 if isinstance(storage, Dense) and "sinks" in spec else 0
            assert slots[1] <= -(-slots[0] // 4) + (front > 0)
            # Two more rows: sinks in a tensor of their own, dealt out by themselves.
            assert lanes[0].nbytes <= 0.25 * alone.lanes[0].nbytes + 2 * 2 * KV_HEADS * DIM * 8 * 2
            for _, _, sent in results:
                assert sent == 2 * TOKENS * HEADS * (DIM + 1) * 8 * 3


@pytest.mark.parametrize("storage", [Dense(), Int8(), Int4(group=8)], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_every_token_held_is_held_once(spec, storage) -> None:
    """Values tell their positions: over the ranks they are those of one lane, each once."""
    policy, layer = parse(spec), LayerSpec(HEADS, KV_HEADS, DIM, PLAIN)
    q, k, _ = made(torch.float32, batch=1)
    v = torch.arange(TOKENS).float()[:, None].expand(1, KV_HEADS, TOKENS, DIM)

    def held(cache) -> list[int]:
        lane = cache.lanes[0]
        used = slice(lane.front, lane.front + lane._used())
        _, value = lane._decode({n: x[:, :, used] for n, x in lane.fields.items()})
        sinks = lane._sink_value[0, 0, :, 0].tolist() if lane.sinks else []
        # What stands past the window waits to be overwritten.
        return [*sinks, *(x for x in value[0, 0, :, 0].tolist() if round(x) >= least)]

    alone = LayerCache(layer, policy, storage)
    run(alone, (q, k, v), 7)
    least = max(0, TOKENS - (policy.capacity or TOKENS) + policy.leading)

    def work(transport):
        stream = SharedStream(transport, [policy], 0)
        cache = LayerCache(layer, policy, storage, maker=stream.maker(0))
        run(cache, (q, k, v), 7)
        return held(cache)

    shares = simulate(3, work)
    whole = [round(x) for share in shares for x in share]
    assert sorted(whole) == sorted(round(x) for x in held(alone))
    assert len(set(whole)) == len(whole)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_sixteen_bits_cost_no_more_than_alone() -> None:
    for spec, size in itertools.product(("sinks:3+window:8,block=5", "keep-all"), (1, 30)):
        exact, _, _ = both(spec, Dense(), None, 1, size)
        for ranks in (2, 4):
            low, _, results = both(spec, Dense(), None, ranks, size, torch.bfloat16)
            error = (low.double() - exact).abs().max()
            band = torch.finfo(torch.bfloat16).eps * exact.abs().max()
            assert (results[0][0].double() - exact).abs().max() <= 2 * error + band
