"""Text that the bundled model never saw in training: Python's own source, and English."""

import lzma
import sysconfig
from importlib.resources import files
from pathlib import Path

PYTHON_PACKAGES = ("asyncio", "email", "http", "unittest")


def python_heldout() -> str:
    """Source of asyncio, email, http and unittest from the running interpreter, about 1.3 MB.

    Training left out every file whose path names one of these packages or their tests, in the
    standard library and in installed packages alike (`is_held_out` in `training/corpus.py`), and
    every other file that shares more than 30 % of its long lines with them. Files come in
    alphabetical order, package by package, without the packages' own tests; the text differs a
    little from one Python release to the next.

    Raises FileNotFoundError where the interpreter has no library source on disk.
    """
    library = Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    for package in PYTHON_PACKAGES:
        folder = library / package
        paths = [p for p in folder.rglob("*.py") if "test" not in p.relative_to(folder).parts]
        if not paths:
            raise FileNotFoundError(f"this Python has no source of {package!r} in {folder}")
        texts += [path.read_text(encoding="utf-8") for path in sorted(paths)]
    return "".join(texts)


def english_heldout() -> str:
    """Seventeen Python enhancement proposals on governance and elections, 238 kB of English.

    PEPs 8000 to 8015 and 8100 to 8107, each of which says that it is in the public domain or
    under CC0. Training ended before the last 400,000 bytes of its file of proposals, and these are
    the ones that lie in them whole (`split_english` in `training/english.py`), less PEP 3333, whose
    first edition was trained on, and PEP 8016, which quotes text under another licence.
    """
    packed = (files("attnspan.evaluation.texts") / "english.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("utf-8")
