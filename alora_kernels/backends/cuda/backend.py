"""`CudaBackend`: what it serves, and one program for each signature of a call."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...contract import Call, Gradients, Needs, Problem, Projection
from ...cost import Schedule, rates_of
from ..programs import KeptPrograms, Layouts, Program, Run, flat_inputs, layouts_of, signature_of
from .extension import extension
from .kernels import Pass
from .plan import MAX_ONEPASS_RANK, MAX_RANK, NAMES
from .program import program, schedules
from .run import ready

BUILD_FILE = Path(__file__).resolve().parents[2] / "_cuda_build.json"


@functools.cache
def build_report() -> dict[str, Any]:
    """What the build wrote down: nvcc's version, the archs, and ptxas's figures of each kernel."""
    return json.loads(BUILD_FILE.read_text()) if BUILD_FILE.exists() else {}


@functools.cache
def _why_not_here() -> str | None:
    try:
        _cuda = extension()
    except ImportError as error:
        if BUILD_FILE.exists():
            return f"the extension alora_kernels._cuda does not load: {error}"
        return "the extension alora_kernels._cuda is not built: install where nvcc is found"
    driver, runtime = _cuda.versions()
    if driver == 0:
        return "no NVIDIA driver is installed"
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver supports CUDA {_version(driver)}, the kernels were built with "
            f"{_version(runtime)}: update the driver, or build with an older nvcc"
        )
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is visible to torch"
    return why_no_kernel(*torch.cuda.get_device_capability(), build_report().get("archs", []))


def why_no_kernel(major: int, minor: int, archs: Sequence[str]) -> str | None:
    """Why none of the built `archs` (`"sm_80"`, `"sm_90a"`, `"compute_80"`) runs on a GPU.

    Binaries run on the same major version from their minor version on, those with a suffix on
    exactly theirs; PTX runs on everything not older.
    """
    here = 10 * major + minor
    for arch in archs:
        kind, _, name = arch.partition("_")
        number = int(name.rstrip("af"))
        if kind == "compute" and name.isdigit() and number <= here:
            return None
        exact = not name.isdigit()
        if kind == "sm" and (number == here if exact else number // 10 == major and number <= here):
            return None
    return f"no kernel was built for sm_{here} (built: {', '.join(archs) or 'none'})"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _hopper() -> bool:
    """Whether Hopper's own kernels were built."""
    return "sm_90a" in build_report().get("archs", [])


@functools.cache
def _machine(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, arch)"""
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    if arch == 90 and not _hopper():
        arch = 80
    return properties.multi_processor_count, arch


class CudaBackend(KeptPrograms):
    """`make_ready` and `machine` are for tests, which execute programs without a GPU.

    Programs are kept by all that they are a function of: the strategy, options and needs of the
    call, the layouts of its tensors, the machine's device, and whether addresses are aligned. What
    changes from call to call (addresses, streams, contents) is no part of a program.
    """

    name = "cuda"

    def __init__(
        self,
        make_ready: Callable[[Program], Run] = ready,
        machine: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self._make_ready = make_ready
        self._fixed_machine = machine

    def why_not_here(self) -> str | None:
        return None if self._make_ready is not ready else _why_not_here()

    def why_not(self, problem: Problem, strategy: str) -> str | None:
        here = self.why_not_here()
        if here is not None:
            return here
        if problem.device != "cuda" and self._make_ready is ready:
            return f"the tensors are on {problem.device}"
        if problem.dtype not in NAMES:
            return f"{problem.dtype} has no CUDA kernel: bfloat16 and float16 have"
        if problem.adapter_dtype not in (problem.dtype, torch.float32):
            return f"adapters in {problem.adapter_dtype} over {problem.dtype} have no CUDA kernel"
        if problem.adapter_precision == "fp32":
            return "adapter_precision='fp32' has no CUDA kernel"
        rank = max(problem.ranks)
        if rank > MAX_RANK:
            return f"rank {rank} is above {MAX_RANK}"
        if strategy == "delta":
            return None
        if problem.base_given:
            return "the base output is given: only 'delta' adds to it"
        if problem.strict_inactive:
            return "strict_inactive needs 'delta'"
        if strategy == "onepass" and rank > MAX_ONEPASS_RANK:
            return f"rank {rank} is above {MAX_ONEPASS_RANK}, the most that 'onepass' takes"
        if strategy == "onepass" and problem.dropout:
            return "with dropout the adapter reads another x than the base: use 'tail' or 'delta'"
        return None

    def schedules(self, problem: Problem, strategy: str) -> tuple[Schedule, ...]:
        """What the cost model asks for: the GEMM of each projection."""
        arch = 80 if problem.arch == 90 and not _hopper() else problem.arch
        return schedules(problem, strategy, self._fixed_machine or (rates_of(arch).sms, arch))

    def forward(
        self, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
        base_outs: Sequence[Tensor] | None, save: bool,
    ) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
        inputs = flat_inputs(x, projections, *(base_outs or ()))
        if call.memory is not None and base_outs is None:
            key: Hashable = (call.memory, strategy, save)
        else:
            key = (_options(call), strategy, save, base_outs is None, signature_of(inputs))
        found = self._again(key, inputs, call)
        if found is None:
            asked = Pass(
                strategy, call.scalings, call.activation.max_active, *self._machine(x),
                dropout_p=call.options.dropout_p, save=save,
            )  # fmt: skip
            layouts = layouts_of(x, projections, base_outs=base_outs)
            found = self._anew(key, inputs, call, lambda: self._planned(asked, layouts))
        xa = found.pop()
        return found, xa  # type: ignore[return-value]

    def backward(
        self, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
        xa: Tensor | None, dys: Sequence[Tensor], needs: Needs,
    ) -> Gradients:  # fmt: skip
        count = len(projections)
        inputs = flat_inputs(x, projections, xa, *dys)
        # (Hooks of autograd may have laid out saved tensors anew: `known` is of forward's.)
        key = (_options(call), strategy, needs, signature_of(inputs))
        found = self._again(key, inputs, call)
        if found is None:
            asked = Pass(
                strategy, call.scalings, call.activation.max_active, *self._machine(x),
                dropout_p=call.options.dropout_p, prefix_grad=call.options.prefix_grad, needs=needs,
            )  # fmt: skip
            layouts = layouts_of(x, projections, xa=xa, dys=dys)
            found = self._anew(key, inputs, call, lambda: self._planned(asked, layouts))
        dx, *rest = found
        return Gradients(dx, rest[:count], rest[count : 2 * count], rest[2 * count :])

    def _planned(self, asked: Pass, layouts: Layouts) -> Run:
        return self._make_ready(program(asked, layouts))

    def _machine(self, x: Tensor) -> tuple[int, int]:
        return self._fixed_machine or _machine(x.device)


def _options(call: Call) -> tuple[Any, ...]:
    """All of a call and its activation that is no tensor and that programs depend on."""
    return (call.scalings, call.options, call.activation.max_active)
