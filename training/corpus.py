"""The Python: which installed source files are trained on, and which are held out."""

import hashlib
import random
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path, PurePath
from platform import python_version

from training.licences import Owner, owners

HELD_OUT = ("asyncio", "email", "http", "unittest")
FILE_BYTES = 300_000
LONG_LINE = 30
SHARED_LINES = 0.3


@dataclass(frozen=True)
class PythonCorpus:
    """Documents to train on, documents held out, and where the former come from.

    `sources` has a row per distribution: name, version, licence, and the files and bytes trained
    on. `left_out` names the distributions that were left out for their licence.
    """

    trained: list[bytes]
    held_out: list[bytes]
    sources: list[dict[str, str | int]]
    left_out: list[str]


@dataclass(frozen=True)
class Candidate:
    """A file that may be trained on."""

    path: Path
    owner: Owner


def is_held_out(path: PurePath) -> bool:
    """Whether training must never see `path`, given relative to the folder that is searched.

    >>> is_held_out(PurePath("asyncio/events.py")), is_held_out(PurePath("test/test_email/x.py"))
    (True, True)
    >>> is_held_out(PurePath("anyio/_backends/_asyncio.py"))
    False
    """
    names = [part.removesuffix(".py") for part in path.parts]
    tests = [f"test_{package}" for package in HELD_OUT]
    return any(name in HELD_OUT or any(test in name for test in tests) for name in names)


def find(roots: list[Path]) -> tuple[list[Candidate], list[Path]]:
    """Files to train on, permissively licensed, and held-out files of the standard library.

    A root with an `os.py` is taken for a standard library; any other file must be listed by a
    distribution under its root, or its licence is unknown and it is left out.
    """
    candidates: dict[Path, Candidate] = {}
    held_out: list[Path] = []
    for root in roots:
        is_library = (root / "os.py").exists()
        standard = Owner("Python", python_version(), "PSF-2.0") if is_library else None
        listed = owners(root)
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            installed = {"site-packages", "dist-packages"} & set(relative.parts)
            owner = standard if standard and not installed else listed.get(path.resolve())
            if is_held_out(relative):
                if owner is standard and relative.parts[0] in HELD_OUT:
                    held_out.append(path)
            elif owner:
                candidates[path.resolve()] = Candidate(path.resolve(), owner)
    return sorted(candidates.values(), key=lambda c: c.path), sorted(held_out)


def read_document(path: Path) -> bytes | None:
    """The file's first 300,000 bytes, or None where it isn't source that people wrote.

    Left out: files under 400 bytes, with NUL bytes, with lines of over 120 bytes on average, with
    over 18 % digits (tables), or not UTF-8.
    """
    with path.open("rb") as file:
        document = file.read(FILE_BYTES)
    if len(document) == FILE_BYTES:
        document = document[: document.rfind(b"\n") + 1]
    if len(document) < 400 or b"\0" in document:
        return None
    if len(document) > 120 * (document.count(b"\n") + 1):
        return None
    head = document[:50_000]
    if sum(head.count(digit) for digit in b"0123456789") > 0.18 * len(head):
        return None
    try:
        document.decode()
    except UnicodeDecodeError:
        return None
    return document.replace(b"\r\n", b"\n")


def long_lines(document: bytes) -> set[bytes]:
    """Its distinct lines of 30 bytes or more, without indentation."""
    lines = {line.strip() for line in document.split(b"\n")}
    return {line for line in lines if len(line) >= LONG_LINE}


def repeats(document: bytes, known: set[bytes]) -> bool:
    """Whether over 30 % of a document's long lines are among the `known` ones."""
    lines = long_lines(document)
    return len(lines & known) > SHARED_LINES * len(lines)


def read_new(path: Path, known: set[bytes]) -> bytes | None:
    """`read_document`, and None too for a near copy of held-out source."""
    document = read_document(path)
    return None if document is None or repeats(document, known) else document


def build(roots: list[Path], processes: int, limit: int | None = None) -> PythonCorpus:
    """The corpus of the Python files under `roots`, in a fixed random order, each text once.

    `limit` keeps that many files at most.
    """
    candidates, held_out_paths = find(roots)
    held_out = [doc for path in held_out_paths if (doc := read_document(path)) is not None]
    known = set[bytes]().union(*map(long_lines, held_out))
    usable = [candidate for candidate in candidates if candidate.owner.permissive]
    random.Random(1).shuffle(usable)
    usable = usable[:limit]
    with Pool(processes) as pool:
        read = partial(read_new, known=known)
        documents = pool.map(read, [candidate.path for candidate in usable], chunksize=256)

    trained: dict[bytes, bytes] = {}
    files: Counter[Owner] = Counter()
    size: Counter[Owner] = Counter()
    for candidate, document in zip(usable, documents, strict=True):
        if document is None:
            continue
        digest = hashlib.sha256(document).digest()
        if digest not in trained:
            trained[digest] = document
            files[candidate.owner] += 1
            size[candidate.owner] += len(document)
    sources = [
        asdict(owner) | {"files": files[owner], "bytes": size[owner]}
        for owner in sorted(files, key=lambda owner: owner.name.lower())
    ]
    restricted = {c.owner for c in candidates if not c.owner.permissive}
    left_out = sorted(f"{owner.name} ({owner.licence})" for owner in restricted)
    return PythonCorpus(list(trained.values()), held_out, sources, left_out)
