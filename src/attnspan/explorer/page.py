"""What the explorer's page is given: the planner's shapes and rates, and what was measured.

The page computes with them in JavaScript, in functions that tests hold to the planner's own JSON
to the last digit. Nothing here loads torch, and no file outside the package is read.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnspan import __version__
from attnspan.patterns import parse
from attnspan.planner.links import DEVICES, LINKS
from attnspan.planner.presets import MODELS, model

_MEASURED = Path(__file__).with_name("measured.json")

# A pattern's name, an example on some dozens of tokens, what it is, and where it comes from.
_PATTERNS = (
    ("Causal", "Causal()", "A query sees itself and all before it.", ""),
    ("Full", "Full()", "Every query sees every key, later ones too.", ""),
    (
        "SlidingWindow",
        "SlidingWindow(8)",
        "A query sees the nearest keys up to itself, as many as the window holds.",
        "https://arxiv.org/abs/2310.06825",
    ),
    (
        "SlidingWindow, without the token itself",
        "SlidingWindow(8, include_self=False)",
        "The window ends before the token itself: K[max(0, i-W):i]. The first query sees nothing.",
        "",
    ),
    (
        "SlidingWindow, dilated",
        "SlidingWindow(8, dilation=3)",
        "The window takes every third key and so reaches three times as far with as many pairs.",
        "https://arxiv.org/abs/2004.05150",
    ),
    (
        "Window and sinks",
        "SlidingWindow(8) | Sinks(2)",
        "A window, and the first tokens for ever: StreamingLLM's pattern.",
        "https://arxiv.org/abs/2309.17453",
    ),
    (
        "Strided",
        "Strided(4, 8)",
        "The nearest keys, and before them every key at a multiple of the stride.",
        "https://arxiv.org/abs/1904.10509",
    ),
    (
        "Blockwise",
        "Blockwise(8, before=True)",
        "Tokens see their own block up to themselves, and here the block before it.",
        "https://arxiv.org/abs/1911.02972",
    ),
    (
        "GlobalTokens",
        "GlobalTokens((0, 12))",
        "Some tokens see all before them and are seen by all after them.",
        "https://arxiv.org/abs/2004.05150",
    ),
    (
        "Longformer",
        "Longformer(6, 2)",
        "A window and global tokens together.",
        "https://arxiv.org/abs/2004.05150",
    ),
    (
        "Documents",
        "Documents((12, 9, 19))",
        "Documents packed one after the other; tokens see their own document alone.",
        "",
    ),
    (
        "All but a window",
        "Causal() & ~SlidingWindow(8)",
        "The past that a window leaves out: what a cache of eight tokens has dropped.",
        "",
    ),
)


def page() -> dict[str, Any]:
    """All that the page is given but its recordings, fit for JSON.

    Returns:
        `version`; `presets`: the specs as `attnspan.planner.spec.ModelSpec` has them; `devices` and
        `links`: rates and their sources; `patterns`: examples in words; `measured`: what the doctor
        found of reach; `recordings`: none.

    >>> found = page()
    >>> found["presets"][1]["name"], found["devices"][0]["name"], found["recordings"]
    ('mistral-7b', 'h200', [])
    """
    return {
        "version": __version__,
        "presets": [_spec(name) for name in MODELS],
        "devices": [asdict(device) for device in DEVICES.values()],
        "links": [asdict(link) for link in LINKS.values()],
        "patterns": [
            {"name": name, "example": str(parse(example)), "says": says, "source": source}
            for name, example, says, source in _PATTERNS
        ],
        "measured": json.loads(_MEASURED.read_text(encoding="utf-8")),
        "recordings": [],
    }


def _spec(name: str) -> dict[str, Any]:
    spec = model(name)
    return {**asdict(spec), "windows": list(spec.windows), "shares": list(spec.shares)}
