"""Each figure of a plan as a formula with its numbers, for who would redo it by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnspan.planner.formulas import pairs_text, read_text
from attnspan.planner.operations import keys_read, pair_operations, read_operations
from attnspan.planner.seen import Capped, Chunks
from attnspan.planner.spec import ModelSpec
from attnspan.planner.stack import CACHE
from attnspan.planner.weight_bytes import apart, expert

if TYPE_CHECKING:
    from attnspan.planner.plan import Kind, Plan


@dataclass(frozen=True)
class Line:
    """`formula` in words, `numbers` the same as an expression of Python, `value` what it gives."""

    name: str
    formula: str
    numbers: str
    value: float
    unit: str

    def __str__(self) -> str:
        return f"{self.name}: {self.formula}\n    {self.numbers} = {_text(self.value)} {self.unit}"


def explain(plan: Plan) -> tuple[Line, ...]:
    """Sizes first, then operations, bytes and seconds, as the report has them."""
    return tuple(
        line
        for part in (_cache, _weights, _memory, _working, _prefill, _decode, _stack)
        for line in part(plan)
    )


def _text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _token(spec: ModelSpec, storage: str) -> tuple[str, str]:
    if spec.latent is not None:
        return "(rank + rope) * 2", f"({spec.latent.rank} + {spec.latent.rope}) * 2"
    kv, dim = spec.kv_heads, spec.head_dim
    match storage:
        case "int8":
            return "2 * kv_heads * (head_dim + 2)", f"2 * {kv} * ({dim} + 2)"
        case "int4":
            words = "kv_heads * (head_dim + 2 * (head_dim // 32) + 4)"
            return words, f"{kv} * ({dim} + 2 * ({dim} // 32) + 4)"
    return "2 * kv_heads * head_dim * 2", f"2 * {kv} * {dim} * 2"


def _cache(plan: Plan) -> list[Line]:
    spec, batch = plan.spec, plan.batch
    words, numbers = _token(spec, plan.storage)
    token, lines = plan.token_bytes, []
    lines.append(Line("keys and values of a token in a layer", words, numbers, token, "bytes"))
    for kind in plan.kinds:
        about = f"{kind.name}: {kind.sees}"
        if not kind.held:
            continue
        words, numbers = _held(plan, kind)
        lines.append(Line(f"tokens held, {about}", words, numbers, kind.held, "tokens"))
        words, numbers = (
            "layers * batch * held * token",
            (f"{kind.layers} * {batch} * {kind.held} * {token}"),
        )
        if kind.layers * batch * kind.held * token != kind.bytes:
            words = "layers * bytes of one, as the engine allocates"
            numbers = f"{kind.layers} * {kind.bytes // kind.layers}"
        lines.append(Line(f"cache, {about}", words, numbers, kind.bytes, "bytes"))
    parts = [str(kind.bytes) for kind in plan.kinds if kind.held]
    parts += [str(plan.cache.other)] if plan.cache.other else []
    lines.append(Line("KV cache", "its parts", " + ".join(parts), plan.cache.total, "bytes"))
    if plan.devices > 1:
        lines.append(
            Line(
                "KV cache of a device",
                "layers * batch * ceil(held / devices) * token",
                " + ".join(
                    f"{kind.layers} * {batch} * -(-{kind.held} // {plan.devices}) * {token}"
                    for kind in plan.kinds
                    if kind.held
                ),
                plan.cache_share,
                "bytes",
            )
        )
    return lines


def _held(plan: Plan, kind: Kind) -> tuple[str, str]:
    n = plan.context
    match kind.view:
        case Capped(None) if kind.held == n:
            return "context", str(n)
        case Capped(int(kept), 1) if kind.held == min(n, kept + 1):
            return "min(context, seen)", f"min({n}, {kept + 1})"
        case Capped(int(kept), block) if kind.held == min(n, kept + block):
            return "min(context, kept + block)", f"min({n}, {kept} + {block})"
        case Chunks(block, before) if kind.held == min(n, block * (1 + before)):
            return "min(context, chunk)", f"min({n}, {block * (1 + before)})"
        case _ if plan.engine == "theory":
            return "the most that is held at once", str(kind.held)
    return f"as {plan.engine} allocates", str(kind.held)


def _coded(count: str, kind: str) -> str:
    if kind == "bf16":
        return f"2 * {count}"
    codes = f"-(-{count} * {8 if kind == 'int8' else 4} // 8)"
    return f"{codes} + 2 * -(-{count} // 128)"


def _weights(plan: Plan) -> list[Line]:
    spec, kind = plan.spec, plan.weights_kind
    tables = apart(spec)
    words = {
        "bf16": "2 * matrices + 2 * embeddings",
        "int8": "matrices + 2 * ceil(matrices / 128) + 2 * embeddings",
        "int4": "matrices / 2 + 2 * ceil(matrices / 128) + 2 * embeddings",
    }[kind]
    times = 1 if spec.tied else 2
    return [
        Line(
            "embeddings" if spec.tied else "embedding and output layer",
            f"{times} * vocabulary * hidden" + " + others" * bool(spec.aside),
            f"{times} * {spec.vocabulary} * {spec.hidden}" + f" + {spec.aside}" * bool(spec.aside),
            tables,
            "weights",
        ),
        Line(
            "matrices",
            "parameters - embeddings",
            f"{spec.parameters} - {tables}",
            spec.parameters - tables,
            "weights",
        ),
        Line(
            f"weights in {kind}",
            words,
            f"{_coded(str(spec.parameters - tables), kind)} + 2 * {tables}",
            plan.weights,
            "bytes",
        ),
    ]


def _memory(plan: Plan) -> list[Line]:
    peak = plan.activations
    lines = [
        Line(
            f"prefill's activations ({peak.phase})",
            " + ".join(name for name, _ in peak.parts),
            " + ".join(str(count) for _, count in peak.parts),
            peak.bytes,
            "bytes",
        ),
        Line(
            "memory of a device",
            "weights + cache + activations",
            f"{plan.weights} + {plan.cache_share} + {peak.bytes}",
            plan.total,
            "bytes",
        ),
    ]
    if plan.memory is not None and plan.spare is not None:
        lines.append(
            Line(
                "to spare",
                "memory - total",
                f"{plan.memory} - {plan.total}",
                plan.spare,
                "bytes",
            )
        )
    return lines


def _working(plan: Plan) -> list[Line]:
    spec, working, n = plan.spec, plan.working, plan.context
    rows, every = working.head // (2 * n), plan.batch * spec.heads
    lines = [
        Line(
            "scores of one head and layer",
            "queries * keys * 2",
            f"{rows} * {n} * 2",
            working.head,
            "bytes",
        )
    ]
    for name, unit, words, value in (
        ("standard attention", working.head, "batch * heads * scores", working.standard),
        ("flash attention", 4 * rows, "batch * heads * 4 * queries", working.flash),
    ):
        if every * unit == value:
            numbers = f"{plan.batch} * {spec.heads} * {unit}"
        else:
            words, numbers = "as the engine has it", str(value)
        lines.append(Line(f"working memory of {name}", words, numbers, value, "bytes"))
    return lines


def _prefill(plan: Plan) -> list[Line]:
    spec, n, batch, phase = plan.spec, plan.context, plan.batch, plan.prefill
    share = " / devices" if plan.devices > 1 else ""
    per, heads = pair_operations(spec), spec.heads
    output = f"{spec.vocabulary} * {spec.hidden}"
    used = spec.active_parameters
    lines = [
        Line(
            "weights that a token is multiplied with",
            "those of a token - embeddings",
            f"{used} - {apart(spec)}",
            spec.linear_parameters,
            "weights",
        ),
        Line(
            "prefill, products",
            "2 * batch * (context * weights + vocabulary * hidden)" + share,
            _shared(f"2 * {batch} * ({n} * {spec.linear_parameters} + {output})", plan),
            phase.linear,
            "operations",
        ),
    ]
    for kind in plan.kinds:
        words, numbers = pairs_text(kind.view, n, kind.pairs)
        lines.append(
            Line(f"pairs, {kind.name}: {kind.sees}", words, numbers, kind.pairs, "pairs in a layer")
        )
    pairs = " + ".join(f"{kind.layers} * {kind.pairs}" for kind in plan.kinds)
    lines.append(
        Line(
            "prefill, attention",
            "batch * heads * operations of a pair * pairs of all layers" + share,
            _shared(f"{batch} * {heads} * {per} * ({pairs})", plan),
            phase.attention,
            "operations",
        )
    )
    owners = sum(kind.layers for kind in plan.kinds if kind.held)
    stored = _token(spec, plan.storage)[1]
    size = n if plan.chunk is None else min(plan.chunk, n)
    whole, rest = divmod(n, size)
    read_words, read = _read_weights(plan, batch * size)
    if plan.chunk is not None:
        read_words, read = f"steps * ({read_words})", f"{whole} * ({read})"
        read += f" + {_read_weights(plan, batch * rest)[1]}" if rest else ""
    if plan.ring is not None:
        words = "(ceil(context / devices) * token * (layers that hold + layers) + 2 * received)"
        numbers = (
            f"(-(-{n} // {plan.devices}) * ({stored}) * ({owners} + {spec.layers}) "
            f"+ 2 * {plan.ring.sent})"
        )
    else:
        words = "token * (layers that hold * context + keys that the layers read)"
        keys = " + ".join(f"{kind.layers} * {keys_read(n, size, kind.read)}" for kind in plan.kinds)
        numbers = f"({stored}) * ({owners} * {n} + {keys})"
    lines.append(
        Line(
            "prefill, bytes",
            f"{read_words} + batch * {words}",
            f"{read} + {batch} * {numbers}",
            phase.bytes,
            "bytes",
        )
    )
    return [*lines, *_rates(plan, "prefill")]


def _shared(numbers: str, plan: Plan) -> str:
    return f"-(-({numbers}) // {plan.devices})" if plan.devices > 1 else numbers


def _decode(plan: Plan) -> list[Line]:
    spec, n, batch, phase = plan.spec, plan.context, plan.batch, plan.decode
    if phase is None:
        return []
    lines = []
    for kind in plan.kinds:
        words, numbers = read_text(kind.view, n, kind.read)
        lines.append(
            Line(f"keys read, {kind.name}: {kind.sees}", words, numbers, kind.read, "keys")
        )
    reads = " + ".join(f"{kind.layers} * -(-{kind.read} // {plan.devices})" for kind in plan.kinds)
    if plan.devices == 1:
        reads = " + ".join(f"{kind.layers} * {kind.read}" for kind in plan.kinds)
    output = f"{spec.vocabulary} * {spec.hidden}"
    words, read = _read_weights(plan, batch)
    lines += [
        Line(
            "one token, products",
            "2 * batch * (weights + vocabulary * hidden)",
            f"2 * {batch} * ({spec.linear_parameters} + {output})",
            phase.linear,
            "operations",
        ),
        Line(
            "one token, attention",
            "batch * heads * operations of a key * keys of all layers",
            f"{batch} * {spec.heads} * {read_operations(spec)} * ({reads})",
            phase.attention,
            "operations",
        ),
        Line(
            "one token, bytes",
            f"{words} + batch * token * keys of all layers",
            f"{read} + {batch} * {plan.token_bytes} * ({reads})",
            phase.bytes,
            "bytes",
        ),
    ]
    return [*lines, *_rates(plan, "decode")]


def _read_weights(plan: Plan, tokens: int) -> tuple[str, str]:
    """Bytes of weights that so many tokens at once read."""
    spec, kind = plan.spec, plan.weights_kind
    words, count = "matrices", str(spec.parameters - apart(spec))
    if spec.experts is not None:
        total, active = spec.experts.total, spec.experts.active
        count = f"({count} - {total} * (1 - {active} / {total}) ** {tokens} * {expert(spec):.15g})"
        words = "(matrices - experts * (1 - active / experts) ** tokens * expert)"
    read = _coded(count, kind)
    if spec.experts is not None:
        read = f"round({read})"
    return (
        f"{words} in {kind} + 2 * vocabulary * hidden",
        f"{read} + 2 * {spec.vocabulary} * {spec.hidden}",
    )


def _rates(plan: Plan, which: str) -> list[Line]:
    phase = plan.prefill if which == "prefill" or plan.decode is None else plan.decode
    name = "prefill" if which == "prefill" else "one token"
    device, ring, link, layers = plan.device, plan.ring, plan.link, plan.spec.layers
    calls, calls_words = str(layers), "layers"
    if which == "prefill" and plan.chunk is not None:
        calls, calls_words = f"{layers} * -(-{plan.context} // {plan.chunk})", "layers * steps"
    seconds = (
        f"max(products / rate + attention / rate, bytes / bandwidth) + {calls_words} * call",
        f"max({phase.linear} / {device.linear:.15g} + {phase.attention} / {device.forward:.15g}, "
        f"{phase.bytes} / {device.memory_bandwidth:.15g}) + {calls} * {device.call:.15g}",
    )
    if ring is not None and which == "prefill":
        seconds = (
            "batch * (attention + products), as `attnspan ring simulate` has them",
            f"{plan.batch} * ({ring.attention:.15g} + {ring.linear:.15g})",
        )
    elif link is not None:
        part = plan.batch * plan.spec.heads * (plan.spec.head_dim + 1) * 4 * (plan.devices - 1)
        seconds = (
            f"{seconds[0]} + layers * (latency + outputs / link)",
            f"{seconds[1]} + {layers} * ({link.latency:.15g} + {part} / {link.bandwidth:.15g})",
        )
    lines = [
        Line(
            f"{name}, intensity",
            "operations / bytes",
            f"({phase.linear} + {phase.attention}) / {phase.bytes}",
            phase.intensity,
            "operations a byte",
        )
    ]
    if which == "prefill":
        lines.append(
            Line(
                f"the ridge of {device.name}",
                "products' rate / bandwidth",
                f"{device.linear:.15g} / {device.memory_bandwidth:.15g}",
                phase.ridge,
                "operations a byte",
            )
        )
    lines.append(Line(f"{name}, time", *seconds, phase.seconds, "s"))
    return lines


def _stack(plan: Plan) -> list[Line]:
    lines = [
        Line(
            f"times less, {each.name}",
            "before / after",
            f"{each.before} / {each.after}",
            each.ratio,
            f"times ({each.quantity})",
        )
        for each in plan.stack
        if each.after
    ]
    of_cache = [each for each in plan.stack if each.quantity == CACHE]
    if of_cache:
        lines.append(
            Line(
                "times less, KV cache in all",
                "product of its factors",
                f"{of_cache[0].before} / {of_cache[-1].after}",
                of_cache[0].before / of_cache[-1].after,
                "times",
            )
        )
    return lines
