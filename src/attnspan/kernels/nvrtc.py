"""CUDA C++ compiled at run time: NVRTC, which torch brings along, and the driver, through ctypes.

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
from torch import Tensor

_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType
_SWIZZLE_128B = 3
_PROMOTE_256B = 3


class CompileError(RuntimeError):
    """What NVRTC said."""


class TensorMap(ctypes.Structure):
    """A `CUtensorMap`: how the copy engine finds boxes of a tensor."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


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
        driver = _driver()
        self._library = ctypes.c_void_p()
        self._code = _cached(source, options)  # the driver may read it later than now
        _checked(driver.cuLibraryLoadData(
            ctypes.byref(self._library), self._code, None, None, 0, None, None, 0
        ))  # fmt: skip
        self._kernels: dict[tuple[str, int, int], ctypes.c_void_p] = {}

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
        with torch.cuda.device(device):
            kernel = self._kernel(name, shared_bytes, device)
            pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(x) for x in arguments))
            stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
            _checked(_driver().cuLaunchKernel(
                kernel, *grid, threads, 1, 1, shared_bytes, stream, pointers, None
            ))  # fmt: skip

    def _kernel(self, name: str, shared_bytes: int, device: torch.device) -> ctypes.c_void_p:
        index = torch.cuda.current_device() if device.index is None else device.index
        key = name, shared_bytes, index
        if key not in self._kernels:
            driver, kernel = _driver(), ctypes.c_void_p()
            _checked(driver.cuLibraryGetKernel(ctypes.byref(kernel), self._library, name.encode()))
            if shared_bytes > 48 * 1024:
                handle = ctypes.c_int()
                _checked(driver.cuDeviceGet(ctypes.byref(handle), index))
                _checked(driver.cuKernelSetAttribute(_SHARED_SIZE, shared_bytes, kernel, handle))
            self._kernels[key] = kernel
        return self._kernels[key]


def tensor_map(x: Tensor, box: tuple[int, ...]) -> TensorMap:
    """Boxes of a tensor, their rows in the 128-byte swizzle, zeros where they leave the tensor.

    Args:
        x: its last dimension dense; address and strides multiples of 16 bytes.
        box: sizes, from the last dimension of `x` on; the first of them 128 bytes wide.
    """
    size = x.element_size()
    shape = x.shape[::-1]
    # A dimension of one may have any stride, which the driver would refuse.
    strides = [
        s * size if length > 1 else 16
        for s, length in zip(x.stride()[-2::-1], shape[1:], strict=True)
    ]
    made, rank = TensorMap(), x.dim()
    # The map must lie at a multiple of 64 bytes for the encoder, and need not afterwards.
    room = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)
    at = -(-ctypes.addressof(room) // 64) * 64
    _checked(_driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at),
        _TYPES[x.dtype],
        rank,
        ctypes.c_void_p(x.data_ptr()),
        (ctypes.c_uint64 * rank)(*shape),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,
        _SWIZZLE_128B,
        _PROMOTE_256B,
        0,
    ))  # fmt: skip
    ctypes.memmove(ctypes.addressof(made), at, ctypes.sizeof(TensorMap))
    return made


def mappable(x: Tensor) -> bool:
    """Whether `tensor_map` takes `x`."""
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(
            length == 1 or (s > 0 and s * x.element_size() % 16 == 0)
            for s, length in zip(x.stride()[:-1], x.shape[:-1], strict=True)
        )
    )


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


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _compiled(status: int) -> None:
    if status:
        nvrtc = _nvrtc()
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")


def _checked(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'error').decode()} ({status})")


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
    if path and path.exists():
        return path.read_bytes()
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
