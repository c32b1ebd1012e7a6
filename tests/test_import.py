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
    assert not loaded & {"torch", "numpy", "transformers", "safetensors", "click", "rich"}


def test_attention_loads_no_compiler() -> None:
    out = run("import attnspan, json, sys; attnspan.attention; print(json.dumps([*sys.modules]))")
    assert "torch" in json.loads(out)
    assert not {"torch._dynamo", "torch._inductor", "triton"} & set(json.loads(out))


def test_this_test_sees_a_heavy_module() -> None:
    out = run("import attnspan, torch, json, sys; print(json.dumps(sorted(sys.modules)))")
    assert "torch" in json.loads(out)


def test_every_public_name_resolves_whatever_came_first() -> None:
    # A submodule, once loaded, stands in the package under its own name: a public name must not be
    # hidden by it.
    out = run(
        "import attnspan, inspect, json\n"
        "for _ in range(2):\n"
        "    values = {name: getattr(attnspan, name) for name in attnspan.__all__}\n"
        "print(json.dumps([name for name in values if inspect.ismodule(values[name])]))"
    )
    assert json.loads(out) == []


def test_unknown_names_are_refused() -> None:
    out = run("import attnspan; print(hasattr(attnspan, 'nothing_of_this_name'))")
    assert out.split() == ["False"]
