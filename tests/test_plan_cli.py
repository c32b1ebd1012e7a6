"""`attnspan plan` and `article`: text, JSON, exit codes, what isn't loaded, and how soon."""

import json
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnspan.cli import main
from attnspan.planner.article import claims
from attnspan.planner.links import RATES
from attnspan.planner.plan import plan
from attnspan.planner.presets import MODELS, OPAQUE

DOCS = Path(__file__).parents[1] / "docs" / "planning.md"
HEAVY = {"torch", "transformers", "matplotlib", "rich"}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    return json.loads(said(capsys, *arguments, "--json", "-"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("attnspan: ")
    assert err.count("\n") == 1
    return err


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "plan", "mistral-7b", "--context", "100_000", "--compare", "--explain")
    assert "512.0 MiB" in out
    assert "H2O (heavy:2048+window:1985)" in out
    assert "    32 * 1 * 4096 * 4096 = 536,870,912 bytes" in out
    shape = out.partition("keys and values of a token in a layer:")[0]
    assert max(map(len, shape.splitlines())) <= 100


def test_json_holds_what_the_plan_does(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ["plan", "gemma-3-4b", "--context", "128K", "--storage", "int8", "--batch", "2"]
    given += ["--compare", "--budget", "2048", "--explain"]
    file = tmp_path / "plan.json"
    said(capsys, *given, "--json", str(file))
    held = json.loads(file.read_text())
    assert held == figures(capsys, *given)
    made = plan("gemma-3-4b", 131_072, storage="int8", batch=2)
    assert held["plan"] == json.loads(json.dumps(made.as_dict()))
    assert len(held["compare"]["rows"]) == len(made.compare(2048))
    assert [line["value"] for line in held["explain"]["lines"]] == [x.value for x in made.explain()]


def test_every_option_reaches_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--policy", "sinks:4+window:1020", "--storage", "int8", "--batch", "3"]
    given += ["--devices", "4", "--link", "nvlink", "--memory", "40GB", "--device", "a100"]
    held = figures(capsys, "plan", "llama-3-8b", "--context", "8K", "--weights", "int4", *given)
    found = held["plan"]
    assert (found["policy"], found["storage"], found["batch"]) == ("sinks:4+window:1020", "int8", 3)
    assert (found["devices"], found["link"]["name"], found["device"]["name"]) == (
        4,
        "nvlink",
        "a100",
    )
    assert (found["memory"], found["weights_kind"]) == (40 * 10**9, "int4")
    held = figures(capsys, "plan", "llama-3-8b", "--context", "8K", "--pattern", "Strided(64, 64)")
    assert held["plan"]["pattern"] == "Strided(64, 64)"
    held = figures(
        capsys, "plan", "gpt-oss-20b", "--context", "8K", "--engine", "vllm", "--chunk", "512"
    )
    assert (held["plan"]["engine"], held["plan"]["chunk"]) == ("vllm", 512)


def test_fit(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "llama-3-8b", "--fit", "--memory", "24GiB"]
    found = figures(capsys, *given)["longest"]
    assert found["plan"]["total"] <= 24 * 2**30 < found["one_more"]
    assert f"The longest context in 24.00 GiB is {found['context']:,} tokens" in said(
        capsys, *given
    )
    rows = figures(capsys, *given, "--context", "128K")["cheapest"]["candidates"]
    assert [row["change"] for row in rows][:2] == ["as asked", "prefill in steps of 2,048"]
    assert "the least change that fits is" in said(capsys, *given, "--context", "128K")
    for more in ("--compare", "--explain"):
        assert "--fit has no --compare" in refused(capsys, *given, more)


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "plan", "--list")
    assert all(name in out for name in (*MODELS, *OPAQUE))
    held = figures(capsys, "plan", "--list")
    assert [row["name"] for row in held["models"]] == list(MODELS)
    assert all(row["source"] for row in held["models"] + held["opaque"])
    assert "MODEL is x with --list" in refused(capsys, "plan", "x", "--list")


@pytest.mark.parametrize("name", OPAQUE)
def test_of_some_models_the_context_alone_is_public(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    known = OPAQUE[name]
    out = said(capsys, "plan", name, "--context", "128K")
    assert f"a context of {known.context:,} tokens ({known.source})" in out
    assert out.rstrip().endswith("are not public, so nothing else can be planned.")
    assert figures(capsys, "plan", name)["opaque"]["context"] == known.context


def test_a_config_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    held = figures(capsys, "plan", str(tmp_path), "--context", "100", "--device", "cpu")
    assert held["plan"]["cache"]["total"] == 2 * 100 * 2 * 64 * 2
    assert held["plan"]["fits"] is None
    (tmp_path / "config.json").write_text("{}")
    assert "model_type" in refused(capsys, "plan", str(tmp_path), "--context", "100")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "MODEL is missing"),
        (["mistral-7b"], "--context is missing; a number of tokens, or --fit, is allowed"),
        (["mistral-7b", "--context", "0"], "context '0' is no number of tokens"),
        (["mistral-7b", "--context", "-5"], "context '-5' is no number of tokens"),
        (["mistral-7b", "--context", "many"], "context 'many' is no number of tokens"),
        (["mistral-7b", "--context", "1K", "--batch", "0"], "'--batch': 0 is given"),
        (["mistral-7b", "--context", "1K", "--devices", "0"], "'--devices': 0 is given"),
        (["mistral-7b", "--context", "1K", "--memory", "80 bananas"], "memory '80 bananas' is no"),
        (["mistral-7b", "--context", "1K", "--policy", "all"], "policy 'all' is not known"),
        (["mistral-7b", "--context", "1K", "--policy", "sinks:4+window:5000"], "up to 5004"),
        (["mistral-7b", "--context", "1K", "--storage", "int3"], "storage 'int3' is not known"),
        (["mistral-7b", "--context", "1K", "--budget", "64"], "--budget is 64 without --compare"),
        (["mistral-7b", "--context", "1K", "--compare", "--budget", "3"], "'--budget': 3 is given"),
        (["mistral-8b", "--context", "1K"], "model 'mistral-8b' is not known"),
        (["mistral-7b", "--context", "1K", "--json", "/no/such/place"], "there is no folder"),
        (["mistral-7b", "--fit", "--device", "cpu"], "memory of cpu isn't known"),
    ],
    ids=str,
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert sentence in refused(capsys, "plan", *arguments)


