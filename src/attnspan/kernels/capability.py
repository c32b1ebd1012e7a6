"""What a device, and the Triton beside it, can run."""

from __future__ import annotations

from functools import lru_cache

import torch


def lacks_hopper(device: torch.device) -> str | None:
    """Why kernels in Gluon for NVIDIA's Hopper don't run there, as the end of a sentence."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on NVIDIA's Hopper GPUs, not on {device.type}"
    major, minor = compute_capability(device)
    if (major, minor) != (9, 0):
        return f"it runs on GPUs of compute capability 9.0 (Hopper), not {major}.{minor}"
    return None if _has_gluon() else "it needs Triton 3.6"


@lru_cache(maxsize=64)
def compute_capability(device: torch.device) -> tuple[int, int]:
    """As torch gives it, in a tenth of the time; `device` has an index, as that of a tensor has."""
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """As torch gives it; `device` has an index."""
    return torch.cuda.get_device_name(device)


@lru_cache(maxsize=64)
def processors_of(device: torch.device) -> int:
    """Multiprocessors; `device` has an index."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def shared_bytes_of(device: torch.device) -> int:
    """Shared memory that a block can have at the most; `device` has an index."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@lru_cache(maxsize=1)
def _has_gluon() -> bool:
    try:
        import triton
        from triton.experimental.gluon.language.nvidia import hopper  # noqa: F401
    except ImportError:
        return False
    # Gluon is experimental: another version has other names.
    return triton.__version__.split(".")[:2] == ["3", "6"]
