"""Installs the wheel in an environment of its own, and runs what users run: `make wheel-check`.

The environment and the working folder lie outside of the checkout, so nothing but the wheel can be
what answers. Its dependencies are lent from the environment that runs this, by a path file, after
attnspan itself has been taken out of the way; `--whole` installs them from the index instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

MOST = 30_000_000
EXPORT = 5_000_000
NEEDED = (
    "attnspan/explorer/static/index.html",
    "attnspan/explorer/static/app.js",
    "attnspan/explorer/static/app.css",
    "attnspan/explorer/measured.json",
    "attnspan/models/bundled/model.safetensors",
    "attnspan/py.typed",
)


def check(wheel: Path, whole: bool) -> None:
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size:,} bytes")
    assert size < MOST, f"{size:,} bytes are more than {MOST:,}"
    held = set(zipfile.ZipFile(wheel).namelist())
    for name in NEEDED:
        assert name in held, f"{name} isn't in the wheel"
    strange = [name for name in held if not name.startswith(("attnspan/", "attnspan-"))]
    assert not strange, f"{strange[:3]} don't belong in the wheel"

    with tempfile.TemporaryDirectory() as folder:
        home, away = Path(folder) / "venv", Path(folder) / "away"
        away.mkdir()
        venv.create(home, with_pip=True)
        python = home / "bin" / "python"
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
        if whole:
            subprocess.run([*pip, f"{wheel.resolve()}[explore,plot]"], check=True)
        else:
            subprocess.run([*pip, "--no-deps", "--no-index", str(wheel.resolve())], check=True)
            site = subprocess.run(
                [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.strip()
            lent = sysconfig.get_path("purelib")
            # A path file that isn't run for its own path files: attnspan's editable one stays out.
            (Path(site) / "lent.pth").write_text(f"{lent}\n")
        run(home, away)
    print("The wheel works: plan, compare, figure, explore --export, and the server.")


def run(home: Path, away: Path) -> None:
    """What users run, from a folder that holds nothing else."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"OMP_NUM_THREADS": "1", "PATH": f"{home / 'bin'}:{env['PATH']}"}

    def said(*arguments: str) -> str:
        ran = subprocess.run(
            arguments, cwd=away, env=env, capture_output=True, text=True, timeout=600
        )
        assert ran.returncode == 0, f"{' '.join(arguments)}: {ran.stderr[-2000:]}"
        return ran.stdout

    where = said("python", "-c", "import attnspan; print(attnspan.__file__)").strip()
    assert Path(where).resolve().is_relative_to(home.resolve()), f"{where} isn't the wheel's"
    plan = json.loads(said("attnspan", "plan", "mistral-7b", "--context", "128K", "--json", "-"))
    assert plan["plan"]["cache"]["total"] == 4096 * 131_072
    (away / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 40)
    rows = json.loads(
        said(
            *("attnspan", "compare", "--text", "text.txt", "--limit", "600", "--json", "-"),
            *("--policies", "window:128, sinks:4+window:124"),
        )
    )["rows"]
    assert len(rows) == 2
    said("attnspan", "figure", "memory", "--out", "memory.svg")
    assert (away / "memory.svg").stat().st_size > 10_000
    said("attnspan", "explore", "--export", "page.html")
    page = (away / "page.html").read_bytes()
    assert 100_000 < len(page) < EXPORT, f"the exported page has {len(page):,} bytes"
    print(f"the exported page: {len(page):,} bytes")
    serve(home, away, env)


def serve(home: Path, away: Path, env: dict[str, str]) -> None:
    from urllib.request import urlopen

    running = subprocess.Popen(
        [home / "bin" / "attnspan", "explore", "--port", "0", "--no-browser"],
        cwd=away,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stdout is not None
        address = running.stdout.readline().split()[0]
        with urlopen(f"{address}api/page.json", timeout=30) as answer:
            assert json.load(answer)["presets"]
    finally:
        running.terminate()
        running.communicate(timeout=30)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--whole", action="store_true")
    given = parser.parse_args()
    sys.exit(check(given.wheel, given.whole))
