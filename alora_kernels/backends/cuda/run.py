"""Runs programs on a GPU: names become places once, then each call is tensors and one crossing.

A program that is ready to run holds no address, no stream, no device and no contents: it is the
same for every call of its layouts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .extension import extension
from .steps import Launch, Make, Program, Torch, packed

SCRATCH_ALIGNMENT = 256  # bytes, as PyTorch's own allocations

Results = list[Tensor | None]
Run = Callable[[list[Tensor | None]], Results | None]


def bias_gradient(row_adapter: Tensor, dy: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """scaling · Σ_active dy, summed in float32."""
    active = (row_adapter >= 0).unsqueeze(1)
    sums = torch.where(active, dy, 0).sum(0, dtype=torch.float32)
    return (sums * scaling).to(dtype)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "linear": F.linear,
    "mm": torch.mm,
    "addmm_": Tensor.addmm_,
    "contiguous": Tensor.contiguous,
    "bias_gradient": bias_gradient,
}


def ready(program: Program) -> Run:
    """`program` as a function of its inputs, by C++ on the GPU where they lie.

    The function gives None, and has changed nothing, where an input's address is not what
    `program.residues` says.
    """
    places: dict[str, tuple[int, int]] = {name: (i, 0) for i, name in enumerate(program.inputs)}
    residues = [-1 if r is None else r for r in program.residues]
    makes: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = []

    def make(shape: tuple[int, ...], dtype: torch.dtype, zero: bool) -> int:
        function: Callable[..., Tensor] = Tensor.new_zeros if zero else Tensor.new_empty
        if dtype != program.dtype:
            function = functools.partial(function, dtype=dtype)
        makes.append((function, shape))
        residues.append(0)
        return len(residues) - 1

    scratch, length = _scratch(program)
    for step in program.steps:
        if isinstance(step, Make) and step.view.tensor not in scratch:
            view = step.view
            places[view.tensor] = make(view.shape, view.dtype, step.zero), 0
    if length:
        whole = make((length,), program.dtype, False)
        places |= {name: (whole, begin) for name, begin in scratch.items()}
    actions: list[tuple[Any, ...]] = []
    rest = [step for step in program.steps if not isinstance(step, Make)]
    for is_launch, some in itertools.groupby(rest, lambda step: isinstance(step, Launch)):
        if is_launch:
            launches = [packed(launch, places) for launch in some if isinstance(launch, Launch)]
            actions.append((extension().Program(launches, list(residues)), None, (), (), False))
            continue
        for step in some:
            assert isinstance(step, Torch)
            operands = tuple([-1 if v is None else places[v.tensor][0] for v in step.operands])
            if step.result is not None:
                places[step.result.tensor] = len(residues), 0
                residues.append(0)
            function = FUNCTIONS[step.function]
            actions.append((None, function, operands, step.constants, step.result is not None))
    results = [None if name is None else places[name][0] for name in program.results]

    def run(tensors: list[Tensor | None]) -> Results | None:
        first: Any = tensors[0]
        device = first.get_device()
        for function, shape in makes:
            tensors.append(function(first, *shape))
        addresses: list[int] = []
        for launch, function, operands, constants, fresh in actions:
            if launch is not None:
                some = tensors[len(addresses) :] if addresses else tensors
                addresses += [0 if t is None else t.data_ptr() for t in some]
                if not launch(addresses, device, torch._C._cuda_getCurrentRawStream(device)):
                    return None
                continue
            result = function(*[None if i < 0 else tensors[i] for i in operands], *constants)
            if fresh:
                tensors.append(result.contiguous())
        return [None if i is None else tensors[i] for i in results]

    return run


def _scratch(program: Program) -> tuple[dict[str, int], int]:
    """Tensors that only kernels see, as parts of one: where each begins, in bytes, and how many
    elements of `program.dtype` there are."""
    seen = set(program.results)
    for step in program.steps:
        if isinstance(step, Torch):
            seen |= {view.tensor for view in step.operands if view is not None}
    begins, end = {}, 0
    for step in program.steps:
        if isinstance(step, Make) and not step.zero and step.view.tensor not in seen:
            begins[step.view.tensor] = end
            size = math.prod(step.view.shape) * step.view.dtype.itemsize
            end += -(-size // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
    return begins, end // program.dtype.itemsize
