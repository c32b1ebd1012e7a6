"""The notebooks of `examples/` run from first cell to last, and are kept without output."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))

# In a process of its own: Jupyter's warnings are none of ours.
RUN = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def printed(cell: dict[str, Any]) -> str:
    return "".join(part.get("text", "") for part in cell["outputs"])


def run(name: str, folder: Path) -> list[dict[str, Any]]:
    out = folder / name
    command = [sys.executable, "-c", RUN, str(EXAMPLES / name), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-4000:]
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
    return [
        {**cell, "outputs": [{**o, "text": "".join(o.get("text", ""))} for o in cell["outputs"]]}
        for cell in cells
        if cell["cell_type"] == "code"
    ]


def test_there_are_two() -> None:
    assert NOTEBOOKS == ["plan_a_context.ipynb", "stream_long_text.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_kept_without_output(name: str) -> None:
    held = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    code = [cell for cell in held["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_stream_long_text_runs(tmp_path: Path) -> None:
    cells = run("stream_long_text.ipynb", tmp_path)
    rows = next(text for text in map(printed, cells) if "heavy hitters" in text).splitlines()
    perplexity = {row[:24].strip(): float(row.split()[-4]) for row in rows}
    # What its text says of it: without sinks the window falls apart.
    assert perplexity["window"] > 1.5 * perplexity["4 sinks + window"]
    assert any("image/png" in o.get("data", {}) for cell in cells for o in cell["outputs"])


def test_plan_a_context_runs(tmp_path: Path) -> None:
    cells = run("plan_a_context.ipynb", tmp_path)
    said = "\n".join(map(printed, cells))
    assert "512.0 MiB" in said
    assert "131,040 tokens" in said
    assert sum("image/png" in o.get("data", {}) for cell in cells for o in cell["outputs"]) == 2
