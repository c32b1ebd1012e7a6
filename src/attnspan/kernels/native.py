"""The C++ kernels: built with this machine's compiler at their first use, called through ctypes.

The library is a plain C one, kept in the user's cache folder under a name that holds a digest of
all it was built from. Its threads are those of the OpenMP runtime that torch has loaded, so
`torch.set_num_threads` rules both and they never compete.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from attnspan.kernels.view import KVView, Part
from attnspan.patterns.tiles import Pass

TILE = 120  # twenty strips of six rows
_SOURCES = ("native.cpp", "native_decode.cpp")
_HEADER = "native.h"
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    # Neither changes a result: errno isn't read, and no signal waits for a trapping division.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MOST_WIDTH = 256
_FEW = 32  # queries of a KV head up to which a call is a decode


@dataclass(frozen=True)
class Build:
    """The loaded library, or why there is none.

    Attributes:
        library: None where it couldn't be built.
        lack: half a sentence that says why; None where it could.
        compiler: the compiler's own first line about itself.
        command: what runs it, its options with it.
        vectors: the widest vectors that it uses.
        path: where the library lies.
    """

    library: Any
    lack: str | None = None
    compiler: str = ""
    command: tuple[str, ...] = ()
    vectors: str = ""
    path: str = ""


@lru_cache(maxsize=1)
def build() -> Build:
    """Builds and loads the library once; what stands in the way is told, not raised."""
    if os.environ.get("ATTNSPAN_NATIVE") == "0":
        return Build(None, "ATTNSPAN_NATIVE=0 switches it off")
    compiler = os.environ.get("CXX") or next(
        (name for name in ("c++", "g++", "clang++") if shutil.which(name)), None
    )
    # As make has it, CXX may hold options.
    try:
        command = tuple(shlex.split(compiler or ""))
    except ValueError as error:
        return Build(None, f"CXX is {compiler!r}: {error}")
    if not command or not shutil.which(command[0]):
        return Build(None, f"there is no C++ compiler ({compiler or 'c++, g++ or clang++'})")
    try:
        about = _run(*command, "--version").splitlines()[0]
        path = _built(command, about)
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # empty, say, after a crash of the machine
            path.unlink(missing_ok=True)
            library = ctypes.CDLL(str(_built(command, about)))
    except (OSError, subprocess.SubprocessError, _Failed) as error:
        return Build(None, f"it couldn't be built: {error}")
    vectors = _bound(library).attnspan_vectors().decode()
    return Build(library, None, about, command, vectors, str(path))


def _bound(library: ctypes.CDLL) -> ctypes.CDLL:
    library.attnspan_vectors.restype = ctypes.c_char_p
    for name in ("forward", "backward", "received", "decode"):
        function = getattr(library, f"attnspan_{name}")
        function.argtypes = (ctypes.c_void_p, ctypes.c_double, ctypes.c_double)
        function.restype = None
    return library


class _Failed(RuntimeError):
    """What a compiler said."""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        told = (done.stderr or done.stdout).splitlines()
        first = next((line for line in told if "error" in line), told[0] if told else "no message")
        raise _Failed(first.strip())
    return done.stdout or done.stderr


def _built(compiler: tuple[str, ...], about: str, extra: tuple[str, ...] = ()) -> Path:
    sources = [Path(__file__).with_name(name) for name in _SOURCES]
    digest = hashlib.sha256()
    runtime = _openmp()
    for part in (*compiler, about, *_FLAGS, *extra, runtime, torch.__version__, _processor()):
        digest.update(f"{part}\0".encode())
    for source in (*sources, Path(__file__).with_name(_HEADER)):
        digest.update(source.read_bytes())
    path = _folder() / f"native-{digest.hexdigest()[:24]}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = []
        for source in sources:
            made.append(str(Path(folder) / f"{source.stem}.o"))
            _run(*compiler, *_FLAGS, *extra, "-fopenmp", "-c", str(source), "-o", made[-1])
        whole = str(Path(folder) / path.name)
        _run(*compiler, "-shared", *made, runtime, "-o", whole)
        os.replace(whole, path)
    return path


def _openmp() -> str:
    """The OpenMP runtime that torch has loaded; a second one's threads would compete with it.

    Other packages may have loaded runtimes of their own: torch's lies in its own folders, or where
    the system keeps it.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "-fopenmp"
    loaded = {line.split()[-1] for line in maps.splitlines() if ".so" in line}
    home = str(Path(torch.__file__).parent)  # torch/ and torch.libs/ begin alike
    for path in sorted(loaded, key=lambda path: (not path.startswith(home), path)):
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            return path
    return "-fopenmp"


def _constant(f: Callable[[], Any]) -> Callable[[], Any]:
    """`torch.compiler.assume_constant_result`, which imports all of dynamo: over a second."""
    f._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return f


