"""What a recording of streams is: JSON whose arrays are deflated and in base64.

A recording holds one text and, for each of its runs (a policy and a storage), what became of every
token. Tokens are bytes. Position 0 is BOS, and position `p > 0` byte `p - 1` of the text; the query
at position `p` predicts byte `p`. Arrays are little-endian, deflated without a header
(`deflate-raw` of a browser's DecompressionStream), and written in base64.

A life is told by two numbers a token, each a count of tokens seen and so the position of the first
query that finds it changed: `left`, when it left the cache (0: never), and `pooled`, when it went
into a slot with others (0: never). Query `p` sees the tokens with `i <= p < left[i]`. Policies
decide every `block` tokens, so the arrays hold `left // block - i // block` as uint32.

Surprise is the token's negative log-likelihood in nats, as one byte: its square root in steps of
`sqrt(MOST) / 255`, so that small ones, which are most of them, are told apart.
"""

from __future__ import annotations

import base64
import json
import math
import re
import sys
import zlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FORMAT = "attnspan recording"
VERSION = 1

MOST = 25.0
"""Nats that the largest code stands for; more is written as this much."""

_NOTHING = type(None)
_HEAD: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("title", "text"), (str,)),
    **dict.fromkeys(("tokens", "layer", "head"), (int,)),
    "nll_most": (int, float),
    "meta": (dict,),
    "runs": (list,),
}
_RUN: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("policy", "storage", "nll"), (str,)),
    **dict.fromkeys(("block", "sinks", "heavy", "rate", "slot_bytes", "tokens"), (int,)),
    **dict.fromkeys(("window", "capacity"), (int, _NOTHING)),
    **dict.fromkeys(("left", "pooled"), (str, _NOTHING)),
    "nll_mean": (int, float),
    "looks": (dict,),
    "perplexity": (list,),
}
_LOOKS = ("tokens", "held", "cache_bytes")

SHIPPED = Path(__file__).with_name("recordings")


def pack(data: bytes) -> str:
    """Bytes deflated and in base64.

    >>> unpack(pack(b"attention " * 100)) == b"attention " * 100
    True
    """
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return base64.b64encode(deflate.compress(data) + deflate.flush()).decode("ascii")


def unpack(text: str, most: int = 1 << 22) -> bytes:
    """What `pack` packed, of at most `most` bytes.

    Raises:
        ValueError: it is damaged or longer.
    """
    try:
        inflate = zlib.decompressobj(-15)
        data = inflate.decompress(base64.b64decode(text, validate=True), most)
    except (ValueError, zlib.error):
        raise ValueError("an array of the recording is damaged") from None
    if not inflate.eof or inflate.unused_data:
        raise ValueError("an array of the recording is damaged")
    return data


def nll_codes(nlls: Iterable[float]) -> bytes:
    """Each surprise as a byte.

    >>> list(nll_codes([0.0, 0.01, 1.0, 25.0, 99.0]))
    [0, 5, 51, 255, 255]
    """
    return bytes(min(255, round(255 * math.sqrt(max(0.0, nll) / MOST))) for nll in nlls)


def nlls(codes: bytes) -> list[float]:
    """Nats of each code.

    >>> nlls(bytes([0, 51, 255]))
    [0.0, 1.0, 25.0]
    """
    return [MOST * code * code / 65025 for code in codes]


def pack_lives(when: Sequence[int], block: int) -> str:
    """Counts of tokens seen, multiples of `block` above each token's own position, or 0."""
    codes = array("I", (t // block - i // block if t else 0 for i, t in enumerate(when)))
    return pack(_little(codes).tobytes())


def unpack_lives(text: str, block: int) -> list[int]:
    """What `pack_lives` packed.

    >>> unpack_lives(pack_lives([0, 64, 128], 64), 64)
    [0, 64, 128]
    """
    codes = array("I")
    codes.frombytes(unpack(text))
    return [(code + i // block) * block if code else 0 for i, code in enumerate(_little(codes))]


def _little(codes: array[int]) -> array[int]:
    if sys.byteorder == "big":
        codes.byteswap()
    return codes


def shipped() -> dict[str, Path]:
    """The recordings that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}


def read(path: Path) -> dict[str, Any]:
    """A recording from its file.

    Raises:
        ValueError: it can't be read or is no recording; one sentence says why.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"recording {path}: {error.strerror}; a file of `attnspan explore --record` is allowed"
        ) from None
    except (ValueError, RecursionError):
        raise ValueError(f"recording {path}: it is not JSON") from None
    check(found, str(path))
    return found


def gather(given: Iterable[Path] = ()) -> dict[str, dict[str, Any]]:
    """The recordings of the package, and those of some files, by names that an address can hold.

    Raises:
        ValueError: a file can't be read or is no recording.
    """
    held = {name: read(path) for name, path in shipped().items()}
    for path in given:
        name = re.sub(r"[^a-z0-9-]+", "-", path.stem.lower()).strip("-") or "recording"
        while name in held:
            name += "-2"
        held[name] = read(path)
    return held


def check(found: Any, name: str) -> None:
    """Holds a recording's shape and arrays against its counts.

    Raises:
        ValueError: one sentence names it and what is wrong.
    """
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"recording {name}: it is no recording of attnspan")
    if found.get("version") != VERSION:
        raise ValueError(
            f"recording {name}: its version is {found.get('version')!r}; {VERSION} is allowed"
        )
    runs = _has(found, _HEAD) and found["runs"]
    if not runs or not all(_has(run, _RUN) for run in runs):
        raise ValueError(f"recording {name}: it is not whole")
    if not all(_fits(run, found["tokens"]) for run in runs):
        raise ValueError(f"recording {name}: its arrays don't fit its counts")
    if len(unpack(found["text"])) != found["tokens"]:
        raise ValueError(f"recording {name}: its text doesn't fit its count of tokens")
    try:
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:  # half of a surrogate pair, or a number that isn't finite
        raise ValueError(f"recording {name}: it holds what no page can be given") from None


def _has(found: Any, kinds: dict[str, tuple[type, ...]]) -> bool:
    """Whether it has all of the keys, each of its kind; a count is no truth value."""
    return isinstance(found, dict) and all(
        key in found and isinstance(found[key], kind) and not isinstance(found[key], bool)
        for key, kind in kinds.items()
    )


def _fits(run: dict[str, Any], tokens: int) -> bool:
    """Whether a run's arrays are as long as its counts say."""
    looks = [run["looks"].get(name) for name in _LOOKS] + [run["perplexity"]]
    lengths = {len(unpack(run["nll"]))}
    lengths |= {len(unpack(run[name])) / 4 for name in ("left", "pooled") if run[name]}
    return (
        lengths == {run["tokens"]}
        and 0 < run["tokens"] <= tokens
        and min(run["block"], run["rate"]) > 0
        and all(isinstance(look, list) for look in looks)
        and len({len(look) for look in looks}) == 1
    )


def head(found: dict[str, Any], name: str) -> dict[str, Any]:
    """What a page is told of a recording before it asks for the whole."""
    runs = [{key: run[key] for key in ("policy", "storage", "tokens")} for run in found["runs"]]
    keys = ("title", "tokens", "layer", "head", "meta")
    return {"name": name, **{key: found[key] for key in keys}, "runs": runs}
