"""CUTLASS device GEMMs: compiled by nvcc from the PyPI package `nvidia-cutlass`, run on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import subprocess
from pathlib import Path

import numpy as np

from .machine import Machine
from .nvcc import KERNELS, NVCC, cache
from .nvcc import WHY_NOT as NO_NVCC
from .parser import Module


def _source() -> Path | None:
    spec = importlib.util.find_spec("cutlass_library")
    folder = Path(spec.origin).parent / "source" if spec and spec.origin else None
    return folder if folder and (folder / "include" / "cutlass").is_dir() else None


SOURCE = _source()
WHY_NOT = NO_NVCC or (
    "" if SOURCE else "the package nvidia-cutlass is missing: pip install --no-deps nvidia-cutlass"
)


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled kernel and the host program that makes its launch."""

    module: Module
    host: Path


@functools.cache
def build(name: str, arch: str, flags: tuple[str, ...] = ()) -> Built:
    """Compile kernels/<name>.cu for a virtual arch such as compute_80: PTX and host in one run.

    Cached by the text of the source, the flags and where CUTLASS lies.
    """
    assert SOURCE is not None and NVCC is not None, WHY_NOT
    source = KERNELS / f"{name}.cu"
    text = repr((source.read_text(), arch, flags, str(SOURCE)))
    folder = cache() / f"{name}.{arch}.{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    if not folder.exists():
        work = folder.with_suffix(f".{os.getpid()}")
        work.mkdir()
        include = [f"-I{SOURCE / p}" for p in ("include", "tools/util/include")]
        # code=compute_*: PTX alone, without the assembler's minute.
        target = ["-gencode", f"arch={arch},code={arch}"]
        done = subprocess.run(
            [NVCC, "-std=c++17", "-O2", "-w", "-lineinfo", *target, *flags, *include, "--keep",
             "--keep-dir", str(work), "-o", str(work / "host"), str(source)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"nvcc {source.name}: {done.stderr[-3000:]}")
        for path in work.iterdir():
            if path.suffix != ".ptx" and path.name != "host":
                path.unlink()
        with contextlib.suppress(OSError):  # another process was faster
            work.rename(folder)
    (ptx,) = folder.glob("*.ptx")
    return Built(Module(ptx.read_text()), folder / "host")


def gemm(
    built: Built, a: np.ndarray, b: np.ndarray, out: type, processors: int = 2, **options: object
) -> tuple[np.ndarray, Machine]:
    """a [M, K] · b [N, K]ᵀ by the built kernel; bf16 operands as uint16."""
    (m, k), n = a.shape, b.shape[0]
    gpu = Machine()
    addresses = [gpu.put(a), gpu.put(b), gpu.empty((m, n), out)]
    said = subprocess.run(
        [str(built.host), *map(str, (m, n, k)), *map(hex, addresses), str(processors)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    *numbers, blob = said.stdout.split()
    gx, gy, gz, threads, smem, cx, cy, cz = map(int, numbers)
    params = np.frombuffer(bytes.fromhex(blob), np.uint8)
    (name,) = built.module.kernels
    size = built.module.kernels[name].params[0][2]
    assert size == len(params), f"{size} bytes of parameters in the PTX, {len(params)} on the host"
    gpu.launch(
        built.module, name, (gx, gy, gz), threads, [params], smem=smem, cluster=(cx, cy, cz),
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    assert gpu.unwritten(addresses[2]) == 0
    return gpu.get(addresses[2]), gpu
