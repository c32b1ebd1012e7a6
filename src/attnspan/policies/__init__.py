"""Cache policies: which tokens a cache keeps once it is full."""

from attnspan.policies.base import Policy
from attnspan.policies.compressive import Compressive
from attnspan.policies.heavy_hitter import HeavyHitter
from attnspan.policies.keep_all import KeepAll
from attnspan.policies.per_head import PerHead
from attnspan.policies.per_layer import PerLayer
from attnspan.policies.pyramid import pyramid
from attnspan.policies.sink_window import SinkWindow
from attnspan.policies.snap_kv import SnapKV
from attnspan.policies.spec import parse, parse_list
from attnspan.policies.window import Window

__all__ = [
    "Compressive",
    "HeavyHitter",
    "KeepAll",
    "PerHead",
    "PerLayer",
    "Policy",
    "SinkWindow",
    "SnapKV",
    "Window",
    "parse",
    "parse_list",
    "pyramid",
]
