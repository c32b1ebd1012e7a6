"""Which measured case serves a call, and that what ships can be read."""

import json
from importlib.resources import files

import pytest

from attnspan import dispatch, gpu, rates
from attnspan.patterns import Causal, Full, Longformer, Sinks, SlidingWindow, parse
from attnspan.rates import ranking
from attnspan.testing import make_qkv

HOPPER = (9, 0)
CASES = [
    ("forward", "Causal()", 32768, 128, {"hopper": 600, "fa4": 650}),
    ("forward", "SlidingWindow(1024)", 32768, 128, {"hopper": 580, "fa4": 500, "flex": 300}),
    ("forward", "SlidingWindow(4096)", 32768, 128, {"hopper": 690, "fa4": 620}),
    ("forward", "SlidingWindow(1024)", 32768, 64, {"hopper": 410, "fa4": 380}),
    ("forward", "SlidingWindow(1024)", 1024, 128, {"hopper": 10, "fa4": 20}),
    ("forward", "SlidingWindow(4096) | Sinks(4)", 131072, 128, {"hopper": 680, "flex": 350}),
    ("backward", "SlidingWindow(1024)", 32768, 128, {"hopper": 400, "fa4": 410}),
    ("backward", "SlidingWindow(4096)", 32768, 128, {"hopper": 480, "fa4": 570}),
]


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "shipped" in request.node.name:
        return
    rows = [
        {"what": what, "pattern": p, "n": n, "head_dim": d, "lse": False, "impl": i, "tflops": t}
        for what, p, n, d, figures in CASES
        for i, t in figures.items()
    ]
    entry = {"capability": [9, 0], "date": "2026-11-25", "versions": {}, "rates": rows}
    monkeypatch.setattr(rates, "_tables", lambda: {"NVIDIA H200": entry})
    ranking.cache_clear()


def ask(pattern, head_dim=128, length=32768, backward=False, device="NVIDIA H200") -> list[str]:
    found = ranking(device, HOPPER, str(pattern), head_dim, length, False, backward)
    assert found is not None
    return [impl for impl, _ in found.figures]


def test_the_nearest_case_of_the_same_kind_serves() -> None:
    assert ask(Causal()) == ask(Full()) == ["fa4", "hopper"]
    assert ask(SlidingWindow(900)) == ["hopper", "fa4", "flex"]
    assert ask(SlidingWindow(9000)) == ["hopper", "fa4"]
    assert ask(SlidingWindow(900), length=1500) == ["fa4", "hopper"]
    assert ask(SlidingWindow(900), head_dim=32, length=1500) == ["hopper", "fa4"]
    assert ask(Longformer(100, 4)) == ask(SlidingWindow(1024) | Sinks(4)) == ["hopper", "flex"]


def test_training_counts_forward_and_backward() -> None:
    assert ask(SlidingWindow(1024), backward=True) == ["hopper", "fa4"]
    assert ask(SlidingWindow(4096), backward=True) == ["fa4", "hopper"]
    found = ranking("NVIDIA H200", HOPPER, "SlidingWindow(4096)", 128, 32768, False, True)
    assert found is not None
    assert dict(found.figures)["fa4"] == pytest.approx(3.5 / (1 / 620 + 2.5 / 570))
    assert "forward of SlidingWindow(4096) at n=32768" in str(found)
    assert str(found).endswith("on NVIDIA H200, 2026-11-25")


def test_a_gpu_of_the_same_kind_takes_its_figures_and_says_so() -> None:
    found = ranking("NVIDIA H100", HOPPER, "Causal()", 128, 32768, False, False)
    assert found is not None
    assert "NVIDIA H200 (this is NVIDIA H100)" in str(found)
    assert ranking("NVIDIA A100", (8, 0), "Causal()", 128, 32768, False, False) is None


def test_what_is_shipped_can_be_read() -> None:
    tables = json.loads((files("attnspan") / "gpu_rates.json").read_text())
    for table in tables.values():
        assert {"capability", "date", "versions", "rates"} <= table.keys()
        for row in table["rates"]:
            assert row["what"] in ("forward", "backward")
            assert row["impl"] in dispatch.IMPLS
            assert row["tflops"] > 0
            assert str(parse(row["pattern"])) == row["pattern"]
    ranking.cache_clear()
    found = ranking("NVIDIA H200", HOPPER, "SlidingWindow(4096)", 128, 32768, True, False)
    assert found is not None
    assert found.figures[0][1] > 100


def test_figures_are_of_one_case_and_none_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(what: str, pattern: str, impl: str) -> dict:
        case = {"what": what, "pattern": pattern, "n": 4096, "head_dim": 128, "lse": False}
        return {**case, "impl": impl, "tflops": 1.0}

    rows = [row("forward", p, i) for p in ("Strided(8, 4)", "Longformer(8, 4)") for i in ("a", "b")]
    entry = {"capability": [9, 0], "date": "", "versions": {}, "rates": rows}
    monkeypatch.setattr(rates, "_tables", lambda: {"NVIDIA H200": entry})
    ranking.cache_clear()
    assert ask("Documents((9, 9))") == ["a", "b"]
    assert ranking("NVIDIA H200", HOPPER, "Causal()", 128, 4096, False, True) is None


def test_what_compiles_for_every_length_is_not_put_first(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = (("flex", 3.0), ("fa4", 2.0), ("sdpa", 1.5), ("hopper", 1.0))
    monkeypatch.setattr(gpu, "ranking", lambda *_: rates.Ranking(figures, "", ""))
    q, k, v = make_qkv(4, 4)
    order = dispatch._gpu_order(q, k, v, Causal(), False)
    assert order == ("decode", "fa4", "hopper", "triton", "sdpa", "flex")
