"""Triton kernels compiled for a GPU that isn't there: the launches of a host function, recorded."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


class _Recorder:
    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple, dict]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@contextmanager
def recorded(module: ModuleType, *names: str):
    """Inside, launches of these kernels of the module are noted in the list that this yields."""
    launches: list[tuple[Any, tuple, dict]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(module, name, _Recorder(getattr(module, name), launches))
        yield launches


def compiled(launch: tuple[Any, tuple, dict], capability: int, cache: Path) -> Any:
    """The kernel of a recorded launch, compiled for compute capability `capability` (80, 90)."""
    import triton
    from triton import knobs
    from triton._C.libtriton import native_specialize_impl
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    kernel, args, named = launch
    target = GPUTarget("cuda", capability, 32)
    backend = type(backends["nvidia"].compiler(target))
    values = dict(zip(kernel.arg_names, args, strict=False)) | named
    options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        kind, key = native_specialize_impl(
            backend, value, False, not parameter.do_not_specialize, True
        )
        if kind == "constexpr":  # a stride of 1
            constants[(place,)] = value
        signature[parameter.name] = kind
        if key == "D":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    with knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = str(cache)
        knobs.nvidia.ptxas = newest_ptxas()
        return triton.compile(
            source(kernel, signature, constants, attributes), target=target, options=options
        )


def newest_ptxas() -> str:
    """The newer assembler of the two that come with Triton."""
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell")


def machine_code(kernel: Any, tmp_path: Path) -> str:
    """SASS, by the disassembler that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return subprocess.run([tool, "-sass", cubin], check=True, capture_output=True, text=True).stdout