@_constant
def has_matrix_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices in tiles (AMX)."""
    return "amx_bf16" in _processor()


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _folder() -> Path:
    """The user's own folder for builds, or a temporary one where that can't be trusted."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "attnspan"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    temporary = Path(tempfile.mkdtemp(prefix="attnspan-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What this implementation lacks for these inputs, as the end of a sentence; None: nothing."""
    if q.device.type != "cpu":
        return f"it runs on a CPU, not on {q.device.type}"
    if q.dtype not in _KINDS:
        return f"it has no {str(q.dtype).removeprefix('torch.')}"
    if max(q.shape[-1], v.shape[-1]) > _MOST_WIDTH:
        return f"its heads have up to {_MOST_WIDTH} channels"
    return _lack()


@_constant
def _lack() -> str | None:
    return build().lack


_prepared: WeakKeyDictionary[Pass, tuple[np.ndarray, list[Any]]] = WeakKeyDictionary()


def _jobs(each: Pass) -> tuple[np.ndarray, list[Any]]:
    """A pass's jobs as the library reads them, and what must live as long as it does so."""
    entry = _prepared.get(each)
    if entry is None:
        rows, alive = [], []
        for job in each.jobs:
            t = job.tiles
            code, tables = t.program
            pointers = np.array([x.ctypes.data for x in tables] or [0], np.int64)
            alive += [code, tables, pointers, t]
            shared = [t.n, t.m, t.offset, t.tile]
            shared += [x.ctypes.data for x in (t.some_ptr, t.some, t.all_ptr, t.all, code)]
            shared += [len(code), pointers.ctypes.data]
            rows += [[job.first_query + c, job.first_key + c, *shared] for c in range(job.count)]
        # Another thread may have been first: all use one entry.
        made = np.array(rows, np.int64).reshape(-1, 13), alive
        entry = _prepared.setdefault(each, made)
    return entry


def _call(
    name: str,
    each: Pass,
    scale: float,
    softcap: float | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    out: Tensor | None = None,
    grad_out: Tensor | None = None,
    dense: tuple[Tensor | None, ...] = (),
    adds: bool = False,
) -> None:
    """Calls the library; `dense` are lse, grad_lse, grad_q, grad_k, grad_v and the total."""
    jobs, _alive = _jobs(each)
    views = []
    for x in (q, k, v, out, grad_out):
        views += [0, 0, 0, 0] if x is None else [x.data_ptr(), *x.stride()[:3]]
    pointers = [0 if x is None else x.data_ptr() for x in dense]
    numbers = np.array(
        [
            *(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2]),
            *(q.shape[3], 0 if v is None else v.shape[3]),
            *(_KINDS[q.dtype], 0 if out is None else _KINDS[out.dtype]),
            *(each.step, len(jobs), jobs.ctypes.data),
            *views,
            *pointers,
            *[0] * (6 - len(pointers)),
            adds,
        ],
        np.int64,
    )
    getattr(build().library, f"attnspan_{name}")(numbers.ctypes.data, scale, softcap or 0.0)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    passes: tuple[Pass, ...],
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp by the passes of a plan, each of which sees other pairs.

    Args:
        q: `(batch, Hq, n, head_dim)`, float32, bfloat16 or float16.
        k: `(batch, Hkv, m, head_dim)`.
        v: `(batch, Hkv, m, value_dim)`.
        passes: from `attnspan.patterns.plan`, with tiles of `TILE`.
        scale: factor of the scores.
        softcap: as in `attnspan.attention`.

    Returns:
        `out (batch, Hq, n, value_dim)` in the dtype of `q`, `lse (batch, Hq, n)` in float32.
    """
    q, k, v = _dense(q), _dense(k), _dense(v)
    if q.shape[1] // max(1, k.shape[1]) * q.shape[2] <= _FEW:
        parts = _parts(q, k, v, passes)
        if parts:
            return decode(KVView(parts), scale, softcap)[:2]
    out, lse = q.new_empty((*q.shape[:3], v.shape[3])), _float32(q.shape[:3])
    passes = tuple(each for each in passes if len(each.jobs))
    if not passes or not out.numel():
        return out.zero_(), lse.fill_(-math.inf)
    if len(passes) < 2 or q.dtype == torch.float32:
        for at, each in enumerate(passes):
            _call("forward", each, scale, softcap, q, k, v, out, None, (lse,), at > 0)
        return out, lse
    # Passes join in float32 and are rounded once: a KV head at a time, to hold little of that.
    groups = q.shape[1] // k.shape[1]
    for head in range(k.shape[1]):
        rows, keys = slice(head * groups, (head + 1) * groups), slice(head, head + 1)
        some_lse = _float32((q.shape[0], groups, q.shape[2]))
        some_out = _float32((*some_lse.shape, v.shape[3]))
        given = q[:, rows], k[:, keys], v[:, keys]
        for at, each in enumerate(passes):
            _call("forward", each, scale, softcap, *given, some_out, None, (some_lse,), at > 0)
        out[:, rows], lse[:, rows] = some_out, some_lse
    return out, lse


def _float32(shape: tuple[int, ...]) -> Tensor:
    """What the library writes, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _parts(q: Tensor, k: Tensor, v: Tensor, passes: tuple[Pass, ...]) -> tuple[Part, ...]:
    """The keys that a few queries see, where all of them see from the same positions."""
    parts = []
    for each in passes:
        for job in each.jobs:
            t = job.tiles
            if t.n != q.shape[2] or job.count != 1 or not q.numel():
                return ()
            whole = {(a, b) for a, b in t.all.tolist()} if t.rows == 1 else set()
            for start, stop in t.some.tolist() if t.rows == 1 else [(0, t.m)]:
                mask = None
                if (start, stop) not in whole:
                    i = np.arange(t.n, dtype=np.int64)[:, None] + t.offset
                    seen = t.rule.sees(i, np.arange(start, stop)) & np.ones((t.n, 1), bool)
                    mask = torch.where(torch.from_numpy(seen), 0.0, -math.inf).float()
                first = job.first_key + each.step * start
                keys = slice(first, first + each.step * (stop - start - 1) + 1, each.step)
                parts.append(Part(q, k[:, :, keys], v[:, :, keys], mask))
    return tuple(parts)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    passes: tuple[Pass, ...],
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in float32, from the whole attention's `out` and `lse`."""
    grads = [_float32(x.shape).zero_() for x in (q, k, v)]
    if q.numel() and k.numel() and v.numel():
        q, k, v, out, grad_out = (_dense(x) for x in (q, k, v, out, grad_out))
        lse = lse.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
        for each in passes:
            dense = (lse, grad_lse, *grads)
            _call("backward", each, scale, softcap, q, k, v, out, grad_out, dense)
    return grads[0], grads[1], grads[2]


