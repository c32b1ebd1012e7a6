"""Launches of Triton's kernels that cost the host little once such a launch was made before.

At each launch Triton looks at every argument for what the code may take for granted, and looks up
its settings. Here a launch is known again by the same properties: of a tensor its dtype and whether
it lies at a multiple of 16 bytes, of a number whether it is 1, a multiple of 16, or wide, of
anything else its value. Then the code is known too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def launch(function: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """`function[grid](*arguments, **named)` on the current device.

    Triton's settings, as its debug mode, are those of the first such launch.
    """
    known = _known.get(id(function)) or _known.setdefault(id(function), _Known(function))
    varying = known.varying
    # AMD's code depends on the size of a tensor's memory as well.
    if varying is None or torch.version.hip is not None:
        function[grid](*arguments, **named)
        return
    place = known.place(
        torch.cuda.current_device(),
        tuple(named),
        *[_seen(x) for x in arguments],
        *[_seen(x) if name in varying else x for name, x in named.items()],
    )
    if place:
        values = [named[name] for name in known.names[len(arguments) :]]
        place[0][(*grid, 1, 1)[:3]](*arguments, *values)
        return
    code = function[grid](*arguments, **named)
    if code is not None:  # a hook of Triton's may have stopped it
        place.append(code)


class _Known:
    """What is known of a kernel.

    Attributes:
        function: the kernel, which lives on here, so that its id stays its own.
        names: of its arguments.
        varying: those that are no constants of its code; None: it is not to be compiled.
    """

    def __init__(self, function: Any) -> None:
        from triton.runtime.jit import JITFunction

        self.function = function
        self.names, self.varying = (), None
        if isinstance(function, JITFunction):
            self.names = function.arg_names
            constants = [self.names[i] for i in function.constexprs]
            self.varying = frozenset(self.names) - frozenset(constants)
        # Where the code of a launch is, once there is one.
        self.place = lru_cache(maxsize=128, typed=True)(lambda *_: [])


# Kernels are functions of modules, so they are few and stay.
_known: dict[int, _Known] = {}


def _seen(x: Any) -> Any:
    """What Triton's code may depend on of an argument that is no constant of it."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if type(x) is int and x != 1:
        return x % 16 == 0, x >> 31 in (0, -1)
    return x
