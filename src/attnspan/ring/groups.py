from __future__ import annotations

from typing import Any

from attnspan.ring.transport import Transport


def transport_of(group: Any = None, deadline: float = 10.0) -> Transport:
    assert isinstance(group, Transport)
    return group
