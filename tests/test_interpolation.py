"""The benchmark of interpolated positions, in its short mode, against forwards made by hand."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from attnspan.evaluation.texts import python_heldout
from attnspan.models import bundled

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("interpolation")


@pytest.fixture(scope="module")
def result(benchmark, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interpolation")
    benchmark.main(["--short", "--out", str(folder)])
    assert (folder / "interpolation.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "interpolation.json").read_text())


def row(result, length, rope=None, fixed=None, policy=None):
    key = {"length": length, "rope": rope, "fixed": fixed, "policy": policy}
    (found,) = [r for r in result["rows"] if key.items() <= r.items()]
    return found


def nll(first: int, scored: int, stop: int = 1152, **changes) -> float:
    """By hand: the text's bytes `first` to `stop - 1` after BOS; the last `scored` count."""
    model = AutoModelForCausalLM.from_pretrained(bundled.path(), dtype=torch.float32, **changes)
    data = list(python_heldout().encode()[:stop])
    with torch.no_grad():
        logits = model(torch.tensor([[256, *data[first:-1]]])).logits[0, -scored:].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(data[-scored:])))


def test_plain_positions_are_those_of_a_forward_by_hand(result):
    scored = result["scored"]
    for length in result["lengths"]:
        assert row(result, length)["nll"] == pytest.approx(nll(1152 - length, scored), abs=1e-5)
    # It can fail: one token less to see.
    assert abs(row(result, 1024)["nll"] - nll(1152 - 1023, scored)) > 1e-5
    assert row(result, 1024)["over_trained"] == 1


def test_interpolations_are_those_of_a_config_by_hand(result):
    rope = {"rope_type": "yarn", "factor": 1.125, "original_max_position_embeddings": 1024}
    by_hand = nll(0, result["scored"], rope_parameters={**rope, "rope_theta": 1e4})
    assert row(result, 1152, "yarn")["nll"] == pytest.approx(by_hand, abs=1e-5)
    assert row(result, 1024, "yarn")["nll"] == row(result, 1024)["nll"]  # a factor of 1
    theta = 1e4 * 4 ** (64 / 62)
    rope = {"rope_type": "default", "rope_theta": theta}
    by_hand = nll(0, result["scored"], rope_parameters=rope)
    assert row(result, 1152, "ntk", 4.0)["nll"] == pytest.approx(by_hand, abs=1e-5)
    # Dynamic NTK's factor of 2 is NTK's 2 * 1152 / 1024 - 1.
    theta = 1e4 * (2 * 1152 / 1024 - 1) ** (64 / 62)
    rope = {"rope_type": "default", "rope_theta": theta}
    by_hand = nll(0, result["scored"], rope_parameters=rope)
    assert row(result, 1152, "dynamic", 2.0)["nll"] == pytest.approx(by_hand, abs=1e-5)


def test_streams_that_keep_all_are_fresh_forwards(result):
    (off,) = result["stream_less_fresh"].values()
    assert off.keys() == {"plain", "linear:4", "ntk:4", "yarn:4"}
    assert max(off.values()) < 1e-3
    kept = row(result, 1024, "dynamic", 2.0, "keep-all")["nll"]  # up to the trained length
    assert kept == pytest.approx(row(result, 1024)["nll"], abs=1e-5)


def test_figures_count_each_run_once(benchmark):
    found = benchmark._figures([[1.0, 2.0], [3.0]], [1.0, 2.0])
    assert found["runs"] == [1.5, 3.0]
    assert found["nll"] == 2.25
    assert found["nll_standard_error"] == pytest.approx(0.75)  # 1.5 / sqrt(2) / sqrt(2)
    assert found["gap"] == 0.75
    assert found["gap_standard_error"] == pytest.approx(0.25)
    assert found["over_trained"] == pytest.approx(math.exp(0.75))


def test_runs_have_the_same_tokens_at_every_length(benchmark):
    settings = benchmark.Settings((4, 8), 3, 2)
    runs = benchmark.runs_of(range(100, 130), 7, settings)
    assert [run.ids for run in runs] == [
        tuple(range(100, 108)),
        tuple(range(111, 119)),
        tuple(range(122, 130)),
    ]
    short, long = (runs[1].passage(length) for length in settings.lengths)
    assert short.ids == (7, 115, 116, 117, 118)
    assert long.ids == (7, *range(111, 119))
    assert short.ids[short.length :] == long.ids[long.length :] == (117, 118)
