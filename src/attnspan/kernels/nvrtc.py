"""CUDA C++ compiled at run time by NVRTC, which torch brings along, through ctypes.

NVRTC needs no GPU, so a machine without one can check that a kernel still compiles.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from attnspan.kernels import driver


class CompileError(RuntimeError):
    """What NVRTC said."""


@lru_cache(maxsize=1)
def lack() -> str | None:
    """Why nothing can be compiled here, as half a sentence; None: it can."""
    try:
        _nvrtc()
    except OSError:
        return "NVIDIA's run-time compiler (libnvrtc) isn't installed"
    return None


def compile_source(source: Path, options: tuple[str, ...]) -> tuple[bytes, str]:
    """The machine code (a cubin) of a CUDA C++ file, and what the compiler had to say.

    It may include the headers (`*.cuh`) beside it.

    Raises:
        CompileError: the source doesn't compile.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    text = source.read_bytes()
    _compiled(nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text, source.name.encode(), 0, None, None
    ))  # fmt: skip
    try:
        every = (*options, f"--include-path={source.parent}")
        given = (ctypes.c_char_p * len(every))(*(x.encode() for x in every))
        status = nvrtc.nvrtcCompileProgram(program, len(every), given)
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        told = log.value.decode(errors="replace").strip()
        if status:
            raise CompileError(f"{source.name} doesn't compile:\n{told}")
        _compiled(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _compiled(nvrtc.nvrtcGetCUBIN(program, code))
        return code.raw, told
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


class Kernels:
    """The kernels of one CUDA C++ file under one set of options, compiled at their first use.

    Machine code is kept in the user's cache folder, under a name that holds a digest of all it was
    made from.
    """

    def __init__(self, source: Path, options: tuple[str, ...]) -> None:
        self._library = driver.Library(_cached(source, options))
        self._kernels: dict[tuple[str, int, int, torch.device], driver.Kernel] = {}

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        device: torch.device,
        arguments: tuple[Any, ...],
    ) -> None:
        """Starts a kernel on the device's current stream; `arguments` are ctypes values."""
        key = name, threads, shared_bytes, device
        if key not in self._kernels:
            self._kernels[key] = self._library.kernel(*key)
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self._kernels[key].launch(grid, ctypes.addressof(pointers))


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    name = f"libnvrtc.so.{major}"
    found = find_spec("nvidia")
    places = [
        str(path)
        for root in (found.submodule_search_locations or [] if found else [])
        for path in sorted(Path(root).glob(f"*/lib/{name}"))
    ]
    error: OSError | None = None
    for place in (*places, name):
        try:
            # NVRTC asks for this by its bare name, which the loader finds only once it is loaded.
            for builtins in Path(place).parent.glob(f"libnvrtc-builtins.so.{major}*"):
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(place)
        except OSError as each:
            error = each
    raise error or OSError(name)


def _compiled(status: int) -> None:
    if status:
        nvrtc = _nvrtc()
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")


def _cached(source: Path, options: tuple[str, ...]) -> bytes:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _compiled(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    digest = hashlib.sha256(source.read_bytes())
    for header in sorted(source.parent.glob("*.cuh")):
        digest.update(header.read_bytes())
    for part in (*options, f"{major.value}.{minor.value}"):
        digest.update(f"\0{part}".encode())
    folder = _folder()
    path = folder / f"{source.stem}-{digest.hexdigest()[:24]}.cubin" if folder else None
    # An empty one is what a crash of the machine leaves.
    if path and path.exists() and (code := path.read_bytes()):
        return code
    code, _ = compile_source(source, options)
    if path:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    return code


def _folder() -> Path | None:
    """The user's own folder for builds; None where there is none that can be trusted."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "attnspan"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        trusted = folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK)
    except OSError:
        return None
    return folder if trusted else None
