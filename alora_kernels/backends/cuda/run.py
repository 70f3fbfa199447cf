"""Runs programs on a GPU: names become places once, then each call is tensors and one crossing.

A program that is ready to run holds no address, no stream, no device and no contents: it is the
same for every call of its layouts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .extension import extension
from .steps import Launch, Make, Program, Torch, packed

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
    index = {name: i for i, name in enumerate(program.inputs)}
    residues = [-1 if r is None else r for r in program.residues]
    makes: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = []
    for make in program.steps:
        if isinstance(make, Make):
            index[make.view.tensor] = len(index)
            function = Tensor.new_zeros if make.zero else Tensor.new_empty
            own = {} if make.view.dtype == program.dtype else {"dtype": make.view.dtype}
            makes.append((function, make.view.shape, own))
            residues.append(0)
    actions: list[tuple[Any, ...]] = []
    rest = [step for step in program.steps if not isinstance(step, Make)]
    for is_launch, some in itertools.groupby(rest, lambda step: isinstance(step, Launch)):
        if is_launch:
            launches = [packed(launch, index) for launch in some if isinstance(launch, Launch)]
            actions.append((extension().Program(launches, list(residues)), None, (), (), False))
            continue
        for step in some:
            assert isinstance(step, Torch)
            operands = tuple([-1 if v is None else index[v.tensor] for v in step.operands])
            fresh = step.result is not None
            if step.result is not None:
                index[step.result.tensor] = len(index)
                residues.append(0)
            actions.append((None, FUNCTIONS[step.function], operands, step.constants, fresh))
    results = [None if name is None else index[name] for name in program.results]

    def run(tensors: list[Tensor | None]) -> Results | None:
        first: Any = tensors[0]
        device = first.get_device()
        for make, shape, options in makes:
            tensors.append(make(first, *shape, **options))
        addresses: list[int] = []
        for launch, function, operands, constants, fresh in actions:
            if launch is not None:
                addresses += [0 if t is None else t.data_ptr() for t in tensors[len(addresses) :]]
                if not launch(addresses, device, torch._C._cuda_getCurrentRawStream(device)):
                    return None
                continue
            result = function(*[None if i < 0 else tensors[i] for i in operands], *constants)
            if fresh:
                tensors.append(result.contiguous())
        return [None if i is None else tensors[i] for i in results]

    return run
