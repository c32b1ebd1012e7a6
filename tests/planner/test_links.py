"""Rates: their sources, and measured ones from a file."""

import json

import pytest

from attnspan.planner.links import (
    DEVICES,
    FORMAT,
    LINKS,
    Device,
    Link,
    Machine,
    from_dict,
    machine,
    to_dict,
)

MEASURED = {
    "format": FORMAT,
    "link": {"name": "gloo", "latency_s": 1e-4, "bandwidth_bytes_per_s": 1e9, "overlap": 0.5},
    "device": {"name": "this", "forward_flop_per_s": 1e11},
}


def test_every_preset_names_its_source() -> None:
    for preset in (*LINKS.values(), *DEVICES.values()):
        assert "http" in preset.source or "benchmarks/results" in preset.source, preset.name


def test_a_measured_file_with_defaults(tmp_path) -> None:
    path = tmp_path / "check.json"
    for held in (MEASURED, {"meta": {}, "machine": MEASURED}):
        path.write_text(json.dumps(held))
        measured = machine(str(path))
        assert measured.link == Link("gloo", 1e-4, 1e9, None, 0.5, f"link {path}")
        assert measured.device == Device("this", 1e11, 1e11, 1e11, None, 1e9, 0.0, f"link {path}")
    assert machine(str(path), "a100") == Machine(DEVICES["a100"], measured.link)


def test_what_is_written_is_read() -> None:
    for link in LINKS.values():
        for device in DEVICES.values():
            held = json.loads(json.dumps(to_dict(Machine(device, link))))
            read = from_dict(held, "here")
            assert read.device == device
            assert (read.link.latency, read.link.bandwidth) == (link.latency, link.bandwidth)


def changed(part: str, **values: object) -> dict:
    return {**MEASURED, part: {**MEASURED[part], **values}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], 'an object of "format": "attnspan-machine-1" is'),
        ({"format": "other"}, 'an object of "format"'),
        ({**MEASURED, "link": 3}, "link is 3; an object is allowed"),
        (changed("link", latency_s=-1), "latency_s is -1; a number above 0"),
        (changed("link", latency_s=None), "latency_s is None; a number above 0"),
        (changed("link", bandwidth_bytes_per_s="fast"), "bandwidth_bytes_per_s is 'fast'"),
        (changed("link", overlap=1.5), "overlap is 1.5; a number from 0 to 1"),
        (changed("device", forward_flop_per_s=float("nan")), "forward_flop_per_s is nan"),
        (changed("device", flops=1), "device has flops; allowed are forward_flop_per_s"),
    ],
)
def test_bad_files(given: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        from_dict(given, "file x")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("file x: ")


def test_bad_names(tmp_path) -> None:
    with pytest.raises(ValueError, match="link 'pcie' is not known; allowed are nvlink, ib, eth"):
        machine("pcie")
    with pytest.raises(ValueError, match="device 'tpu' is not known; allowed are h200, h100"):
        machine("ib", "tpu")
    (tmp_path / "x").write_text("{")
    with pytest.raises(ValueError, match="it is no JSON"):
        machine(str(tmp_path / "x"))
