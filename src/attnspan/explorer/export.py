"""The explorer's page as one file, which works from disk without a server or a network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from attnspan.explorer.page import page
from attnspan.explorer.recording import head

STATIC = Path(__file__).with_name("static")

_SCRIPT = '<script type="module" crossorigin src="./app.js"></script>'
_STYLE = '<link rel="stylesheet" crossorigin href="./app.css">'
_CHARSET = '<meta charset="utf-8" />'


def export(file: str | Path, recordings: Mapping[str, Mapping[str, Any]]) -> int:
    """Writes the page with all its data as one file, whole or not at all; its bytes.

    Raises:
        OSError: the file can't be written; what it held before stays.
    """
    from attnspan.evaluation.files import write_file

    data = single(recordings).encode()
    write_file(file, data)
    return len(data)


def single(recordings: Mapping[str, Mapping[str, Any]]) -> str:
    """The page as one HTML text: style, script, fonts and data inside, nothing fetched.

    Its policy lets a browser run these scripts alone, by their hashes, and connect to nothing.
    """
    index, script, style = (
        (STATIC / name).read_text(encoding="utf-8") for name in ("index.html", "app.js", "app.css")
    )
    for part in (_SCRIPT, _STYLE, _CHARSET):
        if index.count(part) != 1:
            raise RuntimeError(f"the built page has no {part}; `make web` builds one that has")
    if "</style" in style.lower():
        raise RuntimeError("the built style sheet ends its own element; `make web` builds another")
    data = "window.__ATTNSPAN__=" + json.dumps(
        {
            **page(),
            "recordings": [
                {**head(dict(found), name), "whole": found} for name, found in recordings.items()
            ],
        },
        allow_nan=False,
        ensure_ascii=False,
        separators=(",", ":"),
    ).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    # Inside a script's element these two alone would end it or begin a comment of HTML.
    script = script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(data)} {_hash(script)}",
            f"style-src {_hash(style)}",
            "font-src data:",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    guarded = (
        f'{_CHARSET}\n    <meta http-equiv="Content-Security-Policy" content="{escape(policy)}" />'
    )
    index = index.replace(_CHARSET, guarded).replace(_STYLE, f"<style>{style}</style>")
    inside = f"<script>{data}</script>\n    <script>{script}</script>\n  </body>"
    return index.replace(_SCRIPT, "").replace("</body>", inside)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
