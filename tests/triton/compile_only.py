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
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from ..ptx.triton_driver import TargetDriver, active, loaded

_devices = itertools.count(100_000)  # Triton keys its compiled kernels by device


@dataclass(frozen=True)
class Compiled:
    """One kernel as a GPU would load it."""

    name: str
    arch: int
    ptx: str
    cubin: bytes
    shared: int  # bytes a block asks for

    def usage(self) -> dict[str, int]:
        """What cuobjdump says: REG, STACK, SHARED, LOCAL, in registers and bytes."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(self.cubin)
            text = subprocess.run(
                [cuobjdump(), "--dump-resource-usage", file.name],
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
        return loaded(object(), None)  # a module, so that it is loaded once


class _CompileOnlyDriver(TargetDriver):
    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *args: None


@contextlib.contextmanager
def compile_only(arch: int | str) -> Iterator[list[Compiled]]:
    """Compile Triton launches in this context for `arch`; yields what was loaded.

    Kernels for AMD ("gfx942") are compiled but not loaded: read them from `run.compiled`.
    """
    name = str(arch).removeprefix("sm_")
    target: int | str = name if name.startswith("gfx") else int(name)
    compiled: list[Compiled] = []

    def remember(kernel: Any) -> None:
        assert isinstance(target, int)
        shared = kernel.metadata.shared
        compiled.append(
            Compiled(kernel.name, target, kernel.asm["ptx"], kernel.asm["cubin"], shared)
        )

    with active(_CompileOnlyDriver(target, next(_devices), _Utils()), remember):
        yield compiled
