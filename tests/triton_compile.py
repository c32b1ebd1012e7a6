"""Triton kernels without a GPU: launches are recorded and compiled, or interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sass import resources

Launch = tuple[Any, tuple, dict]  # kernel, arguments, named arguments and options
# What the host asks of a device, as an H100 and an H200 answer.
_HOPPER = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@contextmanager
def recorded(module: ModuleType, *names: str) -> Iterator[list[Launch]]:
    """Inside, launches of these kernels of the module are noted in the list that this yields.

    Tensors lie on the CPU meanwhile, and the host takes that for a Hopper GPU.
    """
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(module, name, _Recorder(getattr(module, name), launches))
        patch.setattr(torch.cuda, "get_device_properties", lambda _: _HOPPER)
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        yield launches


def specialised(launch: Launch) -> dict[str, tuple[str, str | None]]:
    """What Triton compiles anew for: the type of each argument, and what it is known to be."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    kernel, args, named = launch
    values = dict(zip(kernel.arg_names, args, strict=False)) | named
    found = {}
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr:
            found[parameter.name] = ("constexpr", repr(value))
            continue
        found[parameter.name] = native_specialize_impl(
            CUDABackend, value, False,
            not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment,
        )  # fmt: skip
    return found


def compiled(launch: Launch, capability: int, cache: Path) -> Any:
    """The kernel of a recorded launch, compiled for compute capability `capability` (80, 90)."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    kernel, args, named = launch
    target = GPUTarget("cuda", capability, 32)
    values = dict(zip(kernel.arg_names, args, strict=False)) | named
    options = {name: x for name, x in values.items() if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for place, (name, (kind, known)) in enumerate(specialised(launch).items()):
        signature[name] = kind
        if kind == "constexpr":
            constants[(place,)] = values[name]
        elif known == "D":
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


def uses(launch: Launch, folder: Path) -> tuple[int, int]:
    """Registers and bytes of stack that a recorded launch takes on Hopper."""
    ((_, found),) = resources(compiled(launch, 90, folder).asm["cubin"], folder).items()
    return found


# Triton decides at its import whether it interprets, and 3.6 turns arrays of one element into
# integers, which NumPy 2.4 does no more.
_INTERPRETER = """
import numpy as np
from triton.runtime import interpreter

patched = interpreter._patch_lang_tensor
def patch(tensor, scope):
    patched(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())
interpreter._patch_lang_tensor = patch
np.seterr(all="ignore")
"""


def interpret(program: str) -> None:
    """Runs a program in a process of its own, where Triton's interpreter runs the kernels."""
    run = subprocess.run(
        [sys.executable, "-c", _INTERPRETER + program],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
