"""What the page is given, and the files that ship."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import attnspan.explorer
from attnspan.explorer.page import page
from attnspan.patterns import parse
from attnspan.planner.links import DEVICES
from attnspan.planner.presets import MODELS, model

STATIC = Path(attnspan.explorer.__file__).parent / "static"
WEB = Path(__file__).parent.parent.parent / "web"


def test_the_page_is_json_and_has_every_preset_and_device() -> None:
    found = json.loads(json.dumps(page()))
    assert [each["name"] for each in found["presets"]] == list(MODELS)
    assert [each["name"] for each in found["devices"]] == list(DEVICES)
    assert found["presets"][1]["parameters"] == model(MODELS[1]).parameters
    assert found["recordings"] == []


def test_every_named_pattern_has_an_example_that_reads_back() -> None:
    examples = [each["example"] for each in page()["patterns"]]
    assert [str(parse(each)) for each in examples] == examples
    named = "Causal Full SlidingWindow Sinks Strided Blockwise GlobalTokens Longformer Documents"
    for name in named.split():
        assert any(f"{name}(" in each for each in examples), name


def test_the_page_loads_no_torch() -> None:
    code = (
        "import sys; from attnspan.explorer.page import page; page(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_measured_reach_is_what_the_doctors_files_say() -> None:
    made = runpy.run_path(str(WEB / "measured.py"))["measured"]()
    assert page()["measured"] == made
    windowed = made["reach"][0]
    assert windowed["bound"] == sum(window - 1 for window in windowed["windows"])


def test_the_built_files_are_those_of_the_sources() -> None:
    """`make web` writes what it built from; whoever changes the sources has to build again."""
    files = [path for path in (WEB / "src").rglob("*") if path.is_file()]
    files += [WEB / name for name in ("index.html", "package-lock.json", "vite.config.ts")]
    found = hashlib.sha256()
    for name, path in sorted((path.relative_to(WEB).as_posix(), path) for path in files):
        found.update(f"{name}\0".encode() + path.read_bytes())
    built = (STATIC / "sources.txt").read_text().strip()
    assert found.hexdigest() == built, "web/ has changed since `make web` was run"


def test_the_built_files_are_small_and_ask_for_nothing_from_elsewhere() -> None:
    script, style = ((STATIC / name).read_text(encoding="utf-8") for name in ("app.js", "app.css"))
    assert len(script) + len(style) < 300_000
    assert not re.findall(r"url\((?!data:)", style)
    assert "@import" not in style
    assert "eval(" not in script
    assert "new Function" not in script
    html = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!\./|data:)', html)
    assert "<script>" not in html


@pytest.mark.parametrize("name", ["index.html", "app.js", "app.css", "FONTS.txt"])
def test_the_files_are_there(name: str) -> None:
    assert (STATIC / name).stat().st_size > 0
