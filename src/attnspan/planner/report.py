"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from attnspan.planner.held import layer_policies
from attnspan.planner.quantities import scaled, short, shown
from attnspan.planner.stack import CACHE, product

if TYPE_CHECKING:
    from attnspan.planner.compare import Row
    from attnspan.planner.operations import Phase
    from attnspan.planner.plan import Plan

WIDTH = 100


def report(plan: Plan) -> str:
    """At most 100 columns; sizes in GiB, MiB and KiB, which count in 1,024s."""
    parts = [_head(plan), _kinds(plan), _memory(plan), _working(plan), _phases(plan), _stack(plan)]
    if plan.notes:
        parts.append("\n".join(line for note in plan.notes for line in folded(note)))
    return "\n\n".join(parts)


def folded(text: str, indent: str = "  ") -> list[str]:
    return wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _head(plan: Plan) -> str:
    spec = plan.spec
    asked = [f"{plan.context:,} tokens"]
    asked += [f"batch {plan.batch}"] if plan.batch > 1 else []
    if plan.policy is not None:
        asked.append(f"policy {plan.policy}")
    if plan.pattern is not None:
        asked.append(f"pattern {plan.pattern}")
    asked += [f"{plan.storage} cache", f"{plan.weights_kind} weights", f"bytes as in {plan.engine}"]
    if plan.chunk is not None:
        asked.append(f"prefill in steps of {min(plan.chunk, plan.context):,}")
    if plan.devices > 1:
        asked.append(f"{plan.devices} devices")
    size = f"{scaled(spec.parameters)} weights"
    if spec.active is not None and spec.active != spec.parameters:
        size += f", {scaled(spec.active)} of them for a token"
    heads = f"{spec.heads} query and {spec.kv_heads} KV heads of {spec.head_dim}"
    return "\n".join(
        [
            *folded(f"{spec.name}: {size}, {spec.layers} layers, {heads}"),
            *folded(f"  {spec.source}"),
            *folded(", ".join(asked)),
        ]
    )


def _kinds(plan: Plan) -> str:
    width = max(9, *(len(_label(kind.name, kind.sees)) for kind in plan.kinds))
    width = min(width, 52)
    lines = [
        f"{'KV cache':{width + 2}} {'layers':>6} {'holds':>13} {'last reads':>11} {'bytes':>12}"
    ]
    lines += [
        f"  {_label(kind.name, kind.sees)[:width]:{width}} {kind.layers:6} {kind.held:13,} "
        f"{kind.read:11,} {shown(kind.bytes):>12}"
        for kind in plan.kinds
    ]
    if plan.cache.other:
        lines.append(f"  {'tables and padding':{width}} {shown(plan.cache.other):>45}")
    owners = sum(kind.layers for kind in plan.kinds if kind.held)
    lines.append(
        f"  A token's keys and values: {plan.token_bytes:,} bytes in a layer, "
        f"{plan.token_bytes * owners:,} in all."
    )
    if plan.reach is not None:
        sinks = any(policy.leading for policy in layer_policies(plan.spec, plan.policy))
        apart = ", kept sinks apart" if sinks else ""
        lines.append(f"  All layers together reach at most {plan.reach:,} tokens back{apart}.")
    return "\n".join(lines)


def _label(name: str, sees: str) -> str:
    return f"{name}: {sees}"


def _memory(plan: Plan) -> str:
    title = "Memory of a device" if plan.devices > 1 else "Memory"
    rows = [
        ("weights", plan.weights),
        ("KV cache", plan.cache_share),
        (f"prefill's activations ({plan.activations.phase})", plan.activations.bytes),
    ]
    lines = [title, *(f"  {name:46} {shown(count):>12}" for name, count in rows)]
    lines.append(f"  {'in all':46} {shown(plan.total):>12}")
    if plan.memory is not None and plan.spare is not None:
        verdict = (
            f"fits, {shown(plan.spare)} to spare"
            if plan.fits
            else f"doesn't fit, {shown(-plan.spare)} too much"
        )
        lines.append(f"  {'a device has':46} {shown(plan.memory):>12}: {verdict}")
    return "\n".join(lines)


def _working(plan: Plan) -> str:
    working = plan.working
    return "\n".join(
        [
            "Attention's working memory in prefill",
            f"  {'standard: scores of one head and layer, bf16':46} {shown(working.head):>12}",
            f"  {'standard: what is alive at once, of all heads':46} {shown(working.standard):>12}",
            f"  {'flash: no scores, a log-sum-exp for each query':46} {shown(working.flash):>12}",
        ]
    )


