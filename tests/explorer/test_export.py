"""The page as one file: whole, small, held by its own policy, and needing nothing else."""

import base64
import hashlib
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from attnspan.cli import main
from attnspan.explorer import export, recording
from attnspan.explorer.page import page

MOST = 5_000_000


class Parts(HTMLParser):
    """The elements of a page, their attributes, and what stands in scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", {}))

    def handle_data(self, data: str) -> None:
        last = self.tags[-1][0] if self.tags else ""
        if last in self.inside:
            self.inside[last][-1] += data


@pytest.fixture(scope="module")
def text() -> str:
    return export.single(recording.gather())


@pytest.fixture(scope="module")
def parts(text: str) -> Parts:
    return Parts(text)


def data(parts: Parts) -> dict[str, Any]:
    script = parts.inside["script"][0]
    start = "window.__ATTNSPAN__="
    assert script.startswith(start)
    return json.loads(script.removeprefix(start))


def test_its_size(text: str) -> None:
    assert len(text.encode()) < MOST


def test_four_policies_at_a_hundred_thousand_tokens_are_in_it(parts: Parts) -> None:
    held = [each["whole"] for each in data(parts)["recordings"]]
    assert held
    assert all(each["tokens"] == 100_000 for each in held)
    assert sum(run["tokens"] == 100_000 for run in held[0]["runs"]) >= 4


def test_its_data_are_the_pages(parts: Parts) -> None:
    found = data(parts)
    held = recording.gather()
    assert [each["whole"] for each in found.pop("recordings")] == list(held.values())
    right = json.loads(json.dumps(page()))
    del right["recordings"]
    assert found == right


def test_it_asks_for_nothing(parts: Parts) -> None:
    for tag, attributes in parts.tags:
        for name in ("src", "href", "action", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:"), (tag, name, value)
    assert all("url(http" not in style for style in parts.inside["style"])
    assert len(parts.inside["script"]) == 2
    assert len(parts.inside["style"]) == 1


def test_its_policy_allows_its_own_scripts_alone(parts: Parts) -> None:
    tags = [a for tag, a in parts.tags if tag == "meta" and "http-equiv" in a]
    assert len(tags) == 1
    content = tags[0]["content"]
    assert content is not None
    policy = dict(part.split(" ", 1) for part in unescape(content).split("; "))
    assert policy["default-src"] == "'none'"
    assert "connect-src" not in policy  # so it is default-src's
    for kind in ("script", "style"):
        right = " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'"
            for each in parts.inside[kind]
        )
        assert policy[f"{kind}-src"] == right
    # The policy stands before all that it governs, and after the encoding alone.
    kinds = [tag for tag, _ in parts.tags]
    assert kinds.index("meta") < kinds.index("style")
    assert [a for tag, a in parts.tags if tag == "meta"][:2] == [{"charset": "utf-8"}, tags[0]]


def test_text_that_would_end_the_script() -> None:
    found = json.loads(json.dumps(recording.gather()["python"]))
    evil = "</script><script>alert(1)</script><!-- \u2028"
    found["title"] = evil
    parts = Parts(export.single({"evil": found}))
    assert len(parts.inside["script"]) == 2
    assert data(parts)["recordings"][0]["whole"]["title"] == evil


def test_a_build_that_has_changed_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("index.html", "app.js", "app.css"):
        (tmp_path / name).write_text((export.STATIC / name).read_text(encoding="utf-8"))
    monkeypatch.setattr(export, "STATIC", tmp_path)
    assert export.single({})
    (tmp_path / "index.html").write_text("<html></html>")
    with pytest.raises(RuntimeError, match="make web"):
        export.single({})


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    file = tmp_path / "page.html"
    file.write_text("what was there")
    assert main(["explore", "--export", str(file)]) == 0
    assert file.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [file]
    assert re.search(r"[\d,]+ bytes", capsys.readouterr().out)


def test_a_file_that_cannot_be_written_stays_as_it_was(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["explore", "--export", str(tmp_path / "no folder" / "page.html")]) == 2
    assert "no folder" in capsys.readouterr().err
    file = tmp_path / "page.html"
    file.write_text("what was there")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["explore", "--export", str(file)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert file.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [file]


def test_it_needs_no_server_package_and_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from attnspan.cli import main\n"
        f"assert main(['explore', '--export', {str(tmp_path / 'page.html')!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'starlette', 'uvicorn'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
