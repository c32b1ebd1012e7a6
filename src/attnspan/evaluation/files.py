"""Files of results: JSON, and written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any


def check_file(path: str | Path) -> None:
    """Refuses a path that `write_file` could not write, before the work that fills it.

    Raises:
        OSError: one sentence says why.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"file {path}: it is a folder; the name of a file is allowed")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"file {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"file {path}: the folder {path.parent} can't be written to")


def write_file(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all: under a temporary name, on the disk, then renamed.

    Raises:
        OSError: the disk is full, say; what the file held before stays.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file():  # a device or a pipe can't be replaced
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # of the file that was asked for
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def to_json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
