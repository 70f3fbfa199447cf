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
def uses_descriptors(arch: int) -> bool:
    """Whether Triton makes tensor descriptors on the host (from 3.4 on), and well for `arch`.

    Triton 3.6's kernels with descriptors have 8 to 40 bytes of stack on sm_120, 3.9's none.
    """
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return False
    return arch // 10 != 12 or triton_version() >= (3, 9)


@functools.cache
def triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def _drivers() -> Any:
    from triton.runtime import driver

    return driver


def active_driver() -> Any:
    """Triton's driver, which is started if there is none yet; None in the interpreter."""
    return None if interpreting() else _drivers().active


def takes_cpu_tensors() -> bool:
    """Whether kernels run on CPU tensors: in the interpreter, or by a driver that was put in place
    for it. A GPU's driver is not started to find out.
    """
    if interpreting():
        return True
    drivers = _drivers()
    if hasattr(drivers, "_active"):
        active = drivers._active
    else:  # Triton 3.2 and 3.3
        active = None if drivers.active is drivers.default else drivers.active
    ask = getattr(active, "get_active_torch_device", None)
    return ask is not None and ask().type == "cpu"


@functools.cache
def _target_of(driver: Any, device: int) -> Any:
    return driver.get_current_target()


def target() -> Any:
    """Triton's target (`.backend`, `.arch`) for the current device, or None without a driver."""
    try:
        active = active_driver()
        return _target_of(active, active.get_current_device())
    except Exception:  # no driver at all: triton raises what its plugins happen to raise
        return None


def arch() -> int:
    """80, 90, ... for sm_80, sm_90, ...; 942, ... for gfx942, ...; 0 in the interpreter."""
    if interpreting():
        return 0
    found = target()
    return 0 if found is None else arch_number(found.arch)


def arch_number(arch: int | str) -> int:
    """The number of Triton's name for an arch: 90, "gfx942"; 0 for one that has letters in it."""
    digits = str(arch).removeprefix("gfx").split(":")[0]
    return int(digits) if digits.isdigit() else 0


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
