"""Executes programs on the CPU, their kernels from nvcc's PTX: what stands in for a GPU."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alora_kernels.backends.cuda.params import MAP_BYTES
from alora_kernels.backends.cuda.steps import Launch, Packed, packed
from alora_kernels.backends.programs import FUNCTIONS, Make, Program, Run, Tensors

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


def step_by_step(program: Program, inputs: Sequence[Tensor | None], send: Any) -> Tensors | None:
    """`program` by its definition: one step after the other, `send(launch, tensors)` for a kernel.

    `tensors` are those that there are so far, by name.
    """
    for tensor, residue in zip(inputs, program.residues, strict=True):
        if residue is not None and (0 if tensor is None else tensor.data_ptr() % 16) != residue:
            return None
    tensors = dict(zip(program.inputs, inputs, strict=True))
    x = inputs[0]
    assert x is not None
    for step in program.steps:
        if isinstance(step, Make):
            make = torch.zeros if step.zero else torch.empty
            tensors[step.view.tensor] = make(
                step.view.shape, dtype=step.view.dtype, device=x.device
            )
        elif isinstance(step, Launch):
            send(step, tensors)
        else:
            operands = [None if v is None else tensors[v.tensor] for v in step.operands]
            result = FUNCTIONS[step.function](*operands, *step.constants)
            if step.result is not None:
                assert (result.shape, result.dtype) == (step.result.shape, step.result.dtype)
                tensors[step.result.tensor] = result.contiguous()
    return [None if name is None else tensors[name] for name in program.results]


class Sent(NamedTuple):
    """A launch with the tensors that it is to work on."""

    launch: Launch
    packed: Packed
    tensors: list[Tensor | None]
    counters: Tensor


class PtxSender:
    """Makes programs ready whose kernels the interpreter runs; CPU tensors are device memory.

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
        self.execute = True  # or only write down what is sent
        self.sent: list[Sent] = []
        self.counters = torch.zeros(4096, dtype=torch.int32)  # of one stream
        self.kernels: list[str] = []
        self.counts: dict[str, dict[str, int]] = {}  # of each kernel's last launch
        self.reports: dict[str, Any] = {}
        self.results: dict[str, Tensor] = {}  # what the case made, by name
        self.errors: dict[str, float] = {}  # PyTorch's own in each of them

    def __call__(self, program: Program) -> Run:
        return lambda inputs: step_by_step(program, inputs, self._send)

    def _send(self, launch: Launch, tensors: dict[str, Tensor | None]) -> None:
        places = {name: (i, 0) for i, name in enumerate(tensors)}
        self.sent.append(
            Sent(launch, packed(launch, places), list(tensors.values()), self.counters)
        )
        if self.execute:
            self.together(self.sent[-1:])

    def assert_counters_are_zero(self) -> None:
        """The kernels set back what they counted with."""
        assert (self.counters == 0).all(), "a counter was not set back"

    def together(self, launches: Sequence[Sent], seed: int | None = None) -> None:
        """Run launches side by side, as those of several streams may, taking turns by `seed`."""
        machine = Machine(1 << 27)
        places: dict[int, tuple[int, Tensor]] = {}

        def address(tensor: Tensor | None) -> int:
            assert tensor is not None
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in places:
                flat = torch.empty(0, dtype=torch.uint8).set_(storage)
                # Nothing is read past a storage's end, nor from memory that torch did not own.
                places[key] = machine.put(flat.numpy()), flat
            return places[key][0] + tensor.data_ptr() - key

        running = {}
        for i, (_, told, tensors, counters) in enumerate(launches):
            blob = np.frombuffer(bytearray(told.data), np.uint8)
            for m in told.maps:
                where = address(tensors[m.tensor]) + m.shift
                dims, box = (m.columns, m.rows), (m.box_columns, m.box_rows)
                encoded = machine.tensor_map(where, dims, [m.stride], box, 2, 3)
                blob[m.offset : m.offset + MAP_BYTES] = np.frombuffer(encoded.tobytes(), np.uint8)
            values = [(at, address(tensors[t]) + shift) for at, t, shift in told.addresses]
            for at, words in told.counters:
                assert words <= counters.numel()
                values.append((at, address(counters)))
            for at, value in values:
                blob[at : at + 8].view(np.uint64)[0] = value
            loaded = module(source_of(told.kernel), self.arch, self.csrc)
            kernel = loaded.kernels[told.kernel]
            assert kernel.params[0][2] == len(blob), "params.h and params.py disagree"
            running[i] = machine.running(
                loaded, told.kernel, told.grid, told.block, [blob], smem=told.shared,
                reverse=self.reverse, order=self.order if told.cooperative else "lockstep",
                resident=self.multiprocessors if told.cooperative else None,
                dependent=told.dependent,
            )  # fmt: skip
        draw = np.random.default_rng(seed)
        while running:
            i = int(draw.choice(list(running)))
            if next(running[i], running) is running:  # it has ended
                del running[i]
        for base, flat in places.values():
            flat.copy_(torch.from_numpy(machine.get(base)))
        for sent, report in zip(launches, machine.reports):
            kernel = sent.packed.kernel
            self.kernels.append(kernel)
            self.counts[kernel] = dict(machine.count)
            self.reports[kernel] = report

    def traffic(self, kernel: str, opcode: str, what: str) -> int:
        """Sum of `what` ("bytes", "wavefronts", "ideal") over instructions that begin so."""
        report = self.reports[kernel]
        lines = {i.line for i in report.kernel.code if ".".join(i.op).startswith(opcode)}
        return sum(getattr(t, what) for line, t in report.by_line.items() if line in lines)
