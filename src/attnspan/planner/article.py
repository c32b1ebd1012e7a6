"""The claims of an article on long contexts, each beside the right value, as text and as JSON.

The article gives figures for Mistral 7B at 100,000 and at "128K" tokens. Each is computed here anew
from the planner's specs and formulas; nothing but the article's own words is typed in.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from attnspan.planner.claims import COST, Claim
from attnspan.planner.report import folded
from attnspan.planner.sparse_claims import SPARSITY


def claims() -> tuple[Claim, ...]:
    """All of them, in the article's order."""
    return tuple(make() for make in (*COST, *SPARSITY))


def text() -> str:
    """At most 100 columns."""
    lines = folded(_INTRODUCTION, "")
    for number, each in enumerate(claims(), 1):
        lines += ["", *folded(f"{number}. {each.claim}", "   ")]
        lines += folded(f"   {each.verdict.upper()}: {each.right}", "   ")
        lines += folded(f"   {each.why}", "   ")
        lines += [f"   {source}" for source in each.sources]
    return "\n".join(lines)


def markdown() -> str:
    """The same as a table."""
    lines = [
        "| | claim | verdict | what is right | why |",
        "|---|---|---|---|---|",
    ]
    for number, each in enumerate(claims(), 1):
        links = ", ".join(f"[{n}]({source})" for n, source in enumerate(each.sources, 1))
        cells = (each.claim, each.verdict, each.right, f"{each.why} {links}".strip())
        row = " | ".join(cell.replace("*", "\\*") for cell in cells)
        lines.append(f"| {number} | {row} |")
    return "\n".join(lines)


_INTRODUCTION = (
    "What an article on long contexts says, and what is right: Mistral 7B v0.1 in bf16 unless "
    "another model is named. Computed by `attnspan article` from the planner's specs and formulas."
)


def as_dict() -> dict[str, Any]:
    """Fit for JSON."""
    return {"claims": [asdict(each) for each in claims()]}
