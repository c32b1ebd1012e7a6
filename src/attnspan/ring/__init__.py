"""One sequence over many processes."""

from attnspan.ring.attention import explain, ring_attention
from attnspan.ring.decode import ring_decode
from attnspan.ring.groups import init
from attnspan.ring.layout import Contiguous, Layout, Ring, Striped, ZigZag
from attnspan.ring.transport import RingMismatch, RingPeerLost, Transport

__all__ = [
    "Contiguous",
    "Layout",
    "Ring",
    "RingMismatch",
    "RingPeerLost",
    "Striped",
    "Transport",
    "ZigZag",
    "explain",
    "init",
    "ring_attention",
    "ring_decode",
]
