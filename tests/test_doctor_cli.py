"""`attnspan doctor`: what it prints and writes, its exit codes, its one sentence on bad input."""

import io
import json
import shutil
import subprocess
import sys

import pytest
from tiny import tiny, tiny_llama

from attnspan.cli import main
from attnspan.models import bundled

TEXT = "def window(keys, size):\n    return keys[-size:]\n\n" * 12
DOCTOR = ["doctor", "model", "--text", "text.txt", "--limit", "512", "--length", "64"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model, one with windows that its family drops from the config, and a text."""
    folder = tmp_path_factory.mktemp("doctor")
    models = {
        "model": tiny_llama(vocab_size=264, bos_token_id=256, eos_token_id=257),
        "sliding": tiny(
            "qwen2",
            vocab_size=264,
            max_position_embeddings=64,
            use_sliding_window=False,
            sliding_window=16,
        ),
        "short": tiny_llama(vocab_size=264, max_position_embeddings=32),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bundled.path() / file, folder / name)
    path = folder / "sliding" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "sliding_window": 16}))
    (folder / "text.txt").write_text(TEXT)
    (folder / "little.txt").write_text(TEXT[:100])
    (folder / "latin.txt").write_bytes(b"caf\xe9" * 99)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def new(folder, made):
    return sorted({path.name for path in folder.iterdir()} - {path.name for path in made.iterdir()})


def test_report_json_and_picture(here, made, capsys):
    assert main([*DOCTOR, "--json", "out.json", "--plot", "out.png"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    result = json.loads((here / "out.json").read_text())
    assert result["meta"]["command"] == "doctor"
    assert result["meta"]["scored"] == [512]
    assert result.keys() == {
        "meta",
        "config",
        "heads",
        "reach",
        "windows",
        "layers",
        "suggestion",
        "tested",
        "skipped",
        "verdicts",
    }
    for verdict in result["verdicts"]:
        assert verdict["sentence"] in out
    assert (here / "out.png").read_bytes().startswith(b"\x89PNG")
    assert new(here, made) == ["out.json", "out.png"]


def test_json_alone_and_standard_input(here, capsys, monkeypatch):
    results = []
    for name in ("text.txt", "-"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
        command = [name if word == "text.txt" else word for word in DOCTOR]
        assert main([*command, "--json", "-"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[1]["meta"]["text"] == "standard input"
    assert results[0]["reach"] == results[1]["reach"]
    assert results[0]["heads"] == results[1]["heads"]


def test_a_config_is_read_as_it_was_written(here, capsys):
    """The family drops a window that it doesn't use; the file has it still."""
    assert main([word.replace("model", "sliding") for word in DOCTOR]) == 0
    out = capsys.readouterr().out
    assert "sliding_window is 16 in the config, but no layer uses it" in out
    assert "use_sliding_window is false" in out


BAD = {
    "no model": (["doctor"], "Missing argument"),
    "no such model": (["doctor", "none"], "model none: there is no such folder"),
    "no such text": ([*DOCTOR, "--text", "none"], "text none: No such file or directory"),
    "text is a folder": ([*DOCTOR, "--text", "model"], "text model: Is a directory"),
    "short text": (
        [*DOCTOR, "--text", "little.txt"],
        "text little.txt: it has 101 tokens; 576 or more are needed",
    ),
    "text in another code": ([*DOCTOR, "--text", "latin.txt"], "byte 3 is not valid UTF-8"),
    "limit": ([*DOCTOR, "--limit", "5"], "limit is 5; a whole number of at least 512 is allowed"),
    "limit in words": ([*DOCTOR, "--limit", "x"], "Invalid value for '--limit'"),
    "length": ([*DOCTOR, "--length", "65"], "length is 65; the model was trained for 64 tokens"),
    "trained for too little": (["doctor", "short"], "length is 32; a whole number of at least 64"),
    "json to a folder": ([*DOCTOR, "--json", "model"], "it is a folder"),
    "plot of no kind": ([*DOCTOR, "--plot", "out.jpg"], "ends in .png, .svg, .pdf"),
    "device": ([*DOCTOR, "--device", "tpu"], "device 'tpu' can't be used here"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_2(here, made, capfd, case):
    arguments, expected = BAD[case]
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("attnspan: ")
    assert err.count("\n") == 1
    assert expected in err
    assert new(here, made) == []


def test_help_loads_no_torch():
    program = (
        "import sys\n"
        "from attnspan.cli import main\n"
        "assert main(['doctor', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--length" in result.stdout
