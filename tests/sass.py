"""Reads a kernel's machine code: what it takes of a processor, and a fault that no result shows.

A ptxas that hoists the setting of a uniform register into one loop's preheader leaves it unset on
paths around the loop: products then read shared memory from anywhere, and only some tiles go wrong.
"""

import re
import subprocess
from pathlib import Path

import pytest

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_TARGET = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_UNIFORM = re.compile(r"\bUR(\d+)\b")
# Their first operand is none that they write.
_WRITE_NONE = {
    "BAR", "BRA", "DEPBAR", "EXIT", "FENCE", "ISETP", "MEMBAR", "NOP", "PLOP3", "RED", "ST", "STG",
    "STL", "STS", "STSM", "SYNCS", "UISETP", "UPLOP3", "USETMAXREG", "UTMACCTL", "UTMACMDFLUSH",
    "UTMALDG", "UTMASTG", "WARPGROUP", "WARPSYNC",
}  # fmt: skip


def disassembled(cubin: bytes, folder: Path) -> list[tuple[int, str]]:
    """(address, instruction) of a kernel, by the disassembler that Triton brings."""
    found = (_LINE.match(line) for line in _read("-sass", cubin, folder).splitlines())
    return [(int(m[1], 16), m[2].strip()) for m in found if m]


def resources(cubin: bytes, folder: Path) -> dict[str, tuple[int, int]]:
    """(registers, bytes of stack) of each kernel in a cubin. What spills takes stack."""
    told = _read("-res-usage", cubin, folder)
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return {name: (int(registers), int(stack)) for name, registers, stack in found}


def _read(how: str, cubin: bytes, folder: Path) -> str:
    triton = pytest.importorskip("triton", reason="triton, which brings cuobjdump, isn't installed")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, how, path], capture_output=True, text=True, check=True).stdout


def unset_uniform_registers(code: list[tuple[int, str]]) -> list[str]:
    """Instructions that read a uniform register which some path to them has never set."""
    place = {address: at for at, (address, _) in enumerate(code)}
    following = [_following(text, at, place) for at, (_, text) in enumerate(code)]
    reads, writes = zip(*(_registers(text) for _, text in code), strict=True)
    known: list[frozenset[int] | None] = [None] * len(code)
    known[0] = frozenset()
    todo = [0]
    while todo:
        at = todo.pop()
        after = known[at] | writes[at]
        for then in following[at]:
            before = known[then]
            if then < len(code) and (before is None or not before <= after):
                known[then] = after if before is None else before & after
                todo.append(then)
    return [
        f"{address:x}: {text}"
        for at, (address, text) in enumerate(code)
        if known[at] is not None and not reads[at] <= known[at]
    ]


def _following(text: str, at: int, place: dict[int, int]) -> list[int]:
    conditional = text.startswith("@") or re.search(r"BRA (!?U?P\d|DIV)", text)
    if target := _TARGET.search(text):
        return [place[int(target[1], 16)], *([at + 1] if conditional else [])]
    if re.search(r"\bEXIT\b", text) and not conditional:
        return []
    return [at + 1]


def _registers(text: str) -> tuple[frozenset[int], frozenset[int]]:
    """The uniform registers that an instruction reads, and those that it writes."""
    name, _, rest = re.sub(r"^@!?U?P\w+ ", "", text).partition(" ")
    operands = [x.strip() for x in rest.split(",")]
    while operands and re.fullmatch(r"!?U?P(\d|T)", operands[0]):
        operands.pop(0)
    if name.startswith("HGMMA"):
        # Two descriptors in four registers; with the one operand in registers, the latter two.
        base = int(re.search(r"gdesc\[UR(\d+)\]", rest)[1])
        skipped = 2 if re.match(r"R\d+, R\d+, gdesc", rest) else 0
        return frozenset(range(base + skipped, base + 4)), frozenset()
    target = operands[:1] if name.split(".")[0] not in _WRITE_NONE else []
    written: set[int] = set()
    if target and (found := re.match(r"UR(\d+)", target[0])):
        width = 2 if ".64" in name or "WIDE" in name else 1
        written.update(range(int(found[1]), int(found[1]) + width))
    sources = operands[len(target) :]
    return frozenset(int(x) for y in sources for x in _UNIFORM.findall(y)), frozenset(written)
