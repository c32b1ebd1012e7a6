"""A cache that a ring shares is the cache of one process, in every hand that takes it."""

from __future__ import annotations

import itertools
from copy import deepcopy
from functools import partial

import pytest
import torch
from tiny import assert_same_but_for_codes, random_ids, tiny, tiny_llama

from attnspan.cache import Dense, Int4, Int8
from attnspan.cache.clock import Clock
from attnspan.models import Cache, attach
from attnspan.models.budget import planned_bytes
from attnspan.policies import parse
from attnspan.ring.simulated import simulate
from attnspan.ring.transport import RingMismatch, RingPeerLost

SPECS = ("keep-all", "window:9,block=4", "sinks:3+window:8", "layers(sinks:2+window:6; keep-all)")
NEAR = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(autouse=True)
def one_thread():
    """Ranks are threads already: more of them in each operation only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def logits(model, cache, ids, size: int = 7, **kwargs) -> torch.Tensor:
    """Of every token, in calls of `size`, of a model that is attached."""
    with torch.inference_mode():
        parts = [
            model(input_ids=ids[:, a : a + size], past_key_values=cache, **kwargs).logits
            for a in range(0, ids.shape[1], size)
        ]
    return torch.cat(parts, 1)


def on_ring(ranks: int, model, work):
    """What `work(model, transport)` gives on each rank, with an attached model of its own."""
    models = [deepcopy(model) for _ in range(ranks)]

    def run(transport):
        with attach(models[transport.rank]) as own:
            return work(own, transport)

    return simulate(ranks, run)


def alone(model, work):
    with attach(deepcopy(model)) as own:
        return work(own, None)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_logits_equal_one_process(model, spec, ranks) -> None:
    ids = random_ids(60, batch=2)

    def work(model, ring):
        return [logits(model, Cache(model, parse(spec), ring=ring), ids, size) for size in (1, 13)]

    expected, results = alone(model, work), on_ring(ranks, model, work)
    for got in results:
        for x, first, exact in zip(got, results[0], expected, strict=True):
            assert torch.equal(x, first), "ranks differ"
            torch.testing.assert_close(x, exact, **NEAR)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "gpt_neox", "smollm3", "llama-llama3"])
def test_other_families(family) -> None:
    ids = random_ids(45)

    def work(model, ring):
        return logits(model, Cache(model, parse("sinks:3+window:20"), Int8(), ring=ring), ids)

    model = tiny(family)
    assert_same_but_for_codes(on_ring(2, model, work)[1], alone(model, work), NEAR["atol"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_and_generating(model, side) -> None:
    lengths, width = (14, 6, 9), 14
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for i, n in enumerate(lengths):
        place = slice(width - n, width) if side == "left" else slice(0, n)
        ids[i, place], mask[i, place] = random_ids(n, seed=i)[0], 1

    def work(model, ring):
        cache = Cache(model, parse("sinks:2+window:7"), ring=ring)
        if side == "right":
            return logits(model, cache, ids, width, attention_mask=mask)[mask.bool()]
        settings = {"max_new_tokens": 15, "do_sample": False}
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)

    expected = alone(model, work)
    for got in on_ring(3, model, work):
        torch.testing.assert_close(got, expected, **NEAR)


def test_beams(model) -> None:
    def work(model, ring):
        cache = Cache(model, parse("sinks:2+window:7"), ring=ring)
        settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": 3}
        return model.generate(random_ids(9), past_key_values=cache, **settings)

    expected = alone(model, work)
    for got in on_ring(2, model, work):
        assert torch.equal(got, expected)


def test_rows_chosen_otherwise_are_refused(model) -> None:
    def work(model, ring):
        cache = Cache(model, parse("window:9"), ring=ring)
        logits(model, cache, random_ids(9, batch=2))
        with pytest.raises(RingMismatch, match="the rows chosen"):
            cache.batch_select_indices(torch.tensor([0, 1 - ring.rank]))
        cache.batch_select_indices(torch.tensor([1, 1]))
        return logits(model, cache, random_ids(9, batch=2))

    first, second = on_ring(2, model, work)
    assert torch.equal(first, second)


def test_long_inputs_go_in_chunks(model) -> None:
    ids = random_ids(70)

    def work(model, ring):
        cache = Cache(model, parse("sinks:2+window:30"), ring=ring, chunk=16)
        return logits(model, cache, ids, 70)

    torch.testing.assert_close(on_ring(2, model, work)[1], alone(model, work), **NEAR)


@pytest.mark.parametrize("storage", [Dense(), Int8(), Int4(group=8)], ids=str)
def test_a_budget_bounds_each_process(model, storage) -> None:
    limit = 600_000

    def work(model, ring):
        cache = Cache(model, parse("keep-all"), storage, max_bytes=limit, chunk=32, ring=ring)
        assert planned_bytes(cache, 1, cache.caches[0].limit) <= limit
        ids, peaks = random_ids(31), []

        def fill() -> None:
            while True:
                logits(model, cache, ids, 31)
                peaks.append(cache.nbytes)

        with pytest.raises(RuntimeError, match="the cache is full"):
            fill()
        assert max(peaks) < limit
        assert cache.broken
        return cache.tokens_seen, max(peaks)

    (seen, peak), (also_seen, also_peak) = on_ring(2, model, work)
    assert (seen, peak) == (also_seen, also_peak), "full at once"


def test_bytes_do_not_grow_along_a_stream(model) -> None:
    def work(model, ring):
        cache = Cache(model, parse("sinks:4+window:28"), Int8(), ring=ring)
        sizes = set()
        for i in range(12):
            logits(model, cache, random_ids(16, seed=i), 16)
            sizes.add((cache.nbytes, cache.total_nbytes))
        assert "rank" in repr(cache) or ring is None
        return sizes, cache.tokens_held, cache.peak_tokens_held

    ((whole, _),), held, _ = alone(model, work)
    for sizes, own, peak in on_ring(4, model, work):
        assert sizes == {(whole // 4, whole)}
        assert own == peak == held // 4


def test_each_process_saves_and_loads_its_own(model) -> None:
    ids, states = random_ids(60), {}

    def make(model, ring):
        return Cache(model, parse("sinks:3+window:8"), Int8(), ring=ring)

    def work(model, ring):
        whole = make(model, ring)
        expected = logits(model, whole, ids)[:, 28:]
        cache = make(model, ring)
        logits(model, cache, ids[:, :28])
        states[ring.rank] = cache.state()
        later = make(model, ring)
        later.load_state(*states[ring.rank])
        return torch.equal(logits(model, later, ids[:, 28:]), expected)

    assert on_ring(2, model, work) == [True, True]

    def exchanged(model, ring):
        cache = make(model, ring)
        with pytest.raises(ValueError, match=f"ring 'rank {1 - ring.rank} of 2'; this cache has"):
            cache.load_state(*states[1 - ring.rank])
        return cache.tokens_seen

    assert on_ring(2, model, exchanged) == [0, 0]
    with attach(deepcopy(model)) as own, pytest.raises(ValueError, match="this cache has None"):
        Cache(own, parse("sinks:3+window:8"), Int8()).load_state(*states[0])


def test_snapshots_of_other_streams_do_not_mix(model) -> None:
    def work(model, ring):
        states = []
        for seed in (1, 2):
            cache = Cache(model, parse("window:9"), ring=ring)
            logits(model, cache, random_ids(20, seed=seed))
            states.append(cache.state())
        cache.load_state(*states[ring.rank])
        with pytest.raises(RingMismatch, match="the stream so far"):
            logits(model, cache, random_ids(7))
        cache.load_state(*states[0])
        return logits(model, cache, random_ids(7))

    first, second = on_ring(2, model, work)
    assert torch.equal(first, second)


def variants():
    """What rank 1 does otherwise, and the fact that is named."""
    return {
        "input_ids": lambda model, ring: {"ids": random_ids(7, seed=5 + ring.rank)},
        "input_ids: 8": lambda model, ring: {"ids": random_ids(7 + ring.rank)},
        "policy": lambda model, ring: {"policy": parse(f"window:{9 + ring.rank}")},
        "storage": lambda model, ring: {"storage": (Dense(), Int8())[ring.rank]},
        "chunk": lambda model, ring: {"chunk": 50 + ring.rank},
        "columns": lambda model, ring: {"before": 8 + ring.rank},
        "attention_mask": lambda model, ring: {
            "attention_mask": torch.ones(1, 7 if ring.rank == 0 else 5, dtype=torch.long)
        },
        "weights": lambda model, ring: {"touched": ring.rank},
    }


@pytest.mark.parametrize("name", variants())
def test_what_differs_is_refused_on_all_ranks_alike(model, name) -> None:
    def work(model, ring):
        other = variants()[name](model, ring)
        if other.pop("touched", 0):
            with torch.no_grad():
                model.lm_head.weight[0, 0] += 1
        ids, before = other.pop("ids", random_ids(7)), other.pop("before", 0)
        options = {key: other.pop(key) for key in ("storage", "chunk") if key in other}
        cache = Cache(model, other.pop("policy", parse("window:9")), ring=ring, **options)
        if before:
            with pytest.raises(RingMismatch):
                logits(model, cache, random_ids(before), before)
            cache.columns = before  # as if that much had gone by unseen
        seen, sizes = cache.tokens_seen, cache.nbytes
        with pytest.raises(RingMismatch, match=name.partition(":")[0]) as caught:
            logits(model, cache, ids, 8, **other)
        assert (cache.tokens_seen, cache.nbytes, cache.broken) == (seen, sizes, False)
        return str(caught.value)

    first, second = on_ring(2, model, work)
    assert first == second


def test_after_a_mismatch_the_stream_goes_on(model) -> None:
    ids = random_ids(30)

    def work(model, ring):
        cache = Cache(model, parse("sinks:2+window:9"), ring=ring)
        got = [logits(model, cache, ids[:, :10])]
        if ring is not None:
            with pytest.raises(RingMismatch):
                logits(model, cache, random_ids(4, seed=ring.rank))
        return torch.cat((got[0], logits(model, cache, ids[:, 10:])), 1)

    torch.testing.assert_close(on_ring(2, model, work)[0], alone(model, work), **NEAR)


@pytest.mark.parametrize(
    ("spec", "options", "why"),
    [
        ("heavy:5+window:6", {}, "KeepAll, Window and SinkWindow are allowed with a ring"),
        (
            "compressive:window=6,memory=3,rate=2",
            {},
            "policy compressive.* are allowed with a ring",
        ),
        ("window:9", {"rollback": 4}, "rollback is 4; .* 0 is allowed with a ring"),
    ],
)
def test_what_a_ring_cannot_share_is_refused(model, spec, options, why) -> None:
    def work(model, ring):
        with pytest.raises(ValueError, match=why):
            Cache(model, parse(spec), ring=ring, **options)
        return ring.sent

    assert on_ring(2, model, work) == [0, 0]


def test_steps_by_a_clock_and_undoing_are_refused(model) -> None:
    def work(model, ring):
        cache = Cache(model, parse("window:9"), ring=ring)
        logits(model, cache, random_ids(7))
        with pytest.raises(ValueError, match="lie on a ring"), cache.clocked(Clock(torch.zeros(1))):
            pass
        with pytest.raises(ValueError, match="0 tokens can be taken back"):
            cache.crop(-1)
        return cache.tokens_seen

    assert on_ring(2, model, work) == [7, 7]


def test_who_is_lost_in_a_forward_is_named(model) -> None:
    ids = random_ids(20)

    def work(model, ring):
        cache = Cache(model, parse("window:9"), ring=ring)
        logits(model, cache, ids)
        if ring.rank == 1:

            def fail(*_) -> None:
                raise MemoryError

            model.model.layers[1].register_forward_pre_hook(fail)
            logits(model, cache, ids)
        with pytest.raises(RingPeerLost) as caught:
            logits(model, cache, ids)
        assert (caught.value.ranks, caught.value.layer) == ((1,), 1)
        with pytest.raises(RingPeerLost):
            logits(model, cache, ids)
        assert cache.broken
        return None

    with pytest.raises(MemoryError):
        on_ring(2, model, work)


def test_a_forgotten_share_is_seen(model) -> None:
    ids = random_ids(40)

    def work(model, ring):
        cache = Cache(model, parse("window:9"), ring=ring)
        first = logits(model, cache, ids[:, :20])
        if ring is not None and ring.rank == 1:
            for layer in cache.caches:
                layer.lanes[0].fields["value"].zero_()
        return torch.cat((first, logits(model, cache, ids[:, 20:], 1)), 1)

    expected, got = alone(model, work), on_ring(3, model, work)[0]
    assert (got[:, 20:28] - expected[:, 20:28]).abs().max() > 1e-3


def yarn_llama():
    """GQA 2:1, YaRN past 32 positions."""
    scaling = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return tiny_llama(rope_parameters=scaling, max_position_embeddings=128)


def test_gqa_yarn_int8_sinks_window_in_one_stream() -> None:
    model, ids = yarn_llama(), random_ids(400)
    capacity = 32

    def work(model, ring, spec="sinks:4+window:28"):
        cache = Cache(model, parse(spec), Int8(), ring=ring)
        out = [logits(model, cache, ids[:, :40], 40)]
        steady = cache.nbytes
        sizes = itertools.cycle((1, 3, 17))
        at = 40
        while at < ids.shape[1]:
            size = next(sizes)
            out.append(logits(model, cache, ids[:, at : at + size], size))
            at += size
            assert cache.nbytes == steady
        return torch.cat(out, 1), cache

    expected, whole = alone(model, work)
    shorter, _ = alone(model, partial(work, spec="sinks:4+window:27"))
    with pytest.raises(AssertionError):
        assert_same_but_for_codes(shorter, expected, NEAR["atol"])
    for got, cache in on_ring(2, model, work):
        assert_same_but_for_codes(got, expected, NEAR["atol"])
        assert cache.nbytes * 2 == whole.nbytes == cache.total_nbytes
        assert cache.tokens_held == capacity // 2
