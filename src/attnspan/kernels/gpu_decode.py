"""Decode attention on a GPU: a few queries over all that a cache holds, read as it is stored.

The keys of each KV head are cut into runs, one for each thread block; every run leaves its output
and its softmax's maximum and sum, and one pass merges them (flash-decoding,
https://pytorch.org/blog/flash-decoding). Given counters, the last block of a KV head merges its
runs itself, which saves a launch. All query heads of a KV head go through one product, so keys and
values are read once for them. Int8 codes are widened in registers; a key's scale goes on its
scores, a value's on its weights. Int4 keys, and keys that are still to be turned, are rebuilt and
turned in registers. Scores that are wanted afterwards, as the attention that keys received, lie in
float32 until the merging pass, which knows each row's sum.

Nothing here waits for the device or sizes memory by what lies on it, so calls can be captured in a
CUDA graph. A replay reads whatever then lies in the tensors that the captured call was given:
queries, keys, values, scales, means, angles and masks may be written in place between replays; how
many keys a view has, and its strides, are fixed. With `decode_rows` a captured graph serves a cache
that grows: lengths and starts are read on the device too. A ring buffer needs no start of its own,
since the order of keys in it is nothing to a softmax: while it fills, its length grows; once full,
every slot is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnspan.kernels.capability import lacks_hopper, processors_of
from attnspan.kernels.triton_launch import launch
from attnspan.kernels.view import Angles, KVView, Part, RawPart, Stored

MOST_ROWS = 64  # query heads of a KV head times queries
_WIDTHS = (64, 128)
_LEAST_RUN = 64  # keys below which a run isn't worth a thread block
_LOG2E = 1.4426950408889634
_WARPS = 4
_IN_FLIGHT = 32  # runs that a merging thread block reads at a time
_TOGETHER = 4  # KV heads of int4 that a thread block takes, which then reads angles once for them
_MERGED_ROWS = 512  # rows of runs up to which one thread block merges them faster than many
_CHUNK = 1024  # keys of a thread block in the last pass over saved scores


def lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What this implementation lacks for these inputs, as the end of a sentence; None: nothing.

    Args:
        q: `(batch, Hq, m, head_dim)`.
        k: `(batch, Hkv, n, head_dim)`; of stored keys, any tensor with as many heads and channels.
        v: as `k`.
    """
    if lack := lacks_hopper(q.device):
        return lack
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it has no {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in _WIDTHS or v.shape[-1] != q.shape[-1]:
        return f"its heads have {_WIDTHS[0]} or {_WIDTHS[1]} channels, values as keys"
    if q.shape[1] // max(1, k.shape[1]) * q.shape[2] > MOST_ROWS:
        return f"it takes up to {MOST_ROWS} queries of a KV head"
    return None


def decode(
    view: KVView,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_received: bool = False,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    """Attention of a view's few queries over all its parts, keys and values read as stored.

    Args:
        view: what a cache holds; angles in float32. A part's `length` may be any number up to its
            keys, zero included.
        scale: factor of the scores.
        softcap: as in `attnspan.attention`.
        sink_logits: as in `attnspan.attention`.
        return_received: give, for each part, the attention that its keys received, summed over the
            queries and the query heads of a KV head; takes the scores into memory.
        counters: int32 zeros, at least `batch * Hkv`, that are zeros again afterwards. With them
            one launch does, where the size allows. Calls that may run at the same time need each
            its own; so does each captured graph.

    Returns:
        `out (batch, Hq, m, head_dim)` in the queries' dtype, `lse (batch, Hq, m)` in float32, and
        for each part `(batch, Hkv, n)` in float32, or None. A query that sees no key gives zeros
        and minus infinity (with a sink logit: that logit).
    """
    pieces = [_piece(part) for part in view.parts]
    if return_received and len(pieces) > 1 and any(x.lengths is not None for x in pieces):
        raise ValueError("what keys received is given of one part with a length, not of several")
    return _attend(pieces, scale, softcap, sink_logits, return_received, counters)


def decode_rows(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    *,
    scale: float,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_received: bool = False,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention of a batch whose rows hold different numbers of keys, which the device knows.

    Row `b` sees the slots `starts[b] <= j < starts[b] + lengths[b]`; a rolling buffer may lie in
    them in any order. `lengths` and `starts` are read when the kernel runs, so a captured graph
    goes with a cache that grows or rolls. Slots that no query sees aren't read.

    Args:
        q: `(batch, Hq, m, head_dim)`, bfloat16 or float16.
        key: `(batch, Hkv, slots, head_dim)` in the dtype of `q`, or int8 codes.
        value: as `key`.
        lengths: int32 `(batch,)` on the device, each from 0 to `slots`.
        starts: int32 `(batch,)` on the device; None is zeros.
        scale: factor of the scores.
        key_scale: of int8, float16 `(batch, Hkv, slots, 1)`.
        value_scale: see key_scale.
        softcap: as in `decode`.
        sink_logits: as in `decode`.
        return_received: as in `decode`; slots outside a row's range receive zero.
        counters: as in `decode`.

    Returns:
        As `decode`; what was received is `(batch, Hkv, slots)` in float32, or None.
    """
    if key_scale is None or value_scale is None:
        piece = _Piece(q, "dense", {"key": key, "value": value}, lengths=lengths)
    else:
        fields = {"key": key, "value": value, "key_scale": key_scale, "value_scale": value_scale}
        piece = _Piece(q, "int8", fields, lengths=lengths)
    out, lse, scores = _attend(
        [piece], scale, softcap, sink_logits, return_received, counters, starts
    )
    return out, lse, None if scores is None else scores[0]


@dataclass
class _Piece:
    """A part of a view, whatever holds it."""

    query: Tensor
    kind: str
    fields: dict[str, Tensor]
    mask: Tensor | None = None
    mean: Tensor | None = None
    group: int = 0
    angles: Angles | None = None
    lengths: Tensor | None = None

    @property
    def keys(self) -> int:
        return self.fields["key"].shape[2]

    def blocks(self, rows: int) -> int:
        """Thread blocks that a processor needs to keep its memory busy."""
        few = self.kind == "dense" and self.is_plain and _warps_of_rows(rows) != 2
        return 1 if few else 2

    def together(self, rows: int) -> int:
        """KV heads that a thread block takes: several where it reads angles once for them."""
        key, angles = self.fields["key"], self.angles
        if self.kind != "int4" or self.group != 32 or key.shape[-1] != 64 or rows > 8:
            return 1
        words = [self.fields[name] for name in ("key", "value")]
        if any(x.data_ptr() % 16 or any(s % 64 for s in _strides(x)) for x in words):
            return 1
        scales = self.fields["key_scale"]
        if scales.data_ptr() % 4 or any(s % 2 for s in _strides(scales)):
            return 1
        if angles is not None:
            tables = angles.cos, angles.sin
            if angles.interleaved or angles.cos.shape[1] != 64:
                return 1
            if any(x.data_ptr() % 16 or x.stride(0) % 16 or x.stride(1) != 1 for x in tables):
                return 1
            if angles.cos.stride(0) != angles.sin.stride(0):
                return 1
        return _TOGETHER if key.shape[1] % _TOGETHER == 0 else 1

    @property
    def is_plain(self) -> bool:
        """Whether keys and values can be copied 16 bytes at a time and need no turning."""
        if self.kind == "int4" or self.angles is not None:
            return False
        step = 64 if self.kind == "int8" else 32  # bytes; what Triton knows of a stride: 16 units
        return all(
            x.data_ptr() % 16 == 0 and all(s * x.element_size() % step == 0 for s in _strides(x))
            for x in (self.fields["key"], self.fields["value"])
        )


def _piece(part: Part | RawPart) -> _Piece:
    if isinstance(part, Part):
        fields = {"key": part.key, "value": part.value}
        return _Piece(part.query, "dense", fields, part.mask, lengths=part.length)
    held: Stored = part.stored
    return _Piece(
        part.query,
        held.kind,
        held.fields,
        part.mask,
        held.mean,
        held.group,
        held.angles,
        part.length,
    )


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, heads and tokens; of one alone, zero, whatever torch says."""
    b, h, n = (s if size > 1 else 0 for s, size in zip(x.stride()[:3], x.shape[:3], strict=True))
    return b, h, n


@lru_cache(maxsize=4096)
def _runs(pairs: int, keys: int, slots: int, weight: int = 1) -> int:
    """Into how many runs to cut the keys of each of `pairs` KV heads, for `slots` thread blocks.

    In units of a dense key's time, as measured on an H200: each wave of blocks costs the keys of a
    run, each `weight`, and 128 more to start; each run costs 16 to merge, or 1 where many blocks
    merge.
    """

    def cost(runs: int) -> int:
        merging = 16 * min(runs, _IN_FLIGHT) + max(0, runs - _IN_FLIGHT)
        return -(-pairs * runs // slots) * (weight * -(-keys // runs) + 128) + merging

    most = max(1, min(-(-keys // _LEAST_RUN), max(4, slots // pairs)))
    best = min(range(1, most + 1), key=cost)
    # A merging block reads its runs by _IN_FLIGHT: few beyond a multiple would cost a round.
    over = best % _IN_FLIGHT
    return best - over if best > _IN_FLIGHT and over < _IN_FLIGHT // 4 else best


def _warps_of_rows(rows: int) -> int:
    """Warps of a thread block that have the same keys, and other rows of the product."""
    return max(1, _power_of_two(rows) // 16)


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _attend(
    pieces: list[_Piece],
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    return_received: bool,
    counters: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    from attnspan.kernels import gpu_decode_turned

    query = pieces[0].query
    batch, heads, m, width = query.shape
    kv_heads = pieces[0].fields["key"].shape[1]
    rows, pairs, device = heads // kv_heads * m, batch * kv_heads, query.device
    processors = processors_of(device)
    sizes = [piece.keys for piece in pieces]
    some = [piece for piece in pieces if piece.keys]
    together = [piece.together(rows) for piece in some]
    counts = [
        _runs(pairs // heads, piece.keys, piece.blocks(rows) * processors, 8 if heads > 1 else 1)
        for piece, heads in zip(some, together, strict=True)
    ]
    runs, keys = sum(counts), sum(sizes)
    # One piece of memory for what runs leave: outputs, then maxima and sums.
    scratch = torch.empty(pairs * runs * rows * (width + 2), dtype=torch.float32, device=device)
    part, stats = scratch, scratch[pairs * runs * rows * width :]
    out = torch.empty((batch, heads, m, width), dtype=query.dtype, device=device)
    lse = torch.empty((batch, heads, m), dtype=torch.float32, device=device)
    scores = received = None
    if return_received:
        scores = torch.empty((pairs, keys, rows), device=device)
        received = torch.empty((batch, kv_heads, keys), device=device)
    sink = None if sink_logits is None else sink_logits.contiguous()
    single = (
        counters is not None
        and not return_received
        and bool(some)
        and some[-1].is_plain
        and runs * rows <= _MERGED_ROWS
    )
    shared = {
        "starts": starts,
        "part": part,
        "stats": stats,
        "scores": scores,
        "factor": scale * _LOG2E if softcap is None else scale / softcap,
        "softcap": softcap,
        "runs": runs,
        "kv_heads": kv_heads,
        "scores_keys": keys,
        "M": m,
        "G": heads // kv_heads,
        "D": width,
    }
    end = {"sink": sink, "out": out, "lse": lse}
    with torch.cuda.device(device):
        first_run = first_key = 0
        for piece, count, at_once in zip(some, counts, together, strict=True):
            last = single and piece is some[-1]
            options = {**shared, "n": piece.keys, "first_run": first_run, "scores_first": first_key}
            options["lengths"] = piece.lengths
            if piece.is_plain:
                options |= {**end, "counters": counters if last else None}
                _stored(piece, (count, pairs), rows, options)
            elif at_once > 1:
                _int4(piece, (count, pairs // at_once), at_once, options)
            else:
                _turned(piece, (count, pairs), rows, options)
            first_run += count
            first_key += piece.keys
        if not single:
            chunk = min(_CHUNK, max(64, 4 * _CHUNK // _power_of_two(rows)))
            chunks = -(-keys // chunk) if return_received else 0
            # Many runs are merged a quarter of the channels at a time, so that all are in flight.
            channels = width if runs <= _IN_FLIGHT else 32
            finish: Any = gpu_decode_turned.finish
            launch(
                finish,
                (pairs, rows * (width // channels) + chunks),
                **end,
                **{name: shared[name] for name in ("part", "stats", "scores", "runs", "kv_heads")},
                **{name: shared[name] for name in ("starts", "M", "G", "D")},
                lengths=pieces[0].lengths,  # asked for by what keys received, of one piece only
                received=received,
                n=keys,
                PADDED=_power_of_two(rows),
                C=channels,
                RUNS=_IN_FLIGHT * (width // channels),
                CHUNK=chunk,
                num_warps=4,
                launch_pdl=True,
            )
    return out, lse, None if received is None else list(received.split(sizes, 2))


def _named(name: str, x: Tensor | None) -> dict[str, int]:
    strides = (0, 0, 0) if x is None else _strides(x)
    return dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), strides, strict=True))


def _common(piece: _Piece, key: Tensor, value: Tensor) -> dict[str, object]:
    """The arguments that all kernels take of a piece."""
    query = _dense(piece.query)
    mask = None if piece.mask is None else _dense(piece.mask)
    return {
        "q": query,
        "key": key,
        "value": value,
        "mask": mask,
        "mask_row": 0 if mask is None else mask.stride(0),
        **_named("q", query),
        **_named("key", key),
        **_named("value", value),
    }


def _stored(piece: _Piece, grid: tuple[int, int], rows: int, options: dict[str, object]) -> None:
    from attnspan.kernels import gpu_decode_stored

    key, value = (_dense(piece.fields[name]) for name in ("key", "value"))
    padded, warps_of_rows = max(8, _power_of_two(rows)), _warps_of_rows(rows)
    shape = {
        "N": padded,
        "W": _WARPS,
        "MOST": _IN_FLIGHT,
        "num_warps": _WARPS,
    }
    wide = 128 // key.shape[-1]  # heads of 64 take twice the keys for the same bytes
    if piece.kind == "dense":
        kernel: Any = gpu_decode_stored.attend_dense
        launch(
            kernel,
            grid,
            **_common(piece, key, value),
            **options,
            **shape,
            T=16 * wide,
            STAGES={1: 3, 2: 3, 4: 12}[warps_of_rows],
        )
        return
    key_scale, value_scale = piece.fields["key_scale"], piece.fields["value_scale"]
    kernel = gpu_decode_stored.attend_int8
    launch(
        kernel,
        grid,
        **_common(piece, key.view(torch.int32), value.view(torch.int32)),
        **options,
        **shape,
        key_scale=key_scale,
        value_scale=value_scale,
        **_named("ks", key_scale),
        **_named("vs", value_scale),
        T=32 * wide,
        STAGES=2 * warps_of_rows,
    )


_KINDS = {"dense": 0, "int8": 1, "int4": 2}


def _int4(piece: _Piece, grid: tuple[int, int], heads: int, options: dict[str, Any]) -> None:
    from attnspan.kernels import gpu_decode_int4

    fields = {name: _dense(x) for name, x in piece.fields.items()}
    words = {name: fields[name].view(torch.int32) for name in ("key", "value", "key_scale")}
    assert piece.mean is not None
    mean = _dense(piece.mean.float())
    angles = piece.angles
    kernel: Any = gpu_decode_int4.attend_int4
    launch(
        kernel,
        grid,
        **_common(piece, words["key"], words["value"]),
        **options,
        key_scale=words["key_scale"],
        value_scale=fields["value_scale"],
        value_least=fields["value_least"],
        mean=mean,
        mean_batch=mean.stride(0),
        mean_head=mean.stride(1),
        cos=None if angles is None else angles.cos,
        sin=None if angles is None else angles.sin,
        angle_row=0 if angles is None else angles.cos.stride(0),
        **_named("ks", words["key_scale"]),
        **_named("vs", fields["value_scale"]),
        **_named("vl", fields["value_least"]),
        N=8,
        W=heads,
        T=16,
        STAGES=4,
        num_warps=heads,
    )


def _turned(piece: _Piece, grid: tuple[int, int], rows: int, options: dict[str, object]) -> None:
    from attnspan.kernels import gpu_decode_turned

    fields = {name: _dense(x) for name, x in piece.fields.items()}
    mean = None if piece.mean is None or piece.kind != "int4" else _dense(piece.mean.float())
    mean_at = _named("mean", mean)
    angles = {"cos": None, "sin": None, "angle_row": 0, "TURNED": 0, "INTERLEAVED": False}
    if piece.angles is not None:
        cos, sin = _dense(piece.angles.cos), _dense(piece.angles.sin)
        if cos.stride(0) != sin.stride(0):
            cos, sin = cos.contiguous(), sin.contiguous()
        angles = {
            "cos": cos,
            "sin": sin,
            "angle_row": cos.stride(0),
            "TURNED": 2 * cos.shape[1],
            "INTERLEAVED": piece.angles.interleaved,
        }
    scales = {name: fields.get(name) for name in ("key_scale", "value_scale", "value_least")}
    # Partners of channels that aren't the other half of the head are read a second time.
    simple = angles["TURNED"] in (0, piece.query.shape[-1]) and not angles["INTERLEAVED"]
    kernel: Any = gpu_decode_turned.attend_turned
    launch(
        kernel,
        grid,
        **_common(piece, fields["key"], fields["value"]),
        **options,
        **scales,
        **angles,
        mean=mean,
        mean_batch=mean_at["mean_batch"],
        mean_head=mean_at["mean_head"],
        **_named("ks", scales["key_scale"]),
        **_named("vs", scales["value_scale"]),
        **_named("vl", scales["value_least"]),
        KIND=_KINDS[piece.kind],
        PADDED=max(16, _power_of_two(rows)),
        GROUP=piece.group,
        BLOCK=64 if simple and rows <= 32 else 32,
        num_warps=4,
        num_stages=3 if simple else 1,
    )
