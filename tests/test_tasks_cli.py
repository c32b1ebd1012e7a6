"""`attnspan tasks`: what it prints and writes, its exit codes, its one sentence on bad input."""

import json
import shutil

import pytest
from tiny import tiny_llama

from attnspan.cli import main
from attnspan.models import bundled

TASKS = ["tasks", "--policies", "window:64, sinks:4+window:60", "--tasks", "copy,common-words"]
SMALL = ["--length", "200", "--examples", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "model"
    tiny_llama(vocab_size=264, max_position_embeddings=320).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.path() / file, folder)
    return str(folder)


def test_a_table_and_json(tmp_path, capsys):
    file = tmp_path / "out.json"
    assert main([*TASKS, *SMALL, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    result = json.loads(file.read_text())
    assert result["meta"]["command"] == "tasks"
    assert (result["meta"]["length"], result["meta"]["examples"]) == (200, 3)
    header = next(line for line in out.splitlines() if "chance" in line)
    assert header.split("chance")[1].split() == ["keep-all", "window:64", "sinks:4+window:60"]
    for row in result["rows"]:
        assert row["used"]
        line = next(x for x in out.splitlines() if f"copy, distance {row['distance'][0]} " in x)
        assert f"{row['results'][1]['value']:.2f} (" in line
    assert "No policy is judged by these:\ncommon-words: length is 200" in out
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_nothing_to_judge(model, capsys):
    assert main([*TASKS, "--model", model, "--length", "60", "--storage", "dense,int8"]) == 0
    out, _ = capsys.readouterr()
    assert "chance" not in out
    assert "No policy is judged by these:\ncopy: length is 60" in out


def test_json_alone(model, capsys):
    assert main([*TASKS, *SMALL, "--model", model, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--tasks", "copy,pass"], "task 'pass' is not known; allowed are nll, passkey"),
        (["--policies", "window"], "policy 'window' is not known"),
        (["--length", "321"], "length is 321; at most 320 is allowed"),
        (["--examples", "1"], "a whole number of at least 2 is allowed"),
        (["--storage", "int3"], "int3"),
        (["--json", "nowhere/out.json"], "there is no folder"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(more, sentence, model, capsys):
    assert main([*TASKS, *SMALL, "--model", model, *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("attnspan: ")
    assert err.count("\n") == 1
    assert sentence in err
