"""`attnspan figure`: files, exit codes, sentences, what isn't loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from attnspan.cli import main
from attnspan.explorer.figures import FIGURES
from attnspan.figure_cli import figure

GIVEN = {
    "memory": ["--preset", "gemma-3-4b", "--context", "32K", "--window", "2048", "--log"],
    "pattern": ["SlidingWindow(4) | Sinks(1)", "--tokens", "16"],
    "policy": ["heavy:3+window:4,block=1", "--tokens", "16"],
    "reach": ["--window", "64", "--layers", "3"],
    "ring": ["--context", "8K", "--devices", "4", "--layout", "zigzag, contiguous"],
    "stack": ["--context", "32K", "--policy", "window:1024", "--storage", "int4"],
}


def test_the_list_is_of_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure", "--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(FIGURES) == list(GIVEN)
    assert set(figure.commands) == set(FIGURES)


@pytest.mark.parametrize(("name", "given"), GIVEN.items())
def test_each_is_written_by_its_ending(
    name: str, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ending, start in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("PDF", b"%PDF")):
        out = tmp_path / f"f.{ending}"
        assert main(["figure", name, *given, "--width", "3.4", "--out", str(out)]) == 0
        assert out.read_bytes().startswith(start)
        assert capsys.readouterr().out == f"{out}\n"
    assert len(list(tmp_path.iterdir())) == 3  # nothing temporary is left


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["pattern", "Causal()", "--out", "f.gif"], "ends in .png, .svg, .pdf"),
        (["pattern", "Causal()", "--out", "no/such/f.svg"], "there is no folder"),
        (["pattern", "Sideways(3)", "--out", "f.svg"], "Sideways(3)"),
        (["pattern", "Causal()", "--tokens", "0", "--out", "f.svg"], "0 is given"),
        (["pattern", "Causal()", "--width", "1", "--out", "f.svg"], "width is 1; 2 to 40"),
        (["pattern", "Causal()"], "--out"),
        (["policy", "window", "--out", "f.svg"], "policy 'window'"),
        (["policy", "layers(window:2; window:3)", "--out", "f.svg"], "several layers"),
        (["policy", "window:2", "--tokens", "513", "--out", "f.svg"], "tokens is 513"),
        (["memory", "--context", "lots", "--out", "f.svg"], "context 'lots'"),
        (["memory", "--storage", "int5", "--out", "f.svg"], "int5"),
        (["memory", "--device", "toaster", "--out", "f.svg"], "toaster"),
        (["reach", "--out", "f.svg"], "preset is missing"),
        (["reach", "--preset", "mistral-7b", "--measured", "none", "--out", "f.svg"], "none"),
        (["ring", "--layout", "spiral", "--out", "f.svg"], "layout 'spiral'"),
        (["stack", "--policy", "tiny", "--out", "f.svg"], "policy 'tiny'"),
        (["tower", "--out", "f.svg"], "tower"),
    ],
)
def test_bad_input_is_one_sentence(
    given: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["figure", *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("attnspan: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["figure", "pattern", "Causal()", "--out", str(tmp_path / "f.svg")]) == 2
    assert "attnspan[plot]" in capsys.readouterr().err


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from attnspan.cli import main; "
        f"assert main(['figure', 'memory', '--out', {str(tmp_path / 'f.svg')!r}]) == 0; "
        "print(sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.splitlines()[-1] == "[]"
