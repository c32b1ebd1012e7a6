"""What carries a ring's bytes and what computes its attention: rates, and where each comes from.

A rate is what was reached, not what a data sheet promises, wherever a measurement is public.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

META = "https://arxiv.org/abs/2411.01783"
OURS = "benchmarks/results/gpu.json, H200"


@dataclass(frozen=True)
class Link:
    """What lies between two devices of a ring.

    Attributes:
        name: as a user writes it.
        latency: seconds of an exchange of almost nothing.
        bandwidth: bytes a second that a device sends while it receives as many.
        joins: how many devices it joins at most; None: any number.
        overlap: the share of an exchange that can go on while the device computes. Where the
            processor that computes also moves the bytes it is below 1.
        source: where the figures come from.
    """

    name: str
    latency: float
    bandwidth: float
    joins: int | None = None
    overlap: float = 1.0
    source: str = ""


@dataclass(frozen=True)
class Device:
    """What computes.

    Attributes:
        name: as a user writes it.
        forward: useful operations a second of an attention forward, `4 * head_dim` for each pair
            and query head.
        backward: those of a backward, two and a half times as many operations.
        linear: operations a second of large matrix products, in the type of the weights.
        memory: bytes; None: not known.
        memory_bandwidth: bytes a second.
        call: seconds that an attention call takes at the least.
        source: where the figures come from.
    """

    name: str
    forward: float
    backward: float
    linear: float
    memory: float | None
    memory_bandwidth: float
    call: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class Machine:
    """Devices and the link between them."""

    device: Device
    link: Link


LINKS = {
    link.name: link
    for link in (
        Link(
            "nvlink",
            10e-6,
            376e9,
            joins=8,
            source="450 GB/s each way (NVLink 4), 376 reached on H100 "
            "(https://github.com/NVIDIA/nccl/issues/1264); 10 us for 8 bytes through NCCL "
            "(https://github.com/NVIDIA/nccl-tests/issues/331)",
        ),
        Link(
            "ib",
            33e-6,
            26e9,
            source=f"400 Gb/s for each GPU; 16.4 MB took 627 us a hop, 4 KiB 33 us "
            f"({META}, tables 5 and 8)",
        ),
        Link(
            "eth",
            100e-6,
            3e9,
            source=f"100 Gb/s for each GPU over TCP, 3 GB/s reached ({META}, section 4.2.1); "
            "the latency is a round number, not a measurement",
        ),
    )
}

# Causal, n=4K, 32 heads of 128: 137 GFLOP at 581 TFLOP/s take so much longer than at n=32K's 660.
_CALL = 28e-6

DEVICES = {
    device.name: device
    for device in (
        Device(
            "h200",
            660e12,
            563e12,
            680e12,
            141e9,
            4.8e12,
            _CALL,
            source=f"causal, n=32K, head_dim 128, and bf16 products under load ({OURS}); "
            "https://www.nvidia.com/en-us/data-center/h200/",
        ),
        Device(
            "h100",
            660e12,
            563e12,
            680e12,
            80e9,
            3.35e12,
            _CALL,
            source=f"rates of an H200, which has the same processor and power limit ({OURS}); "
            "https://www.nvidia.com/en-us/data-center/h100/",
        ),
        Device(
            "h100-500w",
            540e12,
            540e12 * 563 / 660,
            800e12 * 680 / 989,
            96e9,
            2.4e12,
            _CALL,
            source=f"Meta's H100 of 500 W: bf16 peak 800 TFLOP/s, FlashAttention-3 alone 540 "
            f"({META}, appendix A); backward and products at the share of the peak that an H200 "
            f"reaches ({OURS})",
        ),
        Device(
            "a100",
            192e12,
            192e12,
            271e12,
            80e9,
            2.039e12,
            source="the middle of FlashAttention-2's 50 to 73 % of 312 TFLOP/s "
            "(https://arxiv.org/abs/2307.08691); products 271 TFLOP/s "
            "(https://github.com/stas00/ml-engineering, MAMF table)",
        ),
        Device(
            "cpu",
            122e9,
            147e9,
            130e9,
            None,
            17e9,
            source="two cores of an AMD EPYC with AVX2, fp32, causal, n=16K "
            "(benchmarks/results/cpu.json); products at about the rate of attention",
        ),
    )
}

GPUS = tuple(name for name in DEVICES if name != "cpu")

FORMAT = "attnspan-machine-1"
# For each part of the file its keys, what they fill, and whether they may be left out.
_FIELDS = {
    "link": {"latency_s": "latency", "bandwidth_bytes_per_s": "bandwidth", "overlap": "overlap"},
    "device": {
        "forward_flop_per_s": "forward",
        "backward_flop_per_s": "backward",
        "linear_flop_per_s": "linear",
        "memory_bytes": "memory",
        "memory_bytes_per_s": "memory_bandwidth",
        "call_s": "call",
    },
}
_NEEDED = ("latency_s", "bandwidth_bytes_per_s", "forward_flop_per_s")


def to_dict(machine: Machine) -> dict[str, Any]:
    """What `from_dict` reads, fit for JSON."""
    held: dict[str, Any] = {"format": FORMAT}
    for part, keys in _FIELDS.items():
        values = getattr(machine, part)
        held[part] = {"name": values.name, "source": values.source}
        held[part] |= {key: getattr(values, field) for key, field in keys.items()}
    return held


def from_dict(given: Any, where: str) -> Machine:
    """The measured machine that `attnspan ring check --json` describes.

    `{"format": "attnspan-machine-1", "link": {"latency_s", "bandwidth_bytes_per_s", "overlap"},
    "device": {"forward_flop_per_s", "backward_flop_per_s", "linear_flop_per_s", "memory_bytes",
    "memory_bytes_per_s", "call_s"}}`, each part with a `name` and a `source`; it may stand under
    the key "machine" of a larger object. The first two of the link and the forward rate are
    needed. Without the others, backward and products run at the forward's rate, bytes move past the
    device at the link's, and exchanges overlap with computing as a whole.

    Raises:
        ValueError: one sentence that names `where`, the key, its value and what is allowed.
    """
    if isinstance(given, Mapping) and "format" not in given and "machine" in given:
        given = given["machine"]
    if not isinstance(given, Mapping) or given.get("format") != FORMAT:
        raise ValueError(f'{where}: it is no measured link; an object of "format": "{FORMAT}" is')
    link, device = (
        _part("link", given.get("link"), where),
        _part("device", given.get("device"), where),
    )
    link["overlap"] = 1.0 if link["overlap"] is None else link["overlap"]
    return Machine(_device(device, link["bandwidth"]), Link(**link))


def _part(part: str, held: Any, where: str) -> dict[str, Any]:
    """A device's or a link's figures by the names of their fields; those left out are None."""
    keys = _FIELDS[part]
    if not isinstance(held, Mapping):
        raise ValueError(f"{where}: {part} is {held!r}; an object is allowed")
    unknown = set(held) - set(keys) - {"name", "source"}
    if unknown:
        raise ValueError(
            f"{where}: {part} has {', '.join(sorted(unknown))}; allowed are {', '.join(keys)}"
        )
    values: dict[str, Any] = {field: _figure(held, key, where) for key, field in keys.items()}
    return values | {
        "name": str(held.get("name", "measured")),
        "source": str(held.get("source", where)),
    }


def _device(values: dict[str, Any], bandwidth: float) -> Device:
    """Without a rate of their own, backward and products run at the forward's, bytes at this."""
    values["backward"] = values["backward"] or values["forward"]
    values["linear"] = values["linear"] or values["forward"]
    values["memory_bandwidth"] = values["memory_bandwidth"] or bandwidth
    values["call"] = values["call"] or 0.0
    return Device(**values)


