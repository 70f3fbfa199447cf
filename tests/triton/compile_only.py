"""A Triton driver that compiles for any GPU and launches nothing.

    with compile_only("sm_90") as compiled:
        run.compiled(launch)[launch.grid]   # a step of a program
    compiled[0].ptx, .registers, .spills, .shared

The package's own plan chooses config, switches and specialisation, so what is compiled is what a
GPU of that kind would run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

_devices = itertools.count(100_000)  # Triton keys its compiled kernels by device


@dataclass(frozen=True)
class Compiled:
    """One kernel as a GPU would load it."""

    name: str
    arch: int
    ptx: str
    cubin: Path
    shared: int  # bytes a block asks for

    def usage(self) -> dict[str, int]:
        """What cuobjdump says: REG, STACK, SHARED, LOCAL, in registers and bytes."""
        text = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", str(self.cubin)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        line = text[text.index(self.name) :].splitlines()[1]
        return {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}


def cuobjdump() -> str:
    """The disassembler that comes with Triton, or the one on PATH."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("cuobjdump: pip install nvidia-cuda-cuobjdump")
    return found


class _Utils:
    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        # The most any GPU has: what exceeds its own arch's limit is for the test to find.
        return {"max_shared_mem": 1 << 20, "multiprocessor_count": 132, "warpSize": 32}

    @staticmethod
    def load_binary(*args: Any) -> tuple[Any, ...]:
        return object(), None, 0, 0, 1024  # a module, so that it is loaded once


class _CompileOnlyDriver(DriverBase):
    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.utils = _Utils()
        self.device = next(_devices)

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *args: None

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Any:
        return triton.testing.do_bench

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@contextlib.contextmanager
def compile_only(arch: int | str) -> Iterator[list[Compiled]]:
    """Compile Triton launches in this context for `arch`; yields what was loaded.

    Kernels for AMD ("gfx942") are compiled but not loaded: read them from `run.compiled`.
    """
    amd = str(arch).startswith("gfx")
    number = 0 if amd else int(str(arch).removeprefix("sm_"))
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", number, 32)
    compiled: list[Compiled] = []

    def remember(module: Any, function: Any, name: str, files: Any, digest: str) -> None:
        paths = {Path(p).suffix: Path(p) for p in files.values()}
        shared = json.loads(paths[".json"].read_text())["shared"]
        ptx = paths[".ptx"].read_text()
        compiled.append(Compiled(name, number, ptx, paths[".cubin"], shared))

    active, hook = driver._active, knobs.runtime.kernel_load_start_hook
    driver.set_active(_CompileOnlyDriver(target))
    knobs.runtime.kernel_load_start_hook = remember
    try:
        yield compiled
    finally:
        driver._active = active
        knobs.runtime.kernel_load_start_hook = hook
