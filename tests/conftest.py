"""Fixtures for all tests, and the count of those that need a GPU or a browser."""

import os
import shutil
from collections.abc import Iterator

import pytest

# cuBLAS is deterministic only with this, set before CUDA starts; `poison_empty` asks for that.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="module")
def poison_empty() -> Iterator[None]:
    """Uninitialised memory holds NaN; `pytestmark = pytest.mark.usefixtures("poison_empty")`."""
    from attnspan.testing import poisoned_memory

    with poisoned_memory():
        yield


WANTED = "no CUDA device"
NO_BROWSER = "no Chromium"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(map(shutil.which, ("chromium", "chromium-browser"))):
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason=NO_BROWSER))
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in gpu:
        item.add_marker(pytest.mark.skip(reason=WANTED))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Of the reports, since collection takes place in processes of their own.
    skipped = terminalreporter.stats.get("skipped", [])
    for kind, wanted in (("GPU", WANTED), ("Browser", NO_BROWSER)):
        if count := sum(wanted in str(report.longrepr) for report in skipped):
            terminalreporter.write_line(f"{kind} tests skipped, because of {wanted}: {count}")
