"""`TritonBackend`: what it serves, and one program for each signature of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ...contract import Call, Gradients, Needs, Problem, Projection, saved_columns, saved_dtype
from ...cost import Schedule
from ..programs import (
    KeptPrograms,
    Layouts,
    Run,
    View,
    flat_inputs,
    fresh,
    layouts_of,
    signature_of,
)
from . import target, tune
from .configs import MAX_ONEPASS_RANK, MAX_RANK
from .kernels import Machine, Pass
from .program import program
from .schedule import schedules
from .steps import launches

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TritonBackend(KeptPrograms):
    """Programs are kept by all that they are a function of: the strategy, options and needs of the
    call, the layouts of its tensors, how float32 products are formed, the device and Triton's
    driver for it, and whether addresses are aligned.
    """

    name = "triton"

    def why_not_here(self) -> str | None:
        if not target.installed():
            return "triton is not installed"
        if target.interpreting():
            return None
        found = target.target()
        if found is None or found.backend not in ("cuda", "hip"):
            return "no NVIDIA or AMD GPU is visible to triton"
        if found.backend == "hip":
            return None
        return None if found.arch >= 80 else f"sm_{found.arch} is older than sm_80"

    def accepts_device(self, device_type: str) -> bool:
        """Whether tensors of this device type can be handed to the kernels.

        Asking about the CPU starts no GPU's driver.
        """
        if device_type == "cpu":
            return target.installed() and target.takes_cpu_tensors()
        return device_type == "cuda" and not target.interpreting()

    def why_not(self, problem: Problem, strategy: str) -> str | None:
        if not self.accepts_device(problem.device):
            return f"the tensors are on {problem.device}"
        here = self.why_not_here()
        if here is not None:
            return here
        if problem.dtype not in DTYPES:
            return f"{problem.dtype} has no Triton kernel"
        if problem.adapter_dtype not in DTYPES:
            return f"an adapter in {problem.adapter_dtype} has no Triton kernel"
        rank = max(problem.ranks)
        if rank > MAX_RANK:
            return f"rank {rank} is above {MAX_RANK}"
        if strategy == "delta":
            return None
        if problem.base_given:
            return "the base output is given: only 'delta' adds to it"
        if problem.adapter_precision == "fp32":
            return "adapter_precision='fp32' needs 'delta'"
        if problem.strict_inactive:
            return "strict_inactive needs 'delta'"
        if strategy == "onepass":
            if problem.dropout and not problem.backward:
                return "with dropout the base and the adapter read different inputs: no 'onepass'"
            if rank > MAX_ONEPASS_RANK:
                return (
                    f"rank {rank} is above the {MAX_ONEPASS_RANK} columns that 'onepass' can hold"
                )
        return None

    def schedules(self, problem: Problem, strategy: str) -> tuple[Schedule, ...]:
        """What the cost model asks for: the GEMM of each projection."""
        return schedules(problem, strategy)

    def forward(
        self, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
        base_outs: Sequence[Tensor] | None, save: bool,
    ) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
        inputs = flat_inputs(x, projections, *(base_outs or ()))
        precision, driver = _precision(call, x), target.active_driver()
        if call.memory is not None and base_outs is None:
            key: Hashable = (driver, call.memory, strategy, save, precision)
        else:
            key = (
                driver, _options(call), strategy, save, precision, base_outs is None,
                signature_of(inputs),
            )  # fmt: skip
        with _on_device(x):
            found = self._again(key, inputs, call)
            if found is None:
                asked = _pass(call, strategy, x, precision, save=save)
                layouts = layouts_of(x, projections, base_outs=base_outs)
                found = self._anew(key, inputs, call, lambda: _planned(asked, layouts))
        xa = found.pop()
        return found, xa  # type: ignore[return-value]

    def backward(
        self, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection],
        xa: Tensor | None, dys: Sequence[Tensor], needs: Needs,
    ) -> Gradients:  # fmt: skip
        count = len(projections)
        inputs = flat_inputs(x, projections, xa, *dys)
        precision, driver = _precision(call, x), target.active_driver()
        # (Hooks of autograd may have laid out saved tensors anew: `memory` is of forward's.)
        key = (driver, _options(call), strategy, needs, precision, signature_of(inputs))
        with _on_device(x):
            found = self._again(key, inputs, call)
            if found is None:
                asked = _pass(call, strategy, x, precision, needs=needs)
                layouts = layouts_of(x, projections, xa=xa, dys=dys)
                found = self._anew(key, inputs, call, lambda: _planned(asked, layouts))
        dx, *rest = found
        return Gradients(dx, rest[:count], rest[count : 2 * count], rest[2 * count :])

    def compile(
        self, call: Call, strategy: str, x: Tensor, projections: Sequence[Projection], *,
        save: bool, needs: Needs | None,
    ) -> set[Any]:  # fmt: skip
        """The compiled kernels of a call, or of its backward where `needs` says what for.

        Nothing is launched. Only the shape of `x` counts: what is not a parameter is taken to be
        contiguous and aligned.
        """
        from .run import compiled

        rows = x.shape[0]
        given = projections[0].weight is None

        def wide(name: str) -> tuple[View, ...]:
            return tuple([
                fresh(f"{name}{i}", (rows, p.lora_b.shape[0]), x.dtype)
                for i, p in enumerate(projections)
            ])  # fmt: skip

        layouts = layouts_of(x, projections)._replace(
            x=fresh("x", x.shape, x.dtype), base_outs=wide("base_out") if given else None
        )
        with _on_device(x):
            if needs is None:
                asked = _pass(call, strategy, x, _precision(call, x), save=save)
            else:
                asked = _pass(call, strategy, x, _precision(call, x), needs=needs)
                ranks = [p.lora_a.shape[0] for p in projections]
                xa = fresh("xa", (rows, saved_columns(ranks)[1]), asked.low_dtype)
                layouts = layouts._replace(base_outs=None, xa=xa, dys=wide("dy"))
            return {compiled(launch) for launch in launches(program(asked, layouts))}


def _planned(asked: Pass, layouts: Layouts) -> Run:
    from .run import ready  # needs triton

    return ready(program(asked, layouts))


def _pass(call: Call, strategy: str, x: Tensor, precision: str, **rest: Any) -> Pass:
    """What a call asks for, on the machine where x is."""
    arch = target.arch()
    machine = Machine(
        target.processors(x.device), arch, precision, target.uses_descriptors(arch),
        tune.enabled() and not target.interpreting(),
    )  # fmt: skip
    activation, options = call.activation, call.options
    return Pass(
        strategy, call.scalings, activation.max_active, activation.planned_active, machine,
        dropout_p=options.dropout_p, prefix_grad=options.prefix_grad,
        low_dtype=saved_dtype(x.dtype, options.adapter_precision), **rest,
    )  # fmt: skip


def _precision(call: Call, x: Tensor) -> str:
    """How float32 products are formed, where there are any."""
    if x.dtype is torch.float32 or call.options.adapter_precision == "fp32":
        return target.float32_precision()
    return "ieee"


def _options(call: Call) -> tuple[Any, ...]:
    """All of a call and its activation that is no tensor and that programs depend on."""
    activation = call.activation
    return (call.scalings, call.options, activation.max_active, activation.planned_active)


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of `x`."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _HERE


_HERE: AbstractContextManager[object] = contextlib.nullcontext()
