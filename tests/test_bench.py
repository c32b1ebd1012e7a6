"""`attnspan bench`: its table, its JSON, and the rates that it stores."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch

from attnspan import bench
from attnspan.cli import main
from attnspan.planner.links import find_device

FIELDS = {"what", "pattern", "impl", "dtype", "n", "seconds", "rate", "runs"}


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    """The same cases over fewer keys, without FlexAttention, which compiles for many seconds."""
    peers = bench._peers

    def without_flex(*args: Any, **kwargs: Any) -> list[Any]:
        return [case for case in peers(*args, **kwargs) if case.impl != "flex"]

    monkeypatch.setattr(bench, "_peers", without_flex)
    monkeypatch.setattr(bench, "decode", partial(bench.decode, 512))


def test_json_has_each_case_once_and_consistent(capsys) -> None:
    assert main(["bench", "--n", "256", "--runs", "1", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert result.keys() == {"meta", "rows"}
    assert result["meta"]["torch"] == torch.__version__
    rows = result["rows"]
    assert all(row.keys() == FIELDS and row["runs"] == 1 for row in rows)
    assert all(row["seconds"] > 0 and row["rate"] > 0 for row in rows)
    cases = [(row["what"], row["pattern"], row["impl"], row["dtype"]) for row in rows]
    assert len(set(cases)) == len(cases)
    assert {row["n"] for row in rows if row["what"] != "decode"} == {256}
    # Every pattern both ways by torch's kernels in tiles, which every machine has.
    for pattern in bench.PATTERNS:
        assert ("forward", str(pattern), "cpu", "float32") in cases
        assert ("backward", str(pattern), "cpu", "float32") in cases
    assert {"sdpa, is_causal", "sdpa, dense mask", "sdpa, by chunks"} <= {c[2] for c in cases}
    assert ("decode", "", "read", "float32") in cases
    # Rates are of useful operations: four a pair, query head and dimension; 2.5 as many backward.
    pairs = 256 * 257 // 2
    useful = {"forward": 4 * bench.HEAD_DIM * bench.HEADS * pairs}
    useful["backward"] = 2.5 * useful["forward"]
    for row in rows:
        if row["pattern"] == "causal" and row["what"] in useful:
            assert row["rate"] * row["seconds"] == pytest.approx(useful[row["what"]])


def test_table_has_a_line_for_each_case_and_a_file_the_same(tmp_path, capsys) -> None:
    file = tmp_path / "bench.json"
    assert main(["bench", "--n", "256", "--runs", "1", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    result = json.loads(file.read_text())
    assert lines[0].startswith(result["meta"]["device"])
    assert lines[1] == f"C++ kernels: {result['meta']['native']}"
    assert lines[2].split() == ["pattern", "implementation", "n", "ms", "rate"]
    body = lines[3:-2]
    assert len(body) == len(result["rows"])
    for line, row in zip(body, result["rows"], strict=True):
        assert line.split()[0] == row["what"]
        assert row["pattern"] in line
        assert row["impl"] in line
    # The rows that the others are shares of are shares of themselves.
    bases = [line for line in body if "sdpa, is_causal" in line or " read " in line]
    assert len(bases) == 3
    assert all(line.endswith(" 1.00") for line in bases)


def test_calibrate_stores_rates_where_the_user_keeps_settings(
    tmp_path, monkeypatch, capsys
) -> None:
    measured, prefill = bench._measured, bench.prefill

    def quick(cases: list[Any], runs: int) -> list[Any]:
        # A product of 2048 in bfloat16 takes minutes on a CPU without instructions for it.
        small = torch.ones(8, 8)
        for case in cases:
            if case.what == "product":
                case.run = lambda: small @ small
        return measured(cases, 1)

    monkeypatch.setattr(bench, "_measured", quick)
    monkeypatch.setattr(bench, "prefill", lambda n, *args, **kwargs: prefill(256, *args, **kwargs))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["bench", "--calibrate"]) == 0
    file = tmp_path / "attnspan" / "rates.json"
    assert str(file) in capsys.readouterr().out
    assert list(file.parent.iterdir()) == [file]
    stored = json.loads(file.read_text())
    assert stored["meta"] == bench.machine()
    rates = stored["rates"]
    assert all(rate > 0 for rate in rates.values())
    window = bench.PATTERNS[1]
    assert rates.keys() >= {
        "product float32",
        "product bfloat16",
        "read float32",
        f"forward {window} cpu float32",
        f"backward {window} cpu float32",
        "decode read",
    }
    # What `attnspan plan --device calibrated` takes.
    device = find_device("calibrated")
    assert device.memory_bandwidth == rates["read float32"]
    assert device.linear == max(rates["product float32"], rates["product bfloat16"])
    assert device.forward == max(rate for name, rate in rates.items() if "forward" in name)
    assert device.name == stored["meta"]["device"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--n", "0"], "0 is given; a whole number of at least 1 is allowed"),
        (["--runs", "many"], "many is given; a whole number of at least 1 is allowed"),
        (["--json", "no/such/folder.json"], "no/such"),
    ],
)
def test_bad_options_are_refused_before_the_work(option, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "prefill", lambda *a, **k: pytest.fail("it measured"))
    assert main(["bench", *option]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_calibrate_prints_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--calibrate", "--json", "-"]) == 2
    assert "with --calibrate, which prints no table, none is allowed" in capsys.readouterr().err
