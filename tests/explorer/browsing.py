"""The explorer's page in a headless Chromium: what the tests and the benchmark share."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

VIEWS = ("memory", "pattern", "reach", "ring", "stack", "stream", "plan")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The address of `attnspan explore`, in a process of its own."""
    command = [sys.executable, "-m", "attnspan", "explore", "--port", "0", "--no-browser"]
    running = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert running.stdout is not None
        said = running.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", said)
        assert found is not None, said + running.stdout.read()
        yield found[0]
    finally:
        running.terminate()
        running.communicate(timeout=30)


@contextmanager
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium has no sandbox for root, which containers run as.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def opened(page: Page, address: str, view: str, query: str = "") -> None:
    """Goes to a view, and waits until it is there."""
    page.goto(f"{address}#/{view}{query}")
    page.wait_for_selector(f'nav [data-testid="nav-{view}"][aria-current="page"]')
    page.wait_for_selector("main h1")


def numbers(page: Page) -> dict[str, str]:
    """The page's numbers in full, by their names."""
    return page.eval_on_selector_all(
        "main span.num[data-testid]",
        "spans => Object.fromEntries(spans.map(s => [s.dataset.testid, s.dataset.value]))",
    )


def controls(page: Page) -> dict[str, Any]:
    """What every control is set to: sliders' numbers, and the words of lists and buttons."""
    return page.eval_on_selector_all(
        "main form input, main form select, main .steps input, main input[type=range]",
        """all => {
            const found = {};
            for (const e of all) {
                if (e.type === "range")
                    found[e.dataset.testid] = Number(e.dataset.value ?? e.value);
                else if (e.type === "radio") {
                    if (e.checked) found[e.name] = e.dataset.testid.slice(e.name.length + 1);
                } else if (e.type === "checkbox") found[e.dataset.testid] = e.checked;
                else if (e.tagName === "SELECT" || e.id === "pattern")
                    found[e.dataset.testid] = e.value;
            }
            return found;
        }""",
    )


def sliders(page: Page) -> list[str]:
    """Names of the sliders that can be moved."""
    return page.eval_on_selector_all(
        'main input[type="range"]',
        "all => all.filter(e => !e.disabled && Number(e.max) > 0).map(e => e.dataset.testid)",
    )


def move(page: Page, name: str) -> None:
    """Moves a slider one stop by the keyboard, and waits until the page shows it."""
    slider = page.locator(f'main input[type="range"][data-testid="{name}"]').first
    before, most = slider.input_value(), slider.get_attribute("max")
    slider.focus()
    slider.press("ArrowLeft" if before == most else "ArrowRight")
    page.wait_for_function(
        "([name, before]) => document.querySelector("
        '`main input[type="range"][data-testid="${name}"]`).value !== before',
        arg=[name, before],
    )
    # The next frame has been drawn once its callback's callback runs.
    page.evaluate("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
