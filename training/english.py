"""The English: Python's enhancement proposals, split into what is trained on and what is not.

    python -m training.english PEPS OUT.xz

writes the held-out proposals, which the package ships as `attnspan.evaluation.texts`.
"""

import lzma
import re
import sys
from pathlib import Path

HELD_OUT_BYTES = 400_000
# 333, the first edition of 3333, is trained on; 8016 has text under Django's licence.
NEVER_HELD_OUT = {3333, 8016}
HEADER = re.compile(r"^PEP: *(\d+)$", re.MULTILINE)
PUBLIC_DOMAIN = re.compile(r"public\s+domain|CC0", re.IGNORECASE)


def read_text(path: Path) -> str:
    """A UTF-8 text file, plain or `.xz`."""
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return data.decode()


def split_english(text: str) -> tuple[list[str], list[str]]:
    """`text` as documents to train on, and documents that training never sees.

    `text` is proposals one after the other, each beginning with a line `PEP: number`. The last
    400,000 bytes are held out. A proposal across that border is in neither list, and so is one
    that doesn't say that it is in the public domain or under CC0. Text without such headers is one
    document, cut at the border.
    """
    data = text.encode()
    border = len(data[: max(0, len(data) - HELD_OUT_BYTES)].decode(errors="ignore"))
    starts = [match.start() for match in HEADER.finditer(text)]
    if not starts:
        return [text[:border]], [text[border:]]
    trained, held_out = [], []
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        document = text[start:end]
        if not PUBLIC_DOMAIN.search(document):
            continue
        if end <= border:
            trained.append(document)
        elif start >= border and pep_number(document) not in NEVER_HELD_OUT:
            held_out.append(document)
    return trained, held_out


def pep_number(document: str) -> int:
    """The number in a proposal's first line."""
    match = HEADER.match(document)
    if match is None:
        raise ValueError(f"a proposal begins with 'PEP: number', not with {document[:20]!r}")
    return int(match.group(1))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m training.english PEPS OUT.xz")
    held_out = split_english(read_text(Path(sys.argv[1])))[1]
    packed = lzma.compress("".join(held_out).encode(), preset=9 | lzma.PRESET_EXTREME)
    Path(sys.argv[2]).write_bytes(packed)
    print([pep_number(document) for document in held_out], len(packed), "bytes")
