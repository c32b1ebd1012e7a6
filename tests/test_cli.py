"""The command line: what it prints and writes, its exit codes, its one sentence on bad input."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny import tiny_llama

import attnspan
from attnspan.cache import snapshot
from attnspan.cli import app, main
from attnspan.evaluation import loop
from attnspan.models import bundled

TEXT = "def window(keys, size):\n    return keys[-size:]\n\n" * 10
KEYS = [
    "policy",
    "storage",
    "tokens",
    "nll",
    "perplexity",
    "bits_per_byte",
    "cache_bytes_peak",
    "tokens_held",
    "tokens_per_second",
    "perplexity_ratio",
]
META = {"command", "model", "text", "versions", "device", "threads", "date", "details"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model and a text in a folder."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_llama(vocab_size=264, bos_token_id=256, eos_token_id=257)
    model.save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.path() / name, folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """An empty working folder with the model and the text in it."""
    for name in ("model", "text.txt"):
        (tmp_path / name).symlink_to(tiny / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


GIVEN = ["--model", "model", "--text", "text.txt", "--chunk", "16"]
STREAM = ["stream", *GIVEN, "--policy", "sinks:4+window:20"]
COMPARE = ["compare", *GIVEN]


def written(folder):
    return sorted({path.name for path in folder.iterdir()} - {"model", "text.txt"})


def test_stream_prints_a_table_and_writes_json_and_plot(here, capsys):
    files = ["--json", "out.json", "--plot", "out.png"]
    assert main([*STREAM, "--limit", "200", "--generate", "9", *files]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "sinks:4+window:20" in out
    assert "goes on with" in out
    assert "\x1b" not in out
    result = json.loads((here / "out.json").read_text())
    assert result.keys() == {"meta", "rows"}
    assert [list(row) for row in result["rows"]] == [KEYS]
    assert result["rows"][0]["tokens"] == 200
    assert result["meta"].keys() >= META
    assert (here / "out.png").read_bytes().startswith(b"\x89PNG")
    assert written(here) == ["out.json", "out.png"]


def test_compare_each_policy_in_each_storage(here, capsys):
    policies = "keep-all, window:24, heavy:8+window:9,block=8, compressive:window=8,memory=4,rate=2"
    command = [*COMPARE, "--policies", policies, "--storage", "dense, int8", "--limit", "150"]
    assert main([*command, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert [list(row) for row in result["rows"]] == [KEYS] * 8
    assert [row["storage"] for row in result["rows"]] == ["dense", "int8"] * 4
    assert [row["tokens"] for row in result["rows"]] == [64] * 2 + [150] * 6
    assert all(row["perplexity_ratio"] > 0 for row in result["rows"])
    assert main([*command, "--storage", "dense"]) == 0
    out, _ = capsys.readouterr()
    assert "* keep-all, dense: stopped after 64 tokens" in out
    assert max(map(len, out.splitlines())) > 120  # piped, nothing is cut


def test_standard_input(here, capsys, monkeypatch):
    command = [word.replace("text.txt", "-") for word in STREAM]
    results = []
    for arguments in (STREAM, command):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
        assert main([*arguments, "--json", "-"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["rows"][0]["nll"] == results[1]["rows"][0]["nll"]
    assert results[1]["meta"]["text"] == "standard input"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert main([*(w.replace("text.txt", "-") for w in COMPARE), "--policies", "window:9"]) == 0


def test_save_and_resume(here, capsys):
    def nll(*more):
        assert main([*STREAM, "--json", "-", *more]) == 0
        return json.loads(capsys.readouterr().out)["rows"][0]["nll"]

    expected = nll()
    nll("--limit", "100", "--save", "saved", "--save-every", "32")
    assert snapshot.exists(here / "saved")
    assert nll("--resume", "saved", "--save", "saved") == expected


def test_rope_reads_further_and_is_in_the_figures(here, capsys):
    command = [*COMPARE, "--policies", "keep-all", "--json", "-"]
    found = []
    for rope in ([], ["--rope", "yarn:2"]):
        assert main([*command, *rope]) == 0
        found.append(json.loads(capsys.readouterr().out))
    plain, stretched = found
    assert (plain["meta"]["rope"], stretched["meta"]["rope"]) == (None, "yarn:2")
    assert stretched["meta"]["model"]["name"] == "model, yarn:2"
    assert (plain["rows"][0]["tokens"], stretched["rows"][0]["tokens"]) == (64, 128)
    assert stretched["rows"][0]["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert main([*STREAM, "--rope", "ntk:2", "--limit", "100", "--save", "saved"]) == 0
    assert main([*STREAM, "--resume", "saved"]) == 2  # other angles than it was saved with
    assert "the state was saved with model" in capsys.readouterr().err


BAD = {
    "no command": (["nonesuch"], "No such command 'nonesuch'"),
    "no text": (["stream", "--policy", "window:4"], "Missing option '--text'"),
    "no policy": (["stream", "--text", "text.txt"], "Missing option '--policy'"),
    "no policies": (["compare", "--text", "text.txt"], "Missing option '--policies'"),
    "unknown option": ([*STREAM, "--nonesuch"], "No such option"),
    "missing text": ([*STREAM, "--text", "none.txt"], "text none.txt: No such file or directory"),
    "text is a folder": ([*STREAM, "--text", "."], "text .: Is a directory"),
    "wrong policy": ([*STREAM, "--policy", "widow:4"], "policy 'widow:4' is not known"),
    "wrong list": ([*COMPARE, "--policies", "window:4, x"], "policy 'x' is not known"),
    "empty list": ([*COMPARE, "--policies", ""], "policy '' is not known"),
    "zero window": ([*STREAM, "--policy", "window:0"], "window is 0"),
    "negative sinks": ([*STREAM, "--policy", "sinks:-1+window:4"], "sinks is -1"),
    "wrong storage": ([*STREAM, "--storage", "int2"], "storage 'int2' is not known"),
    "wrong rope": ([*STREAM, "--rope", "yarn:0.5"], "rope is 'yarn:0.5'; linear, ntk or yarn with"),
    "rope of another kind": ([*STREAM, "--rope", "dynamic:2"], "rope is 'dynamic:2'; linear, ntk"),
    "wrong storages": (
        [*COMPARE, "--policies", "window:4", "--storage", "dense,"],
        "storage '' is not known",
    ),
    "limit 0": ([*STREAM, "--limit", "0"], "'--limit': 0 is given; a whole number of at least 1"),
    "limit -3": (
        [*STREAM, "--limit", "-3"],
        "'--limit': -3 is given; a whole number of at least 1",
    ),
    "limit x": ([*STREAM, "--limit", "x"], "'--limit': x is given; a whole number of at least 1"),
    "chunk 0": ([*STREAM, "--chunk", "0"], "'--chunk': 0 is given; a whole number of at least 1"),
    "save every 0": (
        [*STREAM, "--save-every", "0"],
        "'--save-every': 0 is given; a whole number of at least 1",
    ),
    "generate -1": (
        [*STREAM, "--generate", "-1"],
        "'--generate': -1 is given; a whole number of at least 0",
    ),
    "missing model": ([*STREAM, "--model", "none"], "model none: there is no such folder"),
    "model without config": ([*STREAM, "--model", "."], "there is no config.json in it"),
    "wrong device": ([*STREAM, "--device", "tpu"], "device 'tpu' can't be used here"),
    "device without numbers": ([*STREAM, "--device", "meta"], "device 'meta' holds no numbers"),
    "nothing to resume": ([*STREAM, "--resume", "none"], "there is no snapshot.json in it"),
    "save to a file": ([*STREAM, "--save", "text.txt"], "it is a file"),
    "json to a folder": ([*STREAM, "--json", "model"], "it is a folder"),
    "json to nowhere": ([*STREAM, "--json", "none/out.json"], "there is no folder none"),
    "plot of no kind": ([*STREAM, "--plot", "out.jpg"], "ends in .png, .svg, .pdf"),
    "demo to a file": (["demo", "--out", "text.txt"], "text.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_2(here, capfd, case):
    arguments, expected = BAD[case]
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("attnspan: ")
    assert err.count("\n") == 1
    assert expected in err
    assert written(here) == []


@pytest.mark.parametrize("command", [STREAM, [*COMPARE, "--policies", "window:4"]], ids=["s", "c"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "it has 0 tokens; two or more are needed"),
        (b"x", "it has 1 tokens; two or more are needed"),
        (b"good \xff bad", "byte 5 is not valid UTF-8"),
        (b"x" * 70_000 + b"\xff", "byte 70,000 is not valid UTF-8"),
    ],
)
def test_bad_texts(here, capfd, command, text, expected):
    (here / "bad.txt").write_bytes(text)
    assert main([*command, "--text", "bad.txt", "--chunk", "1024", "--json", "out.json"]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"text bad.txt: {expected}" in err
    assert written(here) == ["bad.txt"]


def test_a_full_disk_while_saving(here, capfd, monkeypatch):
    """ENOSPC at the second snapshot: exit 2, the first one whole, and no other file."""
    calls = iter(range(100))
    real = os.fsync

    def full(descriptor):
        if next(calls) >= 4:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    command = [*STREAM, "--save", "saved", "--save-every", "32", "--json", "out.json"]
    assert main(command) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", "attnspan: No space left on device\n")
    assert written(here) == ["saved"]
    assert len(list((here / "saved").iterdir())) == 2
    assert snapshot.read(here / "saved")[1]["score"]["tokens"] == 32


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_at_the_end(here, capfd):
    assert main([*STREAM, "--limit", "20", "--json", "/dev/full"]) == 2
    assert capfd.readouterr().err == "attnspan: No space left on device\n"


def test_a_saved_stream_is_not_overwritten(here, capfd):
    assert main([*STREAM, "--limit", "40", "--save", "saved"]) == 0
    capfd.readouterr()
    assert main([*STREAM, "--limit", "40", "--save", "saved"]) == 2
    assert "saved holds a snapshot already" in capfd.readouterr().err
    assert main([*STREAM, "--policy", "window:9", "--resume", "saved"]) == 2
    assert "policy" in capfd.readouterr().err


def test_a_broken_model_is_a_failure(here, capfd, monkeypatch):
    monkeypatch.setattr(loop, "token_nll", lambda logits, targets: [float("nan")] * len(targets))
    assert main(STREAM) == 1
    assert capfd.readouterr().err.startswith("attnspan: the nll of token 1 is nan")


def test_without_a_command_and_version(capfd):
    assert main([]) == 2
    out, err = capfd.readouterr()
    assert "Usage: " in out + err
    assert not err.endswith("attnspan: \n")
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"attnspan {attnspan.__version__}\n"


def test_help_loads_no_torch():
    program = (
        "import sys\n"
        "from attnspan.cli import main\n"
        "for command in [], ['stream'], ['compare'], ['demo']:\n"
        "    assert main([*command, '--help']) == 0\n"
        "    assert main(['stream', '--text', 'no such file', '--policy', 'window:4']) == 2\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "SPEC is keep-all" in result.stdout


def test_broken_pipes_are_quiet(here):
    command = [sys.executable, "-m", "attnspan", *STREAM, "--limit", "40"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() in (0, 1)


def test_an_interrupt_is_told(here, capfd, monkeypatch):
    """A real one, in the midst of a stream that would last minutes."""
    (here / "long.txt").write_text(TEXT * 4000)
    command = [*STREAM, "--text", "long.txt", "--save-every", "64", "--save", "saved"]
    process = subprocess.Popen(
        [sys.executable, "-m", "attnspan", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not snapshot.exists(here / "saved"):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate()
    assert printed == ""
    assert errors.split("\n") == ["", "attnspan: interrupted", ""]
    assert process.returncode == 130

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "main", interrupt)  # one that click doesn't see
    assert main(["--version"]) == 130
    assert capfd.readouterr().err == "attnspan: interrupted\n"


def test_killed_and_resumed(here, capsys):
    """kill -9 in the middle of a real process, then on to the figures of an unbroken stream."""
    (here / "long.txt").write_text(TEXT * 100)
    command = [*STREAM, "--text", "long.txt", "--limit", "1500", "--save-every", "64"]
    process = subprocess.Popen(
        [sys.executable, "-m", "attnspan", *command, "--save", "saved"], stdout=subprocess.DEVNULL
    )
    while not snapshot.exists(here / "saved"):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < snapshot.read(here / "saved")[1]["score"]["tokens"] < 1500
    rows = []
    for more in ([], ["--resume", "saved"]):
        assert main([*command, "--json", "-", *more]) == 0
        rows.append(json.loads(capsys.readouterr().out)["rows"][0])
        del rows[-1]["tokens_per_second"]
    assert rows[0] == rows[1]


def test_demo_on_a_little_text(here, capsys):
    """The bundled model under every policy: the demo in small."""
    assert main(["demo", "--out", "shown", "--limit", "300"]) == 0
    out, _ = capsys.readouterr()
    assert "goes on with" in out
    result = json.loads((here / "shown" / "demo.json").read_text())
    assert [(row["policy"].partition(":")[0], row["storage"]) for row in result["rows"]] == [
        ("keep-all", "dense"),
        ("window", "dense"),
        ("sinks", "dense"),
        ("heavy", "dense"),
        ("compressive", "dense"),
        ("sinks", "int8"),
    ]
    assert {row["tokens"] for row in result["rows"]} == {300}
    # A byte of Python costs this model well under the 8 bits of knowing nothing.
    assert all(row["bits_per_byte"] < 3 for row in result["rows"])
    assert sorted(path.name for path in (here / "shown").iterdir()) == ["demo.json", "demo.png"]


def test_graphs_are_refused_where_nothing_would_be_replayed(tmp_path, capsys) -> None:
    text = tmp_path / "t.txt"
    text.write_text("some text")
    options = [
        "stream",
        "--text",
        str(text),
        "--policy",
        "window:16",
        "--graphs",
        "--device",
        "cpu",
    ]
    assert main(options) == 2
    assert "CUDA graphs need a CUDA device" in capsys.readouterr().err
