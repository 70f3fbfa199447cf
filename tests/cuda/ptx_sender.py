"""Executes a plan's kernel from nvcc's PTX on the CPU: what stands in for a launch on a GPU."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alora_kernels.backends.cuda.layouts import LAYOUTS
from alora_kernels.backends.cuda.plan import Plan

from ..ptx import Machine, Module

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc")


@functools.cache
def _sources(csrc: Path) -> str:
    """A digest of everything that PTX depends on."""
    files = sorted(p for p in csrc.iterdir() if p.suffix in (".cu", ".cuh", ".h"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


def compiled(source: str, arch: str, form: str, csrc: Path = CSRC) -> Path:
    """`csrc/<source>` for `arch` as "ptx" or "cubin", made once for each state of the sources."""
    assert NVCC is not None
    folder = Path(tempfile.gettempdir()) / f"alora_kernels_{_sources(csrc)}"
    folder.mkdir(exist_ok=True)
    out = folder / f"{source}.{arch}.{form}"
    if not out.exists():
        part = out.with_suffix(f".{np.random.SeedSequence().entropy:x}")
        flags = ["-std=c++17", "-O3", f"-{form}", f"-arch={arch}", "-o", str(part)]
        subprocess.run([NVCC, *flags, str(csrc / source)], check=True)
        part.rename(out)
    return out


@functools.cache
def module(source: str, arch: str, csrc: Path) -> Module:
    """The PTX of `csrc/<source>` for `arch`."""
    return Module(compiled(source, arch, "ptx", csrc).read_text())


def source_of(kernel: str) -> str:
    """The file of csrc that defines `kernel`."""
    words = kernel.removeprefix("masked_lora_").removesuffix("_kernel").split("_")
    if words[0] == "fused":
        return "persistent_sm90.cu"
    if words[0] == "gemm":
        return "gemm_sm90.cu" if "sm90" in words[2] else f"gemm_{words[2]}.cu"
    if words[:2] == ["grad", "b"]:
        return "grad_b.cu"
    files = {"shrink": "shrink.cu", "expand": "expand_add.cu", "decode": "decode.cu"}
    return {**files, "onepass": "onepass_sm90.cu"}.get(words[0], "grad.cu")


Sent = tuple[Plan, Sequence[Any]]


class PtxSender:
    """Sends plans to the interpreter; CPU tensors are the device's memory.

    `reverse` runs the blocks in the opposite order: a result that depends on it is a race. Of a
    kernel whose blocks wait for each other `multiprocessors` run at once, as on that machine;
    `order` is that of its warps.
    """

    def __init__(
        self, arch: str = "sm_80", reverse: bool = False, csrc: Path = CSRC,
        multiprocessors: int = 132, order: str = "lockstep",
    ) -> None:  # fmt: skip
        self.arch, self.reverse, self.csrc = arch, reverse, csrc
        self.multiprocessors, self.order = multiprocessors, order
        self.kernels: list[str] = []
        self.counts: dict[str, dict[str, int]] = {}  # of each kernel's last launch
        self.reports: dict[str, Any] = {}
        self.results: dict[str, Tensor] = {}  # what the case made, by name
        self.errors: dict[str, float] = {}  # PyTorch's own in each of them

    def __call__(self, plan: Plan, fields: Sequence[Any]) -> None:
        self.together([(plan, fields)])

    def together(self, launches: Sequence[Sent], seed: int | None = None) -> None:
        """Run launches side by side, as those of several streams may, taking turns by `seed`."""
        machine = Machine(1 << 27)
        places: dict[int, tuple[int, Tensor]] = {}

        def address(tensor: Tensor) -> int:
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in places:
                flat = torch.empty(0, dtype=torch.uint8).set_(storage)
                # Nothing is read past a storage's end, nor from memory that torch did not own.
                places[key] = machine.put(flat.numpy()), flat
            return places[key][0] + tensor.data_ptr() - key

        running = {}
        for i, (plan, fields) in enumerate(launches):
            values: list[Any] = [
                b"" if spec is None else machine.tensor_map(
                    address(t), spec.dims, [spec.stride], spec.box, 2, 3
                ).tobytes()
                for spec, t in zip(plan.maps, fields)
            ]  # fmt: skip
            for v in fields[len(plan.maps) :]:
                values.append(0 if v is None else address(v) if isinstance(v, Tensor) else v)
            blob = np.frombuffer(LAYOUTS[plan.params].pack(*values), np.uint8)
            loaded = module(source_of(plan.kernel), self.arch, self.csrc)
            kernel = loaded.kernels[plan.kernel]
            assert kernel.params[0][2] == len(blob), "params.h and layouts.py disagree"
            running[i] = machine.running(
                loaded, plan.kernel, plan.grid, plan.block, [blob], smem=plan.shared,
                reverse=self.reverse, order=self.order if plan.cooperative else "lockstep",
                resident=self.multiprocessors if plan.cooperative else None,
                dependent=plan.dependent,
            )  # fmt: skip
        draw = np.random.default_rng(seed)
        while running:
            i = int(draw.choice(list(running)))
            if next(running[i], running) is running:  # it has ended
                del running[i]
        for base, flat in places.values():
            flat.copy_(torch.from_numpy(machine.get(base)))
        for (plan, _), report in zip(launches, machine.reports):
            self.kernels.append(plan.kernel)
            self.counts[plan.kernel] = dict(machine.count)
            self.reports[plan.kernel] = report

    def traffic(self, kernel: str, opcode: str, what: str) -> int:
        """Sum of `what` ("bytes", "wavefronts", "ideal") over instructions that begin so."""
        report = self.reports[kernel]
        lines = {i.line for i in report.kernel.code if ".".join(i.op).startswith(opcode)}
        return sum(getattr(t, what) for line, t in report.by_line.items() if line in lines)
