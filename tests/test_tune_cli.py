"""`attnspan tune`: what it prints runs, its exit codes, going on after a kill, bad input."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny import tiny_llama

from attnspan.cli import main
from attnspan.evaluation.texts import python_heldout
from attnspan.models import bundled
from attnspan.tune_cli import share

SMALL = ["--length", "128", "--passages", "4", "--families", "sinks", "--storage", "dense,int8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, and a text."""
    folder = tmp_path_factory.mktemp("tune")
    model = tiny_llama(vocab_size=264, head_dim=32, max_position_embeddings=128)
    model.save_pretrained(folder / "a model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.path() / file, folder / "a model")
    (folder / "some text.py").write_text(python_heldout()[:5000])
    (folder / "short.py").write_text(python_heldout()[:900])
    return folder


@pytest.fixture
def call(place):
    return [
        *["tune", str(place / "a model"), "--text", str(place / "some text.py")],
        *["--max-loss", "30%", *SMALL],
    ]


def test_what_it_prints_runs(call, place, tmp_path, capsys):
    file = tmp_path / "out.json"
    assert main([*call, "--device", "cpu", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    result = json.loads(file.read_text())
    chosen = result["chosen"]
    assert result["meta"]["command"] == "tune"
    assert f"Chosen: {chosen['policy']} in {chosen['storage']}" in out
    lines = out.splitlines()
    command = lines[lines.index("From a shell:") + 2]
    assert command == chosen["command"]
    script = out[out.index("From Python:") + len("From Python:") :].strip()
    assert script == chosen["python"].strip()
    # The command streams the text under the policy that was chosen, in as many bytes.
    words = shlex.split(command)
    assert words[0] == "attnspan"
    again = tmp_path / "stream.json"
    assert main([*words[1:], "--limit", "300", "--json", str(again)]) == 0
    row = json.loads(again.read_text())["rows"][0]
    assert (row["policy"], row["storage"]) == (chosen["policy"], chosen["storage"])
    assert row["cache_bytes_peak"] == chosen["bytes"]
    capsys.readouterr()
    names = {}
    exec(compile(script, "printed", "exec"), names)
    assert str(names["cache"].policy) == chosen["policy"]
    assert names["cache"].nbytes == chosen["bytes"]
    assert capsys.readouterr().out.startswith("def ")


def test_json_alone_within_a_memory(call, capsys):
    at = call.index("--max-loss")
    wanted = [*call[:at], "--memory", "30KiB", *call[at + 2 :], "--json", "-"]
    assert main(wanted) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["chosen"]["bytes"] <= 30 * 1024
    assert result["meta"]["memory"] == 30 * 1024


def test_nothing_meets_the_demand(call, capsys, monkeypatch):
    from attnspan.evaluation.tune import run

    monkeypatch.setattr(run, "front", lambda candidates, demand: [])
    assert main(call) == 1
    out, _ = capsys.readouterr()
    assert "Nothing meets a loss of 30 %: no cache that was tried does" in out
    assert "From a shell" not in out


def test_killed_and_run_again_it_says_the_same(call, tmp_path, capsys):
    assert main([*call, "--json", "-"]) == 0
    whole = json.loads(capsys.readouterr().out)
    file = tmp_path / "state.json"
    words = [sys.executable, "-m", "attnspan", *call, "--state", str(file)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not file.exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert main([*call, "--json", "-", "--state", str(file)]) == 0
    again = json.loads(capsys.readouterr().out)
    for each in (whole, again):
        del each["meta"]["date"], each["meta"]["threads"]
    assert _rounded(again) == _rounded(whole)


def _rounded(value):
    """Another process may have other threads, and so other last bits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"--max-loss": None}, "--memory and --max-loss: neither is given; one of the two"),
        ({"--memory": "1MiB"}, "--memory and --max-loss: both are given; one of the two"),
        ({"--max-loss": "2"}, "max-loss is '2'; a share above 0 and below 1, such as 2% or 0.02"),
        ({"--max-loss": "much"}, "max-loss is 'much'"),
        ({"--max-loss": None, "--memory": "12"}, "memory '12' is no size"),
        ({"--max-loss": None, "--memory": "1KiB"}, "memory is 1,024 bytes; the smallest cache"),
        ({"--length": "129"}, "length is 129; at most 128 is allowed"),
        ({"--passages": "3"}, "a whole number of at least 4 is allowed"),
        ({"--text": "nowhere"}, "text nowhere: No such file"),
        ({"--text": "short.py"}, "it has 900 tokens; 1,016 or more are needed"),
        ({"--task": "passkeys"}, "task 'passkeys' is not known"),
        ({"--families": "sinks,snaps"}, "family 'snaps' is not known"),
        ({"--storage": "int3"}, "storage 'int3' is not known"),
        ({"--state": "nowhere/state.json"}, "there is no folder nowhere"),
        ({"--json": "nowhere/out.json"}, "there is no folder nowhere"),
        ({"--dtype": "float8"}, "float8"),
    ],
)
def test_bad_input_is_one_sentence(changed, sentence, call, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = dict(zip(call[2::2], call[3::2], strict=True)) | changed
    given = [word for pair in words.items() if pair[1] is not None for word in pair]
    assert main([*call[:2], *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("attnspan: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_shares():
    assert share("2%") == share("0.02") == 0.02
    for wrong in ("0", "100%", "-1%", "nan", "2 percent"):
        with pytest.raises(ValueError, match="a share above 0 and below 1"):
            share(wrong)


def test_stream_runs_in_the_dtype_that_is_asked_for(place, tmp_path, capsys):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        words = ["stream", "--model", str(place / "a model"), "--text", str(place / "some text.py")]
        words += ["--policy", "window:16", "--limit", "40", "--dtype", dtype, "--json", "-"]
        assert main(words) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["meta"]["model"]["dtype"] == dtype
        sizes[dtype] = result["rows"][0]["cache_bytes_peak"]
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    assert os.listdir(tmp_path) == []