def _phases(plan: Plan) -> str:
    device = plan.device
    lines = [
        f"{'':12} {'operations':>11} {'of attention':>12} {'bytes':>12} {'ops/byte':>9} "
        f"{'bound by':>9} {'time':>9}"
    ]
    lines.append(_phase("prefill", plan.prefill))
    if plan.decode is not None:
        lines.append(_phase("one token", plan.decode))
    lines += folded(
        f"  {device.name}: products {device.linear / 1e12:.4g} TFLOP/s, attention "
        f"{device.forward / 1e12:.4g}, memory {device.memory_bandwidth / 1e9:.4g} GB/s, so from "
        f"{plan.prefill.ridge:.3g} operations a byte on computing is the bound. ({device.source})"
    )
    if plan.ring is not None and plan.link is not None:
        ring = plan.ring
        lines += folded(
            f"  A ring in zigzag: {short(ring.communication)} of "
            f"exchanges a sequence over {plan.link.name}, {short(ring.exposed)} of them not "
            f"hidden; a device sends {shown(ring.sent)}. ({plan.link.source})"
        )
    return "\n".join(lines)


def _phase(name: str, phase: Phase) -> str:
    return (
        f"{name:12} {scaled(phase.operations):>11} {phase.attention / phase.operations:12.1%} "
        f"{shown(phase.bytes):>12} {phase.intensity:9,.1f} {phase.bound:>9} "
        f"{short(phase.seconds):>9}"
    )


def _stack(plan: Plan) -> str:
    lines = [f"{'What shrinks what':48} {'from':>12} {'to':>12} {'times':>8}"]
    of_cache = [each for each in plan.stack if each.quantity == CACHE]
    lines += [_factor(each.name, each.before, each.after) for each in of_cache]
    if of_cache:
        whole = of_cache[0].before, of_cache[-1].after
        lines.append(_factor("KV cache, in all", *whole))
    lines += [
        _factor(each.name, each.before, each.after) for each in plan.stack if each.quantity != CACHE
    ]
    lines.append("  The last is working memory of prefill; it leaves the cache as it is.")
    return "\n".join(lines)


def _factor(name: str, before: int, after: int) -> str:
    ratio = before / after if after else float("inf")
    return f"  {name:46} {shown(before):>12} {shown(after):>12} {ratio:8,.2f}"


def table(rows: Sequence[Row]) -> str:
    """Policies and patterns beside full attention."""
    lines = [
        f"{'':14} {'cache':>11} {'full/':>6} {'prefill pairs':>13} {'full/':>6} {'time':>9} "
        f"{'token reads':>11} {'full/':>6} {'time':>9}"
    ]
    lines += [
        f"{row.name:14} {shown(row.cache):>11} {row.cache_ratio:6.2f} {scaled(row.pairs):>13} "
        f"{row.pairs_ratio:6.2f} {short(row.prefill_seconds):>9} {shown(row.decode_bytes):>11} "
        f"{row.decode_ratio:6.2f} {short(row.decode_seconds):>9}"
        for row in rows
    ]
    named = "; ".join(f"{row.name} ({row.sees})" for row in rows if row.sees)
    lines += folded(f"  {named}.")
    lines += folded(
        "  full: as if no layer had a window; full/: its figure over this one's. Pairs are those "
        "of all layers, reads those of weights and cache; the whole context is on one device."
    )
    return "\n".join(lines)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Sizes in bytes, times in seconds, sources beside the rates."""
    spec = plan.spec
    return {
        "model": {**asdict(spec), "windows": list(spec.windows), "shares": list(spec.shares)},
        "context": plan.context,
        "batch": plan.batch,
        "policy": None if plan.policy is None else str(plan.policy),
        "pattern": plan.pattern,
        "storage": plan.storage,
        "weights_kind": plan.weights_kind,
        "engine": plan.engine,
        "chunk": plan.chunk,
        "devices": plan.devices,
        "device": asdict(plan.device),
        "link": None if plan.link is None else asdict(plan.link),
        "kinds": [
            {
                "name": kind.name,
                "sees": kind.sees,
                "layers": kind.layers,
                "held": kind.held,
                "bytes": kind.bytes,
                "read": kind.read,
                "pairs": kind.pairs,
            }
            for kind in plan.kinds
        ],
        "token_bytes": plan.token_bytes,
        "reach": plan.reach,
        "cache": {
            "total": plan.cache.total,
            "other": plan.cache.other,
            "full_pages": plan.cache.full_pages,
            "of_a_device": plan.cache_share,
        },
        "weights": plan.weights,
        "activations": {
            "bytes": plan.activations.bytes,
            "phase": plan.activations.phase,
            "parts": dict(plan.activations.parts),
        },
        "working": asdict(plan.working),
        "prefill": _phase_dict(plan.prefill),
        "decode": None if plan.decode is None else _phase_dict(plan.decode),
        "ring": None if plan.ring is None else asdict(plan.ring),
        "stack": [{**asdict(each), "ratio": each.ratio} for each in plan.stack],
        "stack_of_the_cache": product(plan.stack),
        "total": plan.total,
        "memory": plan.memory,
        "fits": plan.fits,
        "spare": plan.spare,
        "notes": list(plan.notes),
    }


def _phase_dict(phase: Phase) -> dict[str, Any]:
    return {
        **asdict(phase),
        "operations": phase.operations,
        "intensity": phase.intensity,
        "bound": phase.bound,
    }
