"""attnspan: transformer attention over long contexts, exact or refused, in bounded memory.

Names load when first used: `import attnspan` loads no torch.

>>> import attnspan as span
>>> span.SinkWindow(sinks=4, window=1020).capacity
1024
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnspan.cache import Dense as Dense
    from attnspan.cache import Int4 as Int4
    from attnspan.cache import Int8 as Int8
    from attnspan.dispatch import attention as attention
    from attnspan.dispatch import explain as explain
    from attnspan.dispatch import received as received
    from attnspan.models import Cache as Cache
    from attnspan.models import StepGraph as StepGraph
    from attnspan.models import attach as attach
    from attnspan.patterns import Blockwise as Blockwise
    from attnspan.patterns import Causal as Causal
    from attnspan.patterns import Documents as Documents
    from attnspan.patterns import Full as Full
    from attnspan.patterns import GlobalTokens as GlobalTokens
    from attnspan.patterns import Longformer as Longformer
    from attnspan.patterns import Sinks as Sinks
    from attnspan.patterns import SlidingWindow as SlidingWindow
    from attnspan.patterns import Strided as Strided
    from attnspan.planner.plan import plan as plan
    from attnspan.policies import Compressive as Compressive
    from attnspan.policies import HeavyHitter as HeavyHitter
    from attnspan.policies import KeepAll as KeepAll
    from attnspan.policies import PerHead as PerHead
    from attnspan.policies import PerLayer as PerLayer
    from attnspan.policies import SinkWindow as SinkWindow
    from attnspan.policies import SnapKV as SnapKV
    from attnspan.policies import Window as Window
    from attnspan.policies import pyramid as pyramid
    from attnspan.ring import Contiguous as Contiguous
    from attnspan.ring import Ring as Ring
    from attnspan.ring import RingMismatch as RingMismatch
    from attnspan.ring import RingPeerLost as RingPeerLost
    from attnspan.ring import Striped as Striped
    from attnspan.ring import ZigZag as ZigZag
    from attnspan.ring import ring_attention as ring_attention

__version__ = "0.1.0"

_HOMES = {
    "dispatch": ("attention", "explain", "received"),
    "cache": ("Dense", "Int4", "Int8"),
    "models": ("Cache", "StepGraph", "attach"),
    "patterns": (
        "Blockwise",
        "Causal",
        "Documents",
        "Full",
        "GlobalTokens",
        "Longformer",
        "Sinks",
        "SlidingWindow",
        "Strided",
    ),
    "planner.plan": ("plan",),
    "policies": (
        "Compressive",
        "HeavyHitter",
        "KeepAll",
        "PerHead",
        "PerLayer",
        "SinkWindow",
        "SnapKV",
        "Window",
        "pyramid",
    ),
    "ring": (
        "Contiguous",
        "Ring",
        "RingMismatch",
        "RingPeerLost",
        "Striped",
        "ZigZag",
        "ring_attention",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'attnspan' has no attribute {name!r}")
    return getattr(import_module(f"attnspan.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
