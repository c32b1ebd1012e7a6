"""NVIDIA's driver through ctypes: tensor maps, and machine code loaded and launched.

What a launch costs the host is most of a short call, so nothing is worked out twice: a tensor map
is encoded once for a layout, and then only given an address.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType
_SWIZZLE_128B = 3
_PROMOTE_256B = 3
_NOWHERE = 1 << 20  # an address to encode a map with that is given another one before its use

_Structure = TypeVar("_Structure", bound=ctypes.Structure)


class TensorMap(ctypes.Structure):
    """A `CUtensorMap`: how the copy engine finds boxes of a tensor."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


class Library:
    """Machine code (a cubin), whose kernels can be had for every device."""

    def __init__(self, code: bytes) -> None:
        self._code = code  # the driver may read it later than now
        self._library = ctypes.c_void_p()
        _check(_driver().cuLibraryLoadData(
            ctypes.byref(self._library), code, None, None, 0, None, None, 0
        ))  # fmt: skip

    def kernel(self, name: str, threads: int, shared_bytes: int, device: torch.device) -> Kernel:
        """One of its kernels, for blocks of so many threads and bytes, on a device."""
        handle, place = ctypes.c_void_p(), ctypes.c_int()
        _check(_driver().cuLibraryGetKernel(ctypes.byref(handle), self._library, name.encode()))
        if shared_bytes > 48 * 1024:
            _check(_driver().cuDeviceGet(ctypes.byref(place), device.index))
            _check(_driver().cuKernelSetAttribute(_SHARED_SIZE, shared_bytes, handle, place))
        return Kernel(self, handle, threads, shared_bytes, device)


class Kernel:
    """A kernel that can be launched on one device."""

    def __init__(
        self,
        library: Library,
        handle: ctypes.c_void_p,
        threads: int,
        shared_bytes: int,
        device: torch.device,
    ) -> None:
        self._library = library
        self._handle, self._block = handle, (threads, 1, 1, shared_bytes)
        self._device, self._index = device, device.index

    def launch(self, grid: tuple[int, int, int], pointers: int) -> None:
        """Starts it on the device's current stream.

        At `pointers` lie the addresses of its arguments, which are copied before this returns.
        """
        if torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._device):
                self.launch(grid, pointers)
            return
        stream = torch._C._cuda_getCurrentRawStream(self._index)  # pyright: ignore
        given = self._handle, *grid, *self._block, stream, pointers, None
        _call(_driver().cuLaunchKernel, *given)


class Arguments:
    """Room for a kernel's arguments, and their addresses, to be filled in for launch after launch.

    Attributes:
        values: a structure whose fields are the arguments, but for those that start with `_`.
        place: where it lies, a multiple of 64 bytes, as tensor maps ask for.
        pointers: where the addresses of the arguments lie.
    """

    def __init__(self, kind: type[ctypes.Structure]) -> None:
        self.values = _aligned(kind)
        self.place = ctypes.addressof(self.values)
        fields = [x[0] for x in kind._fields_ if not x[0].startswith("_")]
        addresses = [self.place + getattr(kind, name).offset for name in fields]
        self._addresses = (ctypes.c_void_p * len(addresses))(*addresses)
        self.pointers = ctypes.addressof(self._addresses)


def _aligned(kind: type[_Structure]) -> _Structure:
    room = ctypes.create_string_buffer(ctypes.sizeof(kind) + 63)
    return kind.from_buffer(room, -ctypes.addressof(room) % 64)


def tensor_map(x: Tensor, box: tuple[int, ...]) -> TensorMap:
    """Boxes of a tensor, their rows in the 128-byte swizzle, zeros where they leave the tensor.

    Args:
        x: its last dimension dense; address and strides multiples of 16 bytes.
        box: sizes, from the last dimension of `x` on; the first of them 128 bytes wide.
    """
    made = _aligned(TensorMap)
    place = ctypes.addressof(made)
    ctypes.memmove(place, encoded(x.dtype, x.shape, x.stride(), box), ctypes.sizeof(TensorMap))
    readdress(place, x)
    return made


@lru_cache(maxsize=1024)
def encoded(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    promotion: int = _PROMOTE_256B,
) -> bytes:
    """A tensor map of no address yet; `promotion` is a `CUtensorMapL2promotion`."""
    rank, size = len(shape), dtype.itemsize
    # A dimension of one may have any stride, which the driver would refuse.
    steps = [
        stride * size if length > 1 else 16
        for stride, length in zip(strides[-2::-1], shape[-2::-1], strict=True)
    ]
    made = _aligned(TensorMap)
    _call(
        _driver().cuTensorMapEncodeTiled,
        ctypes.addressof(made),
        _TYPES[dtype],
        rank,
        _NOWHERE,
        (ctypes.c_uint64 * rank)(*shape[::-1]),
        (ctypes.c_uint64 * (rank - 1))(*steps),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,
        _SWIZZLE_128B,
        promotion,
        0,
    )
    return bytes(made)


def readdress(place: int, x: Tensor) -> None:
    """Gives the map at `place` the address of `x`, which has the layout that it was made for."""
    _call(_quick().cuTensorMapReplaceAddress, place, x.data_ptr())


def mappable(x: Tensor) -> bool:
    """Whether there are tensor maps of `x`."""
    return x.data_ptr() % 16 == 0 and _is_mappable(x.dtype.itemsize, x.shape, x.stride())


@lru_cache(maxsize=1024)
def _is_mappable(size: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return strides[-1] == 1 and all(
        length == 1 or (stride > 0 and stride * size % 16 == 0)
        for stride, length in zip(strides[:-1], shape[:-1], strict=True)
    )


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    driver.cuLaunchKernel.argtypes = (pointer, *[number] * 7, *[pointer] * 3)
    driver.cuTensorMapEncodeTiled.argtypes = (
        *(pointer, ctypes.c_int, number),
        *[pointer] * 5,
        *[ctypes.c_int] * 4,
    )
    return driver


@lru_cache(maxsize=1)
def _quick() -> ctypes.PyDLL:
    """For what is done at once: to let other threads run meanwhile would cost more."""
    driver = ctypes.PyDLL("libcuda.so.1")
    driver.cuTensorMapReplaceAddress.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    return driver


def _call(function: Any, *given: Any) -> None:
    """Calls what needs a context, which a thread hasn't that has called nothing of CUDA's yet."""
    status = function(*given)
    if status == _NO_CONTEXT:
        place, context = ctypes.c_int(), ctypes.c_void_p()
        _check(_driver().cuDeviceGet(ctypes.byref(place), torch.cuda.current_device()))
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), place))
        _check(_driver().cuCtxSetCurrent(context))
        status = function(*given)
    _check(status)


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'error').decode()} ({status})")
