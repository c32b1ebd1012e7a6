"""The documentation: what is made from the code is current, all pages are reachable and local."""

import importlib.util
import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

from attnspan.cli import app
from attnspan.patterns.text import NAMED
from attnspan.policies.spec import FORMS, parse

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_command_is_documented(generate: ModuleType) -> None:
    page = generate.commands()
    assert page == (DOCS / "commands.md").read_text(encoding="utf-8")
    for name in app.commands:
        assert f"\n## attnspan {name}\n" in page


def test_galleries_are_current_and_whole(generate: ModuleType) -> None:
    for name in ("pattern_gallery", "policy_gallery"):
        file = DOCS / f"{name.replace('_', '-')}.md"
        assert getattr(generate, name)() == file.read_text(encoding="utf-8")
    texts = " ".join(each.small for each in generate.PATTERNS)
    assert {name for name in NAMED if name in texts} == set(NAMED)
    drawn = {type(parse(each.small)) for each in generate.POLICIES}
    assert {type(parse(form)) for form in FORMS if "SPEC" not in form} <= drawn
    page = (DOCS / "policy-gallery.md").read_text(encoding="utf-8")
    assert all(form in page for form in FORMS if "SPEC" in form)


def test_pictures_are_there(generate: ModuleType) -> None:
    for each in generate.PATTERNS:
        assert (DOCS / "images" / "patterns" / f"{generate._slug(each)}.svg").exists()
    for each in generate.POLICIES:
        assert (DOCS / "images" / "policies" / f"{generate._slug(each)}.svg").exists()


def test_every_page_is_in_the_navigation() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    entries = re.findall(r"^([a-z*-]+)$", index, re.MULTILINE)
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert {page for page in pages if any(fnmatch(page, entry) for entry in entries)} == pages


def test_links_lead_somewhere() -> None:
    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md"]
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            file = (page.parent / path) if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor and file.suffix == ".md":
                heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in heads}
                assert anchor in slugs, f"{page.name}: {target}"


def test_nothing_is_fetched_to_view_it() -> None:
    built = DOCS / "_build"
    if not (built / "index.html").exists():
        pytest.skip("the documentation isn't built (make docs)")
    remote = re.compile(
        r"""<(?:script|img|iframe)[^>]+src=["'](?:https?:)?//|<link[^>]+rel=["']stylesheet["'][^>]+"""
        r"""href=["'](?:https?:)?//|url\(["']?(?:https?:)?//|@import"""
    )
    for path in [*built.rglob("*.html"), *built.rglob("*.css")]:
        found = remote.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.name}: {found}"
