"""Patterns as text: `parse(str(pattern)) == pattern`."""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import Any

from attnspan.patterns import library
from attnspan.patterns.algebra import And, Not, Or, Pattern
from attnspan.patterns.placed import Placed

NAMED: dict[str, type[Pattern]] = {
    kind.__name__: kind
    for kind in (
        library.Blockwise,
        library.Causal,
        library.Documents,
        library.Full,
        library.GlobalTokens,
        library.Longformer,
        library.Sinks,
        library.SlidingWindow,
        library.Strided,
    )
}


@lru_cache(maxsize=256)
def parse(text: str) -> Pattern:
    """The pattern that a text names, such as `SlidingWindow(4096) | Sinks(4)`.

    Nothing of the text is executed: it may hold the named patterns with numbers, True, False and
    tuples as arguments, `&`, `|`, `~` and brackets.

    Raises:
        ValueError: one sentence that says what of the text is not allowed.
        TypeError: it is no text.

    >>> parse("Causal() & ~SlidingWindow(4, include_self=False)")
    Causal() & ~SlidingWindow(4, include_self=False)
    """
    if not isinstance(text, str):
        raise TypeError(f"pattern {text!r} is a {type(text).__name__}; a text is allowed")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"pattern {text!r} is no expression; {_ALLOWED}") from error
    return _pattern(tree, text)


_ALLOWED = f"allowed are {', '.join(NAMED)}, joined by &, | and ~"


def _pattern(node: ast.expr, text: str) -> Pattern:
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return And(_pattern(left, text), _pattern(right, text))
        case ast.BinOp(left, ast.BitOr(), right):
            return Or(_pattern(left, text), _pattern(right, text))
        case ast.UnaryOp(ast.Invert(), inner):
            return Not(_pattern(inner, text))
        case ast.Call(ast.Name("Placed"), [inner, *numbers], []) if numbers:
            try:
                return Placed(_pattern(inner, text), *(_value(x, text) for x in numbers))
            except TypeError as error:
                raise ValueError(f"pattern {text!r}: {error}") from error
        case ast.Call(ast.Name(name), arguments, keywords) if name in NAMED:
            options = {k.arg: _value(k.value, text) for k in keywords if k.arg is not None}
            if len(options) == len(keywords):
                try:
                    return NAMED[name](*(_value(a, text) for a in arguments), **options)
                except TypeError as error:
                    raise ValueError(f"pattern {text!r}: {error}") from error
    raise ValueError(f"pattern {text!r} has {ast.unparse(node)!r} in it; {_ALLOWED}")


def _value(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(
            f"pattern {text!r} has the argument {ast.unparse(node)!r}; numbers, True, False and "
            "tuples of numbers are allowed"
        ) from error
