"""Makes the page's two fonts small: the weights and letters that it uses.

    npm ci && python fonts.py      # needs fontTools and brotli

They are written to src/fonts/, under names of their own, as the licence of one asks of what is
changed (public/FONTS.txt). Raised digits are left out: only some are there, and those beside them
would come from another font.
"""

from __future__ import annotations

from pathlib import Path

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont
from fontTools.varLib.instancer import instantiateVariableFont

HERE = Path(__file__).parent
FONTS = {"sans": "inter", "serif": "source-serif-4"}
WEIGHTS = (400, 600)
LETTERS = [*range(0x20, 0x7F), *map(ord, "°·×÷µ–—‘’“”…−←→↑↓≤≥∞äöüßéèáóñç")]


def make(kind: str, name: str) -> None:
    files = HERE / "node_modules" / "@fontsource-variable" / name / "files"
    font = TTFont(files / f"{name}-latin-wght-normal.woff2")
    options = Options()
    options.flavor = "woff2"
    options.layout_features = [
        "kern",
        "liga",
        "tnum",
        "lnum",
        "calt",
        "ccmp",
        "mark",
        "cv11",
        "ss03",
    ]
    options.hinting = False
    options.name_IDs = [1, 2]
    subsetter = Subsetter(options)
    subsetter.populate(unicodes=LETTERS)
    subsetter.subset(font)
    font = instantiateVariableFont(font, {"wght": WEIGHTS})
    for record in font["name"].names:
        if record.nameID == 1:
            record.string = f"Explorer {kind}"
    font.flavor = "woff2"
    out = HERE / "src" / "fonts"
    out.mkdir(exist_ok=True)
    font.save(out / f"{kind}.woff2")


for kind, name in FONTS.items():
    make(kind, name)
