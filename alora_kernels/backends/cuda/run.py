"""Runs programs on a GPU: names become places once, then each call is tensors and one crossing.

A program that is ready to run holds no address, no stream, no device and no contents: it is the
same for every call of its layouts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..programs import FUNCTIONS, Make, Program, Run, Tensors, Torch
from .extension import extension
from .steps import Launch, packed

SCRATCH_ALIGNMENT = 256  # bytes, as PyTorch's own allocations

# Does something with the tensors, whose addresses are known so far, on a device. False: it refuses.
Action = Callable[[Tensors, list[int], int], bool]


def ready(program: Program) -> Run:
    """`program` as a function of its inputs, by C++ on the GPU where they lie.

    The function gives None, and has changed nothing, where an input's address is not what
    `program.residues` says.
    """
    places: dict[str, tuple[int, int]] = {name: (i, 0) for i, name in enumerate(program.inputs)}
    residues = [-1 if r is None else r for r in program.residues]
    makes: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = []

    def place(name: str) -> None:
        """The next tensor that is made is called `name`; PyTorch aligns its address."""
        places[name] = len(residues), 0
        residues.append(0)

    def make(name: str, shape: tuple[int, ...], dtype: torch.dtype, zero: bool = False) -> None:
        function: Callable[..., Tensor] = Tensor.new_zeros if zero else Tensor.new_empty
        if dtype != program.dtype:
            function = functools.partial(function, dtype=dtype)
        makes.append((function, shape))
        place(name)

    scratch, length = _scratch(program)
    for step in program.steps:
        if isinstance(step, Make) and step.view.tensor not in scratch:
            make(step.view.tensor, step.view.shape, step.view.dtype, step.zero)
    if length:
        make("scratch", (length,), program.dtype)
        whole, _ = places["scratch"]
        places |= {name: (whole, begin) for name, begin in scratch.items()}
    actions: list[Action] = []
    rest = [step for step in program.steps if not isinstance(step, Make)]
    for is_launch, some in itertools.groupby(rest, lambda step: isinstance(step, Launch)):
        if is_launch:
            launches = [packed(launch, places) for launch in some if isinstance(launch, Launch)]
            actions.append(_launching(extension().Program(launches, list(residues))))
            continue
        for step in some:
            assert isinstance(step, Torch)
            actions.append(_computing(step, places))
            if step.result is not None:
                place(step.result.tensor)
    results = [None if name is None else places[name][0] for name in program.results]

    def run(tensors: Tensors) -> Tensors | None:
        first: Any = tensors[0]
        for function, shape in makes:
            tensors.append(function(first, *shape))
        addresses: list[int] = []
        device = first.get_device()
        for act in actions:
            if not act(tensors, addresses, device):
                return None
        return [None if i is None else tensors[i] for i in results]

    return run


def _launching(program: Any) -> Action:
    """`program` of C++, on the current stream."""

    def launch(tensors: Tensors, addresses: list[int], device: int) -> bool:
        late = tensors[len(addresses) :] if addresses else tensors
        addresses += [0 if t is None else t.data_ptr() for t in late]
        return program(addresses, device, torch._C._cuda_getCurrentRawStream(device))

    return launch


def _computing(step: Torch, places: Mapping[str, tuple[int, int]]) -> Action:
    """What PyTorch computes."""
    function, constants, fresh = FUNCTIONS[step.function], step.constants, step.result is not None
    operands = [None if v is None else places[v.tensor][0] for v in step.operands]

    def compute(tensors: Tensors, addresses: list[int], device: int) -> bool:
        result = function(*[None if i is None else tensors[i] for i in operands], *constants)
        if fresh:
            tensors.append(result.contiguous())
        return True

    return compute


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
