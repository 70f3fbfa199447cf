"""Runs programs: kernels are compiled and loaded once, then a call is tensors and launches.

A program that is ready to run holds compiled kernels, grids, constants and what descriptors are
made of, but no tensor, no address and no stream: it is the same for every call of its layouts.
Kernels are compiled from the program alone, so nothing needs to be launched for that.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ...once import log_once
from ..programs import FUNCTIONS, Make, Program, Run, Tensors, Torch, View
from . import target, tune
from .configs import Config
from .expand_add import masked_lora_expand_add_kernel
from .gemm import masked_lora_gemm_kernel
from .grad import masked_lora_grad_b_kernel, masked_lora_grad_kernel
from .reduce import masked_lora_reduce_kernel
from .shrink import masked_lora_shrink_kernel
from .steps import Choice, Described, Launch, Step

logger = logging.getLogger("alora_kernels")

KERNELS: dict[str, Any] = {
    "gemm": masked_lora_gemm_kernel,
    "shrink": masked_lora_shrink_kernel,
    "reduce": masked_lora_reduce_kernel,
    "expand_add": masked_lora_expand_add_kernel,
    "grad": masked_lora_grad_kernel,
    "grad_b": masked_lora_grad_b_kernel,
}
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Before 3.3 Triton's launchers took no value for a constexpr parameter.
_LAUNCHED_WITH_CONSTANTS = target.triton_version() >= (3, 3)

# Does something with the tensors on a stream; whether a profiler has hooks around launches.
Action = Callable[[Tensors, Any, bool], None]
Places = dict[str, int]  # where in the list of tensors a name's tensor is


class StandIn:
    """What the compiler asks of a tensor: dtype, alignment, and how many bytes are behind it."""

    def __init__(self, view: View) -> None:
        self.dtype, self._address = view.dtype, view.alignment
        last = sum([(n - 1) * stride for n, stride in zip(view.shape, view.strides)])
        self._bytes = (last + 1) * view.dtype.itemsize

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return self._bytes


def compiled(launch: Launch) -> Any:
    """The kernel of a launch, compiled for the current device; nothing is launched."""
    function = KERNELS[launch.kernel]
    if launch.fields.keys() != set(function.arg_names):
        odd = sorted(launch.fields.keys() ^ set(function.arg_names))
        raise TypeError(f"{launch.kernel}: given without a parameter, or not given: {odd}")
    fields = {name: _for_compiler(value) for name, value in launch.fields.items()}
    kernel = function.warmup(grid=launch.grid, **fields, **_options(launch))
    return kernel.result() if hasattr(kernel, "result") else kernel


def _options(launch: Launch) -> dict[str, Any]:
    # Said outright because Triton 3.9 warns while the default is about to change.
    return {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}


def _for_compiler(value: Any) -> Any:
    if isinstance(value, View):
        return StandIn(value)
    if isinstance(value, Described):
        return _descriptor(value)
    return DTYPES[value] if isinstance(value, torch.dtype) else value


def _descriptor(described: Described) -> Any:
    """Triton's descriptor of a matrix that has no address yet."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    view = described.view
    return TensorDescriptor(
        StandIn(view), list(view.shape), list(view.strides), list(described.block)
    )


def ready(program: Program) -> Run:
    """`program` as a function of its inputs, on the current device and by Triton's driver of now.

    The function gives None, and has changed nothing, where an input's address is not what
    `program.residues` says.
    """
    places: Places = {name: i for i, name in enumerate(program.inputs)}
    expected = [(i, r) for i, r in enumerate(program.residues) if r is not None]
    actions = _actions(program.steps, places)
    results = [None if name is None else places[name] for name in program.results]
    stream_of: Callable[[int], Any] = _no_stream
    if not target.interpreting():
        from triton.runtime import driver

        stream_of = driver.active.get_current_stream

    def run(tensors: Tensors) -> Tensors | None:
        for i, residue in expected:
            t = tensors[i]
            if t is not None and t.data_ptr() % 16 != residue:
                return None
        first: Any = tensors[0]
        stream = stream_of(first.get_device())
        observed = _observed()
        for act in actions:
            act(tensors, stream, observed)
        return [None if i is None else tensors[i] for i in results]

    return run


def _hooks() -> Any:
    """Where this Triton keeps its hooks: `knobs` from 3.4 on."""
    if importlib.util.find_spec("triton.knobs") is not None:
        return importlib.import_module("triton.knobs").runtime
    return importlib.import_module("triton.compiler").CompiledKernel


_HOOKS = _hooks()


def _observed() -> bool:
    """Whether anything wants to know of launches: Proton, or another hook of Triton's."""
    for hook in (_HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook):
        if getattr(hook, "calls", hook):  # a chain of hooks; before 3.5 one, or None
            return True
    return False


def _no_stream(device: int) -> None:
    return None


def _actions(steps: Iterable[Step], places: Places) -> list[Action]:
    """`steps` as actions; `places` gets what they make."""
    actions: list[Action] = []
    for step in steps:
        if isinstance(step, Make):
            actions.append(_making(step))
            places[step.view.tensor] = _next(places)
        elif isinstance(step, Torch):
            actions.append(_computing(step, places))
            if step.result is not None:
                places[step.result.tensor] = _next(places)
        elif isinstance(step, Choice):
            actions.append(_choosing(step, places))
        else:
            launching = _interpreting if target.interpreting() else _launching
            actions.append(launching(step, places))
    return actions


def _next(places: Places) -> int:
    """Where the next tensor comes; names may stand for new tensors within a choice."""
    return 1 + max(places.values())


