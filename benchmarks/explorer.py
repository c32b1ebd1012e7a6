"""How fast the explorer is in a headless Chromium: paint, sliders, scrubbing, the file's size.

The page is served as `attnspan explore` serves it. First paint is that of a fresh browser context
each time. A slider's answer is the time from its input to the first frame that shows it, over some
stops of every slider; headless frames come every 16.7 ms, and up to one of those is waiting.
Scrubbing goes through all tokens of the recording that comes with the package, a place a frame.
Writes benchmarks/results/explorer.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "explorer"))
from browsing import VIEWS, chromium, opened, served, sliders

GOALS = {
    "first_paint_ms": 1000,
    "slider_ms": 50,
    "scrub_frames_per_second": 30,
    "exported_bytes": 5_000_000,
}

# A frame has been painted once a message that its callback posts comes in.
ANSWER = """
async ([name, stops]) => {
    const slider = document.querySelector(`main input[type="range"][data-testid="${name}"]`);
    const times = [];
    for (let k = 0; k < stops; k++) {
        const most = Number(slider.max), from = Number(slider.value);
        const to = from + Math.max(1, Math.floor(most / stops)) * (k % 2 ? 1 : -1);
        const next = Math.max(0, Math.min(most, to === from ? from + 1 : to));
        if (next === from) continue;
        await new Promise(r => requestAnimationFrame(() => setTimeout(r, 20)));
        const began = performance.now();
        slider.value = String(next);
        slider.dispatchEvent(new Event("input", { bubbles: true }));
        await new Promise(r => requestAnimationFrame(() => {
            const channel = new MessageChannel();
            channel.port1.onmessage = r;
            channel.port2.postMessage(0);
        }));
        times.push(performance.now() - began);
    }
    return times;
}
"""


def first_paint(browser: Any, address: str, runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        opened(page, address, "memory")
        page.wait_for_function(
            "() => performance.getEntriesByName('first-contentful-paint').length > 0"
        )
        times.append(
            page.evaluate(
                "() => performance.getEntriesByName('first-contentful-paint')[0].startTime"
            )
        )
        context.close()
    return times


def answers(browser: Any, address: str, stops: int) -> list[dict[str, Any]]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    rows = []
    for view in VIEWS:
        opened(page, address, view)
        page.wait_for_selector("main input[type=range]")
        for name in sliders(page):
            times = page.evaluate(ANSWER, [name, stops])
            if times:
                rows.append(
                    {
                        "view": view,
                        "slider": name,
                        "median_ms": statistics.median(times),
                        "most_ms": max(times),
                        "moves": len(times),
                    }
                )
    page.close()
    return rows


def scrub(browser: Any, address: str, frames: int) -> dict[str, Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    opened(page, address, "stream", "?rec=python")
    page.wait_for_function("() => window.attnspan?.stream !== undefined")
    page.evaluate("() => window.attnspan.stream.scrub({ frames: 30 })")
    found = page.evaluate("frames => window.attnspan.stream.scrub({ frames })", frames)
    tokens = page.evaluate("() => window.attnspan.stream.recording.last + 1")
    runs = page.evaluate("() => window.attnspan.stream.recording.runs.length")
    page.close()
    return {"tokens": tokens, "runs_beside_each_other": runs, **found}


def exported() -> int:
    import subprocess

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        command = [sys.executable, "-m", "attnspan", "explore", "--export", str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return file.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--stops", type=int, default=8)
    parser.add_argument("--frames", type=int, default=180)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with served() as address, chromium() as browser:
        version = browser.version
        paints = first_paint(browser, address, given.runs)
        rows = answers(browser, address, given.stops)
        scrubbed = scrub(browser, address, given.frames)
    slowest = max(rows, key=lambda row: row["median_ms"])
    found = {
        "chromium": version,
        "load_before": load,
        "goals": GOALS,
        "first_paint": {
            "median_ms": statistics.median(paints),
            "least_ms": min(paints),
            "most_ms": max(paints),
            "runs": len(paints),
        },
        "slider_median_ms": statistics.median(row["median_ms"] for row in rows),
        "slowest_slider": slowest,
        "sliders": rows,
        "scrub": scrubbed,
        "exported_bytes": exported(),
    }
    print(
        f"first paint {found['first_paint']['median_ms']:.0f} ms "
        f"({min(paints):.0f} to {max(paints):.0f})\n"
        f"sliders {found['slider_median_ms']:.0f} ms, the slowest {slowest['view']}/"
        f"{slowest['slider']} {slowest['median_ms']:.0f} ms (most {slowest['most_ms']:.0f})\n"
        f"scrubbing {scrubbed['tokens']:,} tokens: {scrubbed['frames_per_second']:.0f} frames a "
        f"second, work of a frame {scrubbed['median_work_ms']:.1f} ms\n"
        f"exported file {found['exported_bytes']:,} bytes; load before {load:.1f}"
    )
    print(write(Path("explorer.json"), found))


if __name__ == "__main__":
    main()