def received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    passes: tuple[Pass, ...],
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """The attention that each key receives, `(batch, Hkv, m)` float32; see `kernels.cpu`."""
    total = _float32(k.shape[:3]).zero_()
    q, k, lse = _dense(q), _dense(k), lse.float().contiguous()
    if q.numel() and k.numel():
        for each in passes:
            dense = (lse, None, None, None, None, total)
            _call("received", each, scale, softcap, q, k, dense=dense)
    return total


_STORAGES = {"dense": 0, "int8": 1, "int4": 2}
_FIELDS = ("key", "value", "key_scale", "value_scale", "value_least")


def decode(
    view: KVView,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_received: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    """Attention of a view's few queries over all its parts, keys and values read as stored.

    Args:
        view: what a cache holds; masks and angles in float32.
        scale: factor of the scores.
        softcap: as in `attnspan.attention`.
        sink_logits: as in `attnspan.attention`.
        return_received: give, for each part, what `received` gives, at the price of the scores in
            memory.
        dtype: that of `out`; None: the queries'.

    Returns:
        `out (batch, Hq, m, value_dim)`, `lse (batch, Hq, m)` in float32, and for each part
        `(batch, Hkv, n)` in float32, or None. A query that sees no key gives zeros and minus
        infinity (with a sink logit: that logit).
    """
    query = view.parts[0].query
    batch, heads, m, width = query.shape
    alive: list[Tensor] = []
    parts: list[int] = []
    lengths = []
    kv_heads = value_width = 0
    for part in view.parts:
        if isinstance(part, Part):
            kind, fields = "dense", {"key": part.key, "value": part.value}
            mean = angles = None
            group = 0
        else:
            stored = part.stored
            kind, fields, mean = stored.kind, stored.fields, stored.mean
            angles, group = stored.angles, stored.group
        key = fields["key"]
        kv_heads, value_width = (
            key.shape[1],
            fields["value"].shape[3] * (2 if kind == "int4" else 1),
        )
        lengths.append(key.shape[2])
        parts += [_STORAGES[kind], key.shape[2], group]
        if angles is None:
            parts += [0, 0, 0, 0, 0]
        else:
            cos, sin = angles.cos, angles.sin
            parts += [cos.data_ptr(), sin.data_ptr(), 2 * cos.shape[1]]
            parts += [cos.stride(0), angles.interleaved]
        if part.mask is None:
            parts.append(0)
        else:
            alive.append(part.mask.float().contiguous())
            parts.append(alive[-1].data_ptr())
        for x in (part.query, *(fields.get(name) for name in _FIELDS), mean):
            if x is None:
                parts += [0, 0, 0, 0]
                continue
            x = _dense(x)
            alive.append(x)
            size = x.element_size()
            b, h, n, _ = x.stride()
            parts += [x.data_ptr(), b * size, h * size, n * size]
    out = _float32((batch, heads, m, value_width))
    lse = _float32((batch, heads, m))
    total = _float32((batch, kv_heads, sum(lengths))).zero_() if return_received else None
    sink = None if sink_logits is None else sink_logits.float().contiguous()
    numbers = np.array(
        [
            *(batch, heads, kv_heads, m, width, value_width, _KINDS[query.dtype], len(view.parts)),
            *(0 if x is None else x.data_ptr() for x in (sink, out, lse, total)),
            *parts,
        ],
        np.int64,
    )
    build().library.attnspan_decode(numbers.ctypes.data, scale, softcap or 0.0)
    scores = None if total is None else list(total.split(lengths, 2))
    return out.to(query.dtype if dtype is None else dtype), lse, scores