def test_a_calibrated_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    given = ["plan", "bundled", "--context", "1K", "--device"]
    assert "`attnspan bench --calibrate` makes it" in refused(capsys, *given, "calibrated")
    device = {
        "name": "mine",
        "source": "measured",
        "forward_flop_per_s": 1e11,
        "linear_flop_per_s": 2e11,
        "memory_bytes": 2**33,
        "memory_bytes_per_s": 1e10,
    }
    file = tmp_path / "attnspan" / "rates.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"format": RATES, "meta": {}, "rates": {}, "device": device}))
    for name in ("calibrated", str(file)):
        held = figures(capsys, *given, name)["plan"]
        assert held["device"]["name"] == "mine"
        assert held["memory"] == 2**33
        step = held["decode"]
        assert step["seconds"] == pytest.approx(step["bytes"] / 1e10)
        assert step["ridge"] == 20
    # A machine that `attnspan ring check --json` measured.
    link = {"latency_s": 1e-3, "bandwidth_bytes_per_s": 1e9}
    check = {"machine": {"format": "attnspan-machine-1", "link": link, "device": device}}
    other = tmp_path / "check.json"
    other.write_text(json.dumps(check))
    assert figures(capsys, *given, str(other))["plan"]["device"]["name"] == "mine"
    for wrong, sentence in (
        ("[", "it is no JSON"),
        (json.dumps({"meta": {}, "rates": {}}), "by an earlier attnspan"),
        (json.dumps({"format": RATES}), "device is None; an object is allowed"),
        (
            json.dumps({"format": RATES, "device": {"forward_flop_per_s": 1e9}}),
            "memory_bytes_per_s is None",
        ),
        (
            json.dumps({"format": RATES, "device": {**device, "forward_flop_per_s": -1}}),
            "forward_flop_per_s is -1",
        ),
    ):
        file.write_text(wrong)
        assert sentence in refused(capsys, *given, "calibrated")


def test_the_article(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = said(capsys, "article")
    assert out.count("   WRONG: ") == sum(each.verdict == "wrong" for each in claims())
    file = tmp_path / "article.json"
    said(capsys, "article", "--json", str(file))
    held = json.loads(file.read_text())["claims"]
    assert [each["claim"] for each in held] == [each.claim for each in claims()]
    assert said(capsys, "article", "--markdown").startswith("| | claim | verdict |")


def fresh(*arguments: str) -> set[str]:
    """The modules that a command loads in an interpreter of its own."""
    code = (
        "import sys; from attnspan.cli import main; code = main(sys.argv[1:]); "
        "print('\\n', *sys.modules, sep=' '); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize(
    ("arguments", "numpy"),
    [
        (["plan", "mistral-7b", "--context", "128K", "--compare", "--explain"], False),
        (["plan", "llama-3-8b", "--context", "1M", "--fit", "--storage", "int8"], False),
        (["plan", "--list"], False),
        (["plan", "llama-3-8b", "--context", "128K", "--devices", "8"], True),
        (["plan", "llama-3-8b", "--context", "8K", "--pattern", "Strided(64, 64)"], True),
        (["article"], True),
    ],
    ids=str,
)
def test_a_fresh_process_loads_nothing_heavy(arguments: list[str], numpy: bool) -> None:
    loaded = fresh(*arguments)
    assert "attnspan" in loaded
    assert not loaded & HEAVY
    assert ("numpy" in loaded) is numpy


def test_an_answer_costs_little_beside_a_bare_interpreter() -> None:
    """Processor time, which a loaded machine stretches least, and no absolute bound."""

    def median(*command: str) -> float:
        times = []
        for _ in range(7):
            start = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=60)
            end = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
        return statistics.median(times)

    bare = median("-c", "import click, dataclasses, inspect, json, re, textwrap")
    assert median("-m", "attnspan", "plan", "mistral-7b", "--context", "128K") < 4 * bare


def test_the_document_shows_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    text = DOCS.read_text(encoding="utf-8")
    shown = re.findall(r"^```\n\$ attnspan (.+?)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(shown) == 2
    for line, output in shown:
        command, _, tail = line.partition(" | tail -")
        lines = said(capsys, *command.split()).rstrip().splitlines()
        assert lines[-int(tail or len(lines)) :] == output.rstrip().splitlines()