RATES = "attnspan-rates-1"


def rates_path() -> Path:
    """Where `attnspan bench --calibrate` keeps a machine's rates."""
    root = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return root / "attnspan" / "rates.json"


def find_device(name: str) -> Device:
    """A device by its name, "calibrated" for this machine as it was measured, or a file of rates.

    The file is what `attnspan bench --calibrate` or `attnspan ring check --json` wrote: an object
    of "format": "attnspan-rates-1" with a "device" as in `from_dict` that gives
    `memory_bytes_per_s`, or a measured machine.

    Raises:
        ValueError: one sentence: there is no such device, no calibration yet, or a wrong file.

    >>> find_device("h100").memory_bandwidth
    3350000000000.0
    """
    if name in DEVICES:
        return DEVICES[name]
    path = rates_path() if name == "calibrated" else Path(name)
    if not path.is_file():
        if name == "calibrated":
            raise ValueError(
                f"device calibrated: there is no {path}; `attnspan bench --calibrate` makes it"
            )
        raise ValueError(
            f"device {name!r} is not known; allowed are {', '.join(DEVICES)}, calibrated, and a "
            "file that `attnspan bench --calibrate` or `attnspan ring check --json` wrote"
        )
    where = f"device {path}"
    given = _json(path, where)
    if isinstance(given, Mapping) and given.get("format") == RATES:
        values = _part("device", given.get("device"), where)
        if values["memory_bandwidth"] is None:
            raise ValueError(f"{where}: memory_bytes_per_s is None; a number above 0 is allowed")
        return _device(values, values["memory_bandwidth"])
    if isinstance(given, Mapping) and "rates" in given and "format" not in given:
        raise ValueError(
            f"{where}: it was made by an earlier attnspan, without what a device is planned by; "
            "`attnspan bench --calibrate` makes it anew"
        )
    return from_dict(given, where).device


def _json(path: Path, where: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{where}: it is no JSON ({error})") from None


def _figure(held: Mapping[str, Any], key: str, where: str) -> float | None:
    value = held.get(key)
    if value is None and key not in _NEEDED:
        return None
    from_zero = key in ("call_s", "overlap")
    # No number compares so with NaN; JSON as Python reads it has infinities too.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value < 1e30
        or (value == 0 and not from_zero)
    ):
        least = "from 0 on" if from_zero else "above 0"
        raise ValueError(f"{where}: {key} is {value!r}; a number {least} is allowed")
    if key == "overlap" and value > 1:
        raise ValueError(f"{where}: {key} is {value!r}; a number from 0 to 1 is allowed")
    return float(value)


def machine(link: str, device: str | None = None) -> Machine:
    """A link by its name or from a file that was measured, and a device by its name.

    Without a device's name a measured file's own is taken, or an H100.

    Raises:
        ValueError: a name that is none, with those that are allowed; or as in `from_dict`.

    >>> machine("ib").device.name, machine("ib", "a100").link.bandwidth
    ('h100', 26000000000.0)
    """
    if device is not None and device not in DEVICES:
        raise ValueError(f"device {device!r} is not known; allowed are {', '.join(DEVICES)}")
    if link in LINKS:
        return Machine(DEVICES[device or "h100"], LINKS[link])
    path = Path(link)
    if not path.is_file():
        raise ValueError(
            f"link {link!r} is not known; allowed are {', '.join(LINKS)}, and a file that "
            "`attnspan ring check --json` wrote"
        )
    given = _json(path, f"link {link}")
    measured = from_dict(given, f"link {link}")
    return measured if device is None else replace(measured, device=DEVICES[device])
