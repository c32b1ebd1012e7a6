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


SKIPPED = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in gpu:
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    config.stash[SKIPPED] = len(gpu)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if count := config.stash.get(SKIPPED, 0):
        terminalreporter.write_line(f"GPU tests skipped, for want of a CUDA device: {count}")
