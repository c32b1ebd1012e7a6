"""Each figure of a plan as a formula with its numbers, for who would redo it by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnspan.planner.phases import pair_operations, read_operations
from attnspan.planner.seen import Capped, Chunks, Pooled, Strides, View
from attnspan.planner.spec import ModelSpec
from attnspan.planner.stack import CACHE
from attnspan.planner.weights import embeddings, expert, multiplied

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
        """`name: formula = numbers = value unit`."""
        return f"{self.name}: {self.formula} = {self.numbers} = {_text(self.value)} {self.unit}"


def explain(plan: Plan) -> tuple[Line, ...]:
    """Sizes first, then operations, bytes and seconds, as the report has them."""
    return tuple(
        line
        for part in (_cache, _weights, _memory, _working, _prefill, _decode, _stack)
        for line in part(plan)
    )


def _text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
