"""Pictures of the explorer's page for README and the documentation: `python docs/screenshots.py`.

Taken of the real page in Chromium, so they are no part of what is checked to be current.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "explorer"))
from browsing import chromium, opened, served  # noqa: E402

SHOTS = {
    "memory": ("memory", "", "light", 860),
    "pattern": ("pattern", "?pattern=SlidingWindow%288%29+%7C+Sinks%282%29", "light", 1000),
    "ring": ("ring", "?processes=6&layout=zigzag&step=2", "dark", 900),
    "stream": ("stream", "?rec=python&at=3000", "light", 1240),
}
WIDTH = 1280
MOST = 300_000


def main() -> None:
    folder = HERE / "images" / "explorer"
    folder.mkdir(parents=True, exist_ok=True)
    with served() as address, chromium() as browser:
        for name, (view, query, scheme, height) in SHOTS.items():
            context = browser.new_context(
                viewport={"width": WIDTH, "height": height},
                color_scheme=scheme,  # pyright: ignore[reportArgumentType]
                reduced_motion="reduce",
            )
            page = context.new_page()
            opened(page, address, view, query)
            page.wait_for_selector("main :is(svg, canvas)")
            page.wait_for_timeout(1500)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            context.close()
            file = folder / f"{name}.png"
            # In all its colours: a palette would make one of amber and orange.
            picture.save(file, optimize=True)
            size = file.stat().st_size
            assert size < MOST, f"{file} has {size:,} bytes; at most {MOST:,} are allowed"
            print(f"{file}: {size:,} bytes")


if __name__ == "__main__":
    main()
