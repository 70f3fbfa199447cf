"""What the kernels run on: asked once per device, not once per call."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

# Programs that one launch spreads over where there is no device to ask (Triton's interpreter).
NOMINAL_PROCESSORS = 16
_HAS_FP32_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter; fixed when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def _target_of(driver: Any, device: int) -> Any:
    return driver.get_current_target()


def target() -> Any:
    """Triton's target (`.backend`, `.arch`) for the current device, or None without a driver."""
    from triton.runtime import driver

    try:
        active = driver.active
        return _target_of(active, active.get_current_device())
    except Exception:  # no driver at all: triton raises what its plugins happen to raise
        return None


def arch() -> int:
    """Compute capability as 80, 90, ...; 0 in the interpreter."""
    if interpreting():
        return 0
    found = target()
    return 0 if found is None else int(found.arch)


@functools.cache
def _processors_of(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    if device.type != "cuda":
        return NOMINAL_PROCESSORS
    return _processors_of(torch.cuda.current_device() if device.index is None else device.index)


def float32_precision() -> str:
    """How float32 products are formed, "ieee" or "tf32": torch's own setting for CUDA."""
    matmul = torch.backends.cuda.matmul
    # torch 2.9 named the setting anew, and refuses to read the old name once the new one was set.
    tf32 = matmul.fp32_precision == "tf32" if _HAS_FP32_PRECISION else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"
