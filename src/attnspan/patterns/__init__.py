"""Patterns: which (query position, key position) pairs see each other."""

from attnspan.patterns.algebra import And, Not, Or, Pattern
from attnspan.patterns.library import (
    Blockwise,
    Causal,
    Documents,
    Full,
    GlobalTokens,
    Longformer,
    Sinks,
    SlidingWindow,
    Strided,
)
from attnspan.patterns.text import parse
from attnspan.patterns.tiles import pairs, plan

__all__ = [
    "And",
    "Blockwise",
    "Causal",
    "Documents",
    "Full",
    "GlobalTokens",
    "Longformer",
    "Not",
    "Or",
    "Pattern",
    "Sinks",
    "SlidingWindow",
    "Strided",
    "pairs",
    "parse",
    "plan",
]
