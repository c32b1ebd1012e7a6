"""A fresh interpreter: importing is free of heavy modules, and names come when asked for."""

import json
import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


def test_import_loads_no_heavy_module() -> None:
    out = run("import attnspan, json, sys; print(json.dumps(sorted(sys.modules)))")
    loaded = {name.split(".")[0] for name in json.loads(out)}
    assert "attnspan" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "safetensors", "typer", "rich"}


def test_this_test_sees_a_heavy_module() -> None:
    out = run("import attnspan, torch, json, sys; print(json.dumps(sorted(sys.modules)))")
    assert "torch" in json.loads(out)


def test_every_public_name_resolves() -> None:
    run("import attnspan; [getattr(attnspan, name) for name in getattr(attnspan, '__all__', ())]")
