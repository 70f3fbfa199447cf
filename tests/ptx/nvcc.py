"""PTX of a CUDA source by nvcc, compiled once for each state of the source."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .parser import Module

KERNELS = Path(__file__).with_name("kernels")
NVCC = shutil.which("nvcc")
WHY_NOT = "" if NVCC else "nvcc is not on PATH: kernels in CUDA C++ cannot be compiled"


def cache() -> Path:
    """Where compiled files are kept: ALORA_PTX_CACHE, or a folder for temporary files."""
    folder = Path(os.environ.get("ALORA_PTX_CACHE", Path(tempfile.gettempdir()) / "alora_ptx"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compiled(
    source: Path, arch: str, flags: Sequence[str] = (), suffix: str = "ptx", seed: str = ""
) -> Path:
    """`nvcc source` with `flags`; cached by the text of the source, the flags and `seed`."""
    assert NVCC is not None, WHY_NOT
    key = hashlib.sha256(repr((source.read_text(), arch, *flags, seed)).encode()).hexdigest()[:20]
    out = cache() / f"{source.stem}.{arch}.{key}.{suffix}"
    if not out.exists():
        part = out.with_suffix(f".{os.getpid()}")
        target = [f"-arch={arch}"] if arch else []
        done = subprocess.run(
            [NVCC, "-std=c++17", "-O3", *target, *flags, "-o", str(part), str(source)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"nvcc {source.name}: {done.stderr[-3000:]}")
        part.rename(out)
    return out


@functools.cache
def text_of(name: str, arch: str) -> str:
    """PTX of tests/ptx/kernels/<name>.cu, with source lines."""
    return compiled(KERNELS / f"{name}.cu", arch, ["-ptx", "-lineinfo"]).read_text()


@functools.cache
def module_of(name: str, arch: str) -> Module:
    """The same, parsed."""
    return Module(text_of(name, arch))