def _making(step: Make) -> Action:
    """A new tensor."""
    shape, dtype, zero = step.view.shape, step.view.dtype, step.zero

    def make(tensors: Tensors, stream: Any, observed: bool) -> None:
        first: Any = tensors[0]
        if zero:
            tensors.append(first.new_zeros(shape, dtype=dtype))
        elif first.dtype is dtype:
            tensors.append(first.new_empty(shape))
        else:
            tensors.append(first.new_empty(shape, dtype=dtype))

    return make


def _computing(step: Torch, places: Places) -> Action:
    """What PyTorch computes."""
    function, constants, fresh = FUNCTIONS[step.function], step.constants, step.result is not None
    operands = [None if v is None else places[v.tensor] for v in step.operands]

    def compute(tensors: Tensors, stream: Any, observed: bool) -> None:
        result = function(*[None if i is None else tensors[i] for i in operands], *constants)
        if fresh:
            tensors.append(result.contiguous())

    return compute


def _launching(launch: Launch, places: Places) -> Action:
    """The compiled kernel, handed to the driver with the tensors of a call."""
    function = KERNELS[launch.kernel]
    kernel = compiled(launch)
    start = kernel[launch.grid]  # loads it: raises OutOfResources
    run, loaded, packed, (x, y, z) = (
        kernel.run, kernel.function, kernel.packed_metadata, launch.grid
    )  # fmt: skip
    template: list[Any] = []
    whole: list[tuple[int, int]] = []  # arguments that are tensors
    inner: list[tuple[int, int, View]] = []  # that begin inside of one
    described: list[tuple[int, int, dict[str, Any]]] = []
    kind: Any = None
    for parameter in function.params:
        if parameter.is_constexpr and not _LAUNCHED_WITH_CONSTANTS:
            continue
        value = launch.fields[parameter.name]
        at = len(template)
        template.append(None if isinstance(value, View | Described | torch.dtype) else value)
        if isinstance(value, Described):
            kind = type(_descriptor(value))
            described.append((at, places[value.view.tensor], vars(_descriptor(value))))
        elif isinstance(value, View):
            i = places[value.tensor]
            if value.offset:
                inner.append((at, i, value))
            else:
                whole.append((at, i))

    def call(tensors: Tensors, stream: Any, observed: bool) -> None:
        arguments = template.copy()
        for at, i in whole:
            arguments[at] = tensors[i]
        for at, i, view in inner:
            arguments[at] = _part(tensors[i], view)
        for at, i, fields in described:
            # Triton's class checks at length what was checked when this was compiled.
            arguments[at] = descriptor = object.__new__(kind)
            descriptor.__dict__.update(fields)
            descriptor.base = tensors[i]
        if observed:
            start(*arguments, stream=stream)
        else:  # the same without what only hooks read, which takes three times as long
            run(x, y, z, stream, loaded, packed, None, None, None, *arguments)

    return call


def _part(tensor: Any, view: View) -> Tensor:
    """The part of a tensor that a view stands for."""
    begin = tensor.storage_offset() + view.offset // view.dtype.itemsize
    return tensor.as_strided(view.shape, view.strides, begin)


def _interpreting(launch: Launch, places: Places) -> Action:
    """The kernel in Triton's interpreter."""
    function = KERNELS[launch.kernel]

    def call(tensors: Tensors, stream: Any, observed: bool) -> None:
        fields: dict[str, Any] = {}
        for name, value in launch.fields.items():
            fields[name] = value
            if isinstance(value, View):
                tensor = tensors[places[value.tensor]]
                fields[name] = _part(tensor, value) if value.offset else tensor
            elif isinstance(value, torch.dtype):
                fields[name] = DTYPES[value]
        function[launch.grid](**fields)

    return call


def _choosing(choice: Choice, places: Places) -> Action:
    """One way of a choice: the first that fits, or what tuning finds in the first call."""
    places = dict(places)
    if not choice.key:
        return _in_turn(_fitting(choice.ways, places))
    chosen: list[Action] = []

    def act(tensors: Tensors, stream: Any, observed: bool) -> None:
        if not chosen:
            config = _measured(choice, places, tensors, stream)
            ways = {config: choice.ways[config], **choice.ways}
            found = _in_turn(_fitting(ways, places))
            if tune.capturing():  # nothing was measured
                return found(tensors, stream, observed)
            chosen.append(found)
        chosen[0](tensors, stream, observed)

    return act


def _measured(choice: Choice, places: Places, tensors: Tensors, stream: Any) -> Config:
    default = next(iter(choice.ways))
    actions = functools.cache(lambda config: _in_turn(_actions(choice.ways[config], dict(places))))
    return tune.best(
        choice.key,
        list(choice.ways),
        default,
        lambda config: actions(config)(tensors, stream, False),
    )


def _fitting(ways: Mapping[Config, Iterable[Step]], places: Places) -> list[Action]:
    """The first way that the GPU has the shared memory for."""
    refused: OutOfResources | None = None
    for config, steps in ways.items():
        try:
            return _actions(steps, dict(places))
        except OutOfResources as error:
            log_once(logger, f"{config} does not fit this GPU: {error}")
            refused = error
    assert refused is not None
    raise refused


def _in_turn(actions: list[Action]) -> Action:
    """Actions as one, whose own tensors are freed after it."""

    def act(tensors: Tensors, stream: Any, observed: bool) -> None:
        count = len(tensors)
        for action in actions:
            action(tensors, stream, observed)
        del tensors[count:]

    return act
