"""The shared cache between real processes, over gloo."""

from __future__ import annotations

import pytest
from ring.cache_workers import TOKENS
from ring.processes import run

LAYERS, HEADS, DIM = 2, 4, 8


@pytest.mark.parametrize("size", [2, 4])
def test_gqa_yarn_int8_sinks_window_in_one_stream_equal_one_process(size) -> None:
    results = run("ring.cache_workers:everything", size, timeout=60.0)
    for result in results:
        assert result["same generated"]
        assert len(result["held"]) == 1, "constant along the stream"
        assert result["held"][0] * size == result["whole"][0] == result["total"]
        assert result["tokens held"] == 32 // size
        # fp32 outputs and log-sum-exps, to each other process, for each token and layer.
        assert result["sent"] == TOKENS * LAYERS * HEADS * (DIM + 1) * 4 * (size - 1)
        assert result["sum"] == results[0]["sum"], "ranks differ"


def test_other_tokens_on_one_rank_are_refused_on_all() -> None:
    results = run("ring.cache_workers:mismatch", 3, timeout=60.0)
    told, seen, _ = results[0]
    assert "attnspan.Cache" in told
    assert "input_ids" in told
    assert seen == 12
    assert all(result == results[0] for result in results)
