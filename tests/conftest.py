"""Fixtures for all tests, and the count of those that need a GPU."""

import os
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
    if count := sum(WANTED in str(report.longrepr) for report in skipped):
        terminalreporter.write_line(f"GPU tests skipped, for want of a CUDA device: {count}")
