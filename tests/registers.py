"""Registers, stack, spills and shared memory of the kernels for Hopper, compiled without a GPU.

`PYTHONPATH=src:tests:tests/kernels python tests/registers.py` prints them as Markdown; the table in
docs/kernels.md is that. Spills are instructions that store to or load from the stack.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import test_gpu_decode as decode
import torch
import triton
from sass import disassembled
from triton.backends.compiler import GPUTarget
from triton_compile import compiled, recorded

from attnspan.cache.storage import Dense, Int4, Int8
from attnspan.kernels import gpu_received, hopper, hopper_backward, hopper_received, nvrtc
from attnspan.kernels.gpu_lists import Lists
from attnspan.patterns import Sinks, SlidingWindow, plan
from attnspan.testing import make_qkv

BF16 = torch.bfloat16


def kernels(folder: Path) -> Iterator[tuple[str, bytes, int | None]]:
    """Name, machine code, bytes of shared memory where those are known before a launch."""
    yield from _hopper(folder)
    yield from _portable(folder)
    yield from _decode(folder)


def _hopper(folder: Path) -> Iterator[tuple[str, bytes, int | None]]:
    for width in (128, 64):
        for ranges in (1, 2):
            for guess in (True, False):
                kind = BF16, width, 4, 8, ranges, guess
                made = hopper.compiled_for(GPUTarget("cuda", 90, 32), *kind)
                form = f"{'guess' if guess else 'redo'}, ranges={ranges}, D={width}"
                yield f"`hopper` forward, {form}", made.asm["cubin"], made.metadata.shared
    for width in (128, 64):
        for ranges, ordered in ((1, False), (1, True), (2, False)):
            if nvrtc.lack():
                continue
            options = hopper_backward.options(width, BF16, ranges, ordered)
            code, _ = nvrtc.compile_source(hopper_backward.SOURCE, options)
            form = f"ranges={ranges}, {'ordered' if ordered else 'unordered'}, D={width}"
            yield f"`hopper` backward, {form}", code, hopper_backward._SHARED_BYTES
    for width in (128, 64):
        for ranges in (1, 2):
            if nvrtc.lack():
                continue
            options = hopper_received.options(width, BF16, ranges)
            code, _ = nvrtc.compile_source(hopper_received.SOURCE, options)
            form = f"ranges={ranges}, D={width}"
            yield f"`hopper` received, {form}", code, hopper_received.SHARED_BYTES


def _portable(folder: Path) -> Iterator[tuple[str, bytes, int | None]]:
    from attnspan.kernels import triton_attention, triton_code

    names = ("forward", "pull", "backward_keys", "backward_queries")
    for width in (128, 64):
        q, k, v = make_qkv(300, 300, heads=(4, 2), head_dim=width, dtype=BF16)
        tiles = _lists(SlidingWindow(70) | Sinks(3))
        with recorded(triton_code, *names) as launches:
            out, lse = triton_attention.forward(q, k, v, tiles, 0.1)
            triton_attention.backward(out, lse, q, k, v, out, lse, tiles, 0.1)
        for launch in launches:
            made = compiled(launch, 90, folder)
            name = launch[0].__name__
            yield f"`triton` {name}, D={width}", made.asm["cubin"], made.metadata.shared
        q, k, _ = make_qkv(300, 300, heads=(8, 2), head_dim=width, dtype=BF16)
        with recorded(triton_code, "received") as launches:
            gpu_received.received(q, k, torch.zeros(1, 8, 300), _lists(SlidingWindow(70)), 0.1)
        made = compiled(launches[0], 90, folder)
        yield f"`triton` received, D={width}", made.asm["cubin"], made.metadata.shared


def _decode(folder: Path) -> Iterator[tuple[str, bytes, int | None]]:
    cases = (
        ("attend_dense", Dense(), False, "counters"),
        ("attend_int8", Int8(), False, "counters"),
        ("attend_int4", Int4(), False, ""),
        ("attend_int4", Int4(), True, ""),
        ("attend_turned", Int8(), True, ""),
        ("finish", Dense(), False, "received"),
    )
    for name, storage, turned, options in cases:
        launch = decode.launches(storage, 1, (32, 8), 128, turned, options)[name]
        made = compiled(launch, 90, folder)
        label = f"decode, {name}, {storage}" + ", turned" * turned
        yield label, made.asm["cubin"], made.metadata.shared


def _lists(pattern) -> Lists:
    return Lists(plan(pattern, 300, 300)[0].jobs[0].tiles, "cpu")


def main() -> None:
    print("| kernel | registers | stack, bytes | spills | shared, KiB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, cubin, shared in kernels(folder):
            path = folder / "kernel.cubin"
            path.write_bytes(cubin)
            tool = triton.knobs.nvidia.cuobjdump.path
            said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True)
            # A file of several kernels: the one that matters has the most.
            found = re.findall(r"REG:(\d+) STACK:(\d+)", said.stdout)
            registers, stack = max(tuple(map(int, x)) for x in found)
            code = disassembled(cubin, folder)
            spills = sum(bool(re.search(r"\b(STL|LDL)\b", text)) for _, text in code)
            kib = "" if shared is None else f"{shared / 1024:.0f}"
            print(f"| {label} | {registers} | {stack} | {spills} | {kib} |", flush=True)


if __name__ == "__main__":
    main()
