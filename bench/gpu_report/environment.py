"""The machine, the build, and what the machine can do at best."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from alora_kernels.__main__ import report as installed
from alora_kernels.dispatch import BACKENDS
from bench.common.clocks import Call
from bench.common.machine import arch_of, commit, cpu_name
from bench.gpu_report.context import Context, LeftOut

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "numpy", "peft", "transformers", "pytest", "pybind11", "ninja")
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "nvidia-smi")
GEMMS = (  # M, N, K
    (8192, 8192, 8192),
    (8192, 4096, 4096),
    (256, 4096, 4096),
    (16, 4096, 4096),
    (1, 4096, 4096),
)
COPIED = 1 << 30  # bytes


def environment(context: Context) -> None:
    """Names and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    gpu = context.device.type == "cuda"
    context.save(
        gpu=torch.cuda.get_device_name(context.device) if gpu else "no GPU",
        arch=arch_of(context.device),
        cpu=f"{cpu_name()}, {os.cpu_count()} cores",
        python=platform.python_version(),
        versions=versions,
        commit=commit(),
        tools={tool: shutil.which(tool) or "not found" for tool in TOOLS},
        installed=installed(),
    )
    if gpu:
        fields = "name,driver_version,memory.total,clocks.max.sm,power.limit,compute_mode"
        context.save(
            nvidia_smi=_said(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"])
        )
    context.save(nvcc=_said(["nvcc", "--version"]).splitlines()[-1:])


def _said(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known: {error}"
    return (done.stdout or done.stderr).strip()


def build(context: Context) -> None:
    """The CUDA extension in place, for this GPU alone, where there is none yet."""
    reason = BACKENDS["cuda"].why_not_here()
    if context.device.type != "cuda":
        raise LeftOut("there is no GPU to build for")
    if reason is None:
        raise LeftOut("the extension is there and loads")
    major, minor = torch.cuda.get_device_capability(context.device)
    wanted = f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}"
    context.save(archs=wanted, before=reason)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env={**os.environ, "ALORA_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": wanted},
        capture_output=True,
        text=True,
    )
    print(done.stdout[-4000:], done.stderr[-4000:])
    context.save(status=done.returncode)
    if done.returncode:
        raise RuntimeError(f"the build ended with exit status {done.returncode}")


def ceilings(context: Context) -> None:
    """Copy bandwidth, and the vendor's GEMM at the sizes of the report."""
    (clock, *_), device = context.clocks, context.device
    size = 1 << 16 if context.rehearsal else COPIED

    def seconds(call: Call) -> float:
        ready = clock.prepare(call)
        return statistics.median([clock.sample(ready, 5) for _ in range(3)])

    a = torch.empty(size, dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    context.save(copy_tb_per_s=2e-12 * size / seconds(functools.partial(b.copy_, a)), gemm=[])
    for m, n, k in [(16, 32, 64)] if context.rehearsal else GEMMS:
        x = torch.randn(m, k, device=device).bfloat16()
        weight = torch.randn(n, k, device=device).bfloat16()
        taken = seconds(functools.partial(torch.nn.functional.linear, x, weight))
        line = {
            "m": m, "n": n, "k": k, "us": taken * 1e6, "tflop_per_s": 2e-12 * m * n * k / taken,
            "tb_per_s": 2e-12 * (m * k + n * k + m * n) / taken,
        }  # fmt: skip
        context.save(gemm=[*context.data["gemm"], line])
