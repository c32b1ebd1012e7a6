"""The held-out texts: enough of them, in a stable order, and truly held out."""

import re
import sysconfig
from pathlib import Path

import pytest

from attnspan.evaluation import texts
from training.corpus import HELD_OUT, is_held_out
from training.english import HEADER, NEVER_HELD_OUT, PUBLIC_DOMAIN


def test_python_is_long_the_same_each_time_and_what_training_leaves_out() -> None:
    text = texts.python_heldout()
    assert text == texts.python_heldout()
    assert len(text.encode()) >= 100_000
    assert set(texts.PYTHON_PACKAGES) == set(HELD_OUT)
    library = Path(sysconfig.get_path("stdlib"))
    for package in texts.PYTHON_PACKAGES:
        for path in (library / package).rglob("*.py"):
            assert is_held_out(path.relative_to(library))
    assert (library / "asyncio" / "events.py").read_text() in text
    assert (library / "unittest" / "mock.py").read_text() in text


@pytest.mark.parametrize(
    ("path", "held_out"),
    [
        ("asyncio/events.py", True),
        ("setuptools/_vendor/email/header.py", True),
        ("jax/http.py", True),
        ("test/test_email/test_message.py", True),
        ("test/test_unittest.py", True),
        ("json/decoder.py", False),
        ("anyio/_backends/_asyncio.py", False),
        ("aiohttp/client.py", False),
    ],
)
def test_the_rule_goes_by_the_names_in_a_path(path: str, held_out: bool) -> None:
    assert is_held_out(Path(path)) is held_out


def test_without_library_source_python_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="this Python has no source of 'asyncio'"):
        texts.python_heldout()


def test_english_is_proposals_in_the_public_domain() -> None:
    text = texts.english_heldout()
    assert 150_000 <= len(text.encode()) <= 400_000
    starts = [match.start() for match in HEADER.finditer(text)]
    documents = [text[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]
    assert "".join(documents) == text
    assert all(PUBLIC_DOMAIN.search(document) for document in documents)
    numbers = [int(re.findall(r"\d+", document)[0]) for document in documents]
    assert numbers == sorted(numbers)
    assert not NEVER_HELD_OUT & set(numbers)
    # Training's last whole proposal is 3155.
    assert min(numbers) >= 8000
