"""Patterns: which (query position, key position) pairs see each other."""

from attnspan.patterns.algebra import And, Cover, Not, Or, Pattern
from attnspan.patterns.library import Causal, Full, Sinks, SlidingWindow

__all__ = ["And", "Causal", "Cover", "Full", "Not", "Or", "Pattern", "Sinks", "SlidingWindow"]
