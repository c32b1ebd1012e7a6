"""The formulas of `attnspan.planner.seen` as text, with their numbers."""

from __future__ import annotations

from attnspan.planner.seen import Capped, Chunks, Pooled, Strides, View


def pairs_text(view: View, n: int, pairs: int) -> tuple[str, str]:
    """How many pairs a prefill of n tokens has, in words and in numbers."""
    match view:
        case Capped(None):
            return "n * (n + 1) / 2", f"{n} * ({n} + 1) // 2"
        case Capped(int(kept), 1):
            w = min(n, kept + 1)
            return "n * W - W * (W - 1) / 2", f"{n} * {w} - {w} * ({w} - 1) // 2"
        case Capped(int(kept), b):
            blocks, rest = divmod(n, b)
            return "what each block's start keeps, and the tokens since", (
                f"{b} * sum(min(k * {b}, {kept}) for k in range({blocks})) + {rest} * "
                f"min({blocks * b}, {kept}) + {blocks} * {b} * ({b} + 1) // 2 + {rest} * "
                f"({rest} + 1) // 2"
            )
        case Pooled(p):
            blocks, rest = divmod(n, p.block)
            b, start = p.block, p.sinks + p.window - 1

            def stays(k: str) -> str:
                groups = f"(max(0, {k} * {b} - {start}) // {p.rate})"
                return f"({k} * {b} - {p.rate} * {groups} + min({p.memory}, {groups}))"

            return "what each block's start keeps, and the tokens since", (
                f"{b} * sum({stays('k')} for k in range({blocks})) + {rest} * "
                f"{stays(str(blocks))} + {blocks} * {b} * ({b} + 1) // 2 + {rest} * "
                f"({rest} + 1) // 2"
            )
        case Chunks(block, before):
            blocks, rest = divmod(n, block)
            numbers = f"{blocks} * {block} * ({block} + 1) // 2 + {rest} * ({rest} + 1) // 2"
            if before:
                return "pairs of each block, and n - block queries with one before", (
                    f"{numbers} + max(0, {n} - {block}) * {block}"
                )
            return "pairs of each block", numbers
        case Strides(window, stride):
            w = min(n, window)
            first, last = -(-window // stride), (n - 1) // stride
            return (
                "n * W - W * (W - 1) / 2 + (n - d for each multiple d of the stride from W on)",
                (
                    f"{n} * {w} - {w} * ({w} - 1) // 2 + sum({n} - {stride} * k for k in "
                    f"range({first}, {last + 1}))"
                ),
            )
    return "counted", str(pairs)


def read_text(view: View, n: int, read: int) -> tuple[str, str]:
    """How many keys the last of n tokens reads, in words and in numbers."""
    match view:
        case Capped(None):
            return "n", str(n)
        case Capped(int(kept), 1):
            return "min(n, seen)", f"min({n}, {kept + 1})"
        case Capped(int(kept), b):
            last = (n - 1) // b * b
            return "kept at the last grid point, and since", f"min({last}, {kept}) + {n} - {last}"
        case Chunks(block, before):
            extra = f" + {block}" if before and n > block else ""
            return "tokens of its block", f"({n} - 1) % {block} + 1{extra}"
        case Strides(window, stride):
            first, last = -(-window // stride), (n - 1) // stride
            return "min(n, W) and multiples of the stride from W on", (
                f"min({n}, {window}) + max(0, {last} - {first} + 1)"
            )
    return "counted", str(read)
