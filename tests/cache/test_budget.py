"""max_bytes is a hard bound: what lanes plan is never passed by what they allocate."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import random_ids, tiny_llama
from torch.profiler import ProfilerActivity, profile

from attnspan.cache import Dense, Int4, Int8
from attnspan.cache.lane import Call, LayerSpec
from attnspan.cache.layer import LayerCache, Span
from attnspan.cache.tables import Tables
from attnspan.models import Cache, attach
from attnspan.policies import KeepAll, SinkWindow, parse
from attnspan.positions import Rope

STORAGES = (Dense(), Int8(), Int4())
SPECS = (
    "keep-all",
    "window:100",
    "sinks:4+window:100",
    "sinks:4+window:700",
    "heavy:60+window:40",
    "compressive:window=100,memory=50,rate=4,pooling=most-used",
    "heads(sinks:4+window:700; snap:60+window:40)",
)


def peak_bytes(path, work) -> int:
    """The most that torch had allocated at once while `work` ran, beyond what stood before."""
    work()  # what torch itself keeps after a first run is not the cache's
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        work()
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    standing = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return max(e["args"]["Total Allocated"] for e in events) - standing


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_allocations_stay_within_the_plan(tmp_path, spec, storage) -> None:
    heads, kv_heads, dim, n = 8, 2, 64, 1500
    layer = LayerSpec(heads, kv_heads, dim, Rope(dim, 10000.0))
    make = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, n, dim, generator=make)
    k, v = torch.randn(2, 1, kv_heads, n, dim, generator=make)
    limit = n if spec == "keep-all" else None

    def work() -> None:
        cache = LayerCache(layer, parse(spec), storage, limit)
        cache.start([1], torch.float32, torch.device("cpu"))
        for start in range(0, n, 300):
            part = slice(start, start + 300)
            tables = Tables(limit=table_bytes)
            spans = [Span(0, None, 0, 300)]
            cache.attend(q[:, :, part], k[:, :, part], v[:, :, part], spans, Call(tables))

    lane = LayerCache(layer, parse(spec), storage, limit).lane(
        1, torch.float32, torch.device("meta")
    )
    table_bytes = lane.table_bytes(300)
    planned = lane.planned_bytes() + lane.staging_bytes(300) + table_bytes
    measured = peak_bytes(tmp_path / "trace.json", work)
    assert measured <= planned
    assert planned < 3 * measured, "a plan far above what is needed would refuse what fits"


def test_a_budget_is_checked_before_anything_is_allocated() -> None:
    model = tiny_llama()
    with attach(model):
        with pytest.raises(ValueError, match="max_bytes is 1000; policy sinks:4"):
            Cache(model, SinkWindow(4, 100), max_bytes=1000)
        cache = Cache(model, SinkWindow(4, 100), max_bytes=2_500_000)
        with torch.inference_mode():
            with pytest.raises(ValueError, match="batch of 64"):
                model(input_ids=random_ids(4, batch=64), past_key_values=cache, use_cache=True)
            assert cache.nbytes == 0
            model(input_ids=random_ids(300), past_key_values=cache, use_cache=True)
        assert 0 < cache.peak_bytes <= 2_500_000


def test_keep_all_stops_at_its_budget_and_says_so() -> None:
    model = tiny_llama()
    with attach(model), torch.inference_mode():
        cache = Cache(model, KeepAll(), max_bytes=6_000_000)
        ids = random_ids(10_000)
        with pytest.raises(RuntimeError, match="all that max_bytes allows"):
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        assert cache.peak_bytes <= 6_000_000
