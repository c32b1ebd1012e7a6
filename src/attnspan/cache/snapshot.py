"""Snapshots on disk: tensors as safetensors and the rest as JSON, whole or not at all.

A folder holds one snapshot: `snapshot.json`, and the tensor file that it names with its SHA-256.
Writing puts a new tensor file beside the old one, then renames a new `snapshot.json` over the old
one, and only then removes the old tensors: whatever ends the process, and whenever, the folder
holds the snapshot before or the one after. Nothing is unpickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

FORMAT = "attnspan snapshot"
VERSION = 1
INDEX = "snapshot.json"

_TENSORS = re.compile(r"tensors-[0-9a-f]{16}\.safetensors")
_OURS = re.compile(r"tensors-[0-9a-f]{16}\.safetensors(\.tmp)?|snapshot\.json\.tmp")


def write(folder: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Replaces the folder's snapshot; makes the folder if there is none.

    Tensors may lie on any device, share memory or be views; each is written in full.

    Args:
        folder: only this module's own files in it are touched.
        tensors: by name.
        meta: what JSON can hold; floats come back bit for bit.

    Raises:
        OSError: the disk is full, say. The snapshot before is as it was and nothing is left over.
    """
    folder = Path(folder)
    data = safetensors.save(
        {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
    )
    name = f"tensors-{secrets.token_hex(8)}.safetensors"
    plain = json.loads(json.dumps(meta, allow_nan=False))
    index = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "meta": plain,
        "meta_sha256": _digest(plain),
    }
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder) as descriptor:
            try:
                _put(folder / name, data)
                os.fsync(descriptor)
                _put(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())
            except BaseException:
                # An interrupt may come right after the rename, when the new tensors count already.
                if not _names(folder, name):
                    (folder / name).unlink(missing_ok=True)
                raise
            os.fsync(descriptor)
            _clear(folder, keep=name)
    except BaseException:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise


def read(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The folder's tensors, on the CPU, and its meta.

    Raises:
        FileNotFoundError: there is no snapshot.
        ValueError: it is damaged or cut short, or no snapshot of this library; one sentence.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"snapshot {folder}: there is no {INDEX} in it") from None
    except (ValueError, RecursionError):
        raise ValueError(f"snapshot {folder}: {INDEX} is damaged") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"snapshot {folder}: {INDEX} is no snapshot of attnspan")
    if index.get("version") != VERSION:
        raise ValueError(
            f"snapshot {folder}: its version is {index.get('version')!r}; {VERSION} is allowed"
        )
    name, meta = index.get("tensors"), index.get("meta")
    if (
        not isinstance(name, str)
        or not _TENSORS.fullmatch(name)
        or not isinstance(meta, dict)
        or _digest(meta) != index.get("meta_sha256")
    ):
        raise ValueError(f"snapshot {folder}: {INDEX} is damaged")
    try:
        data = (folder / name).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"snapshot {folder}: its tensor file {name} is missing") from None
    if hashlib.sha256(data).hexdigest() != index.get("sha256"):
        raise ValueError(f"snapshot {folder}: its tensor file {name} is damaged")
    try:
        return safetensors.load(data), meta
    except (SafetensorError, ValueError, KeyError):
        raise ValueError(f"snapshot {folder}: its tensor file {name} holds no tensors") from None


def exists(folder: str | Path) -> bool:
    """Whether the folder holds a snapshot, damaged or not."""
    return (Path(folder) / INDEX).exists()


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _names(folder: Path, name: str) -> bool:
    """Whether the folder's index names the tensor file `name`."""
    try:
        return name in (folder / INDEX).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


def _put(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, on the disk before it gets its own."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _clear(folder: Path, keep: str) -> None:
    """Removes older tensors, and what a killed process left."""
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name != keep:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The folder's descriptor, while no other process writes a snapshot into it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
