"""What a search has measured, in a file: so that it goes on where it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attnspan.evaluation.files import check_file, write_file

FORMAT = "attnspan tune 1"


class State:
    """Values by part of the text and by name, written whole after each one.

    Args:
        file: where to; None: nowhere. One that is there is gone on from.
        identity: what the values depend on, as JSON: the words that a refusal names, and values.

    Raises:
        OSError: it can't be read or written.
        ValueError: it is of another model, text or option, or no such file.
    """

    def __init__(self, file: Path | None, identity: dict[str, Any]) -> None:
        self._file, self._identity = file, identity
        self._values: dict[str, dict[str, Any]] = {}
        if file is None:
            return
        check_file(file)
        if file.exists():
            self._values = _read(file, identity)

    def get(self, part: str, name: str) -> Any:
        """What was measured; None: nothing yet."""
        return self._values.get(part, {}).get(name)

    def put(self, part: str, name: str, value: Any) -> None:
        self._values.setdefault(part, {})[name] = value
        if self._file is not None:
            whole = {"format": FORMAT, "identity": self._identity, "measured": self._values}
            write_file(self._file, json.dumps(whole, allow_nan=False).encode())


def _read(file: Path, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(
            f"state {file}: it is no state of attnspan tune; one of it, or a new name, is allowed"
        )
    theirs, values = found.get("identity"), found.get("measured")
    if not isinstance(theirs, dict) or not isinstance(values, dict):
        raise ValueError(f"state {file}: it isn't whole; a new name is allowed")
    for name, value in identity.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"state {file}: it was measured with another {name}, {_short(theirs.get(name))}; "
                f"{_short(value)} is asked for, so a new name is allowed"
            )
    return values


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
