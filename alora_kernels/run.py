"""Chooses the backend of a call and runs it; remembers checks and choices for similar calls.

Checks and choices depend on the options and on the layout of the tensors, not on their values or
addresses. Options and layout together are the call's signature. The result for one call holds for
every call of the same signature, so checks and choices are made once per signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .activation import Activation
from .backends.cpu import CpuBackend
from .contract import PRECISIONS, Backend, Call, Gradients, Needs, Options, Projection
from .dispatch import BACKENDS, asked_for, choose, forget_choices, problem_of

KEPT = 4096  # the most signatures to remember
PLAIN = (Tensor, torch.nn.Parameter)
MAX_DIM = 4  # of x
EXACT = (torch.float32, torch.float64)  # dtypes in which every precision computes alike
ON_CPU = {(backend, strategy) for backend in ("auto", "cpu") for strategy in ("auto", "delta")}

_memory: dict[tuple[Any, ...], Entry] = {}


class Entry:
    """What is known of the calls of one signature. Each signature has one entry object."""

    __slots__ = ("backward", "checked", "forward", "needs_grad")

    def __init__(self) -> None:
        self.checked = False  # a call of this signature has passed the checks
        self.needs_grad = False
        self.forward: tuple[Backend, str] | None = None  # the chosen backend and strategy
        self.backward: tuple[Backend, str] | None = None


def entry_of(
    x: Tensor,
    projections: Sequence[Projection],
    base_outs: Sequence[Tensor] | None,
    activation: Activation,
    scalings: tuple[float, ...],
    options: Options,
) -> Entry | None:
    """The entry for calls of this signature; None if a signature cannot describe the call."""
    tensors = (x, *chain.from_iterable(projections), *(base_outs or ()))
    try:
        mask = activation.row_adapter
        signature = (
            options,
            asked_for(options.backend, options.strategy),  # with the environment variables
            scalings,
            activation.__class__,
            mask.shape,
            mask.device,
            activation.num_active,
            activation.max_active,
            activation.expected_active,
            *[
                None if t is None else (t.__class__, t.shape, t.stride(), t.dtype, t.device)
                for t in tensors
            ],
        )
        if torch.is_grad_enabled():
            signature += tuple([t is not None and t.requires_grad for t in tensors])
        found = _memory.get(signature)
    except (AttributeError, TypeError, RuntimeError):
        return None
    if found is None:
        if any(t is not None and t.__class__ not in PLAIN for t in tensors):
            return None  # the layout does not describe a subclass completely
        if len(_memory) >= KEPT:
            _memory.clear()
        found = _memory[signature] = Entry()
    return found


def run_one_row(
    x: Tensor,  # [..., K] with one row
    projections: Sequence[Projection],
    scalings: Sequence[float],
    activation: Activation,
    options: Options,
) -> tuple[Tensor, ...] | None:
    """Decoding's short way: the outputs `[..., N]` of one active row on a CPU, without gradients.

    For one row, looking up what is known of a call takes longer than the call. So nothing is looked
    up: what decides is read here, and PyTorch's own operations refuse sizes that do not fit.

    Returns:
        None where this way does not apply, and where something does not fit: the usual way serves
        the call, or says what is wrong.
    """
    dtype, shape = x.dtype, x.shape
    if dtype not in EXACT or not x.is_cpu or not 0 < x.numel() == shape[-1]:
        return None
    if activation.__class__ is not Activation or activation.num_active != 1:
        return None
    mask = activation.row_adapter
    if mask.shape[0] != 1 or not mask.is_cpu or torch.is_grad_enabled():
        return None
    if options.dropout_p != 0.0 or options.adapter_precision not in PRECISIONS:
        return None
    if len(shape) > MAX_DIM:
        return None
    if asked_for(options.backend, options.strategy) not in ON_CPU:
        return None
    for p in projections:
        weight, bias, lora_a, _, lora_bias = p
        if weight is None or not lora_a.shape[0]:
            return None
        for t in p:
            if t is not None and (t.__class__ not in PLAIN or t.dtype is not dtype or not t.is_cpu):
                return None
        if (bias is not None and bias.shape != weight.shape[:1]) or (
            lora_bias is not None and lora_bias.shape != weight.shape[:1]
        ):
            return None
    cpu = BACKENDS.get("cpu")
    if x.__class__ not in PLAIN or not isinstance(cpu, CpuBackend):
        return None
    try:
        ys = cpu.one_row(x.reshape(-1), projections, scalings)
    except RuntimeError:
        return None
    lead = shape[:-1]
    return tuple([y.resize_((*lead, y.shape[0])) for y in ys])


def forget() -> None:
    """Forget all checks and choices: something outside the signatures has changed."""
    _memory.clear()
    forget_choices()


def run_forward(
    call: Call,
    x: Tensor,  # [M, K]
    projections: Sequence[Projection],
    base_outs: Sequence[Tensor] | None,  # [M, N] each, changed in place
    save: bool,
) -> tuple[list[Tensor], Tensor | None, str]:
    """Choose a backend and run forward: the outputs `[M, N]`, xa if `save`, the backend's name."""
    entry: Entry | None = call.memory
    chosen = None if entry is None else entry.forward
    if chosen is None:
        problem = problem_of(call, x, projections, base_outs is not None, backward=False)
        chosen = choose(problem, call.options.backend, call.options.strategy)
        if entry is not None:
            entry.forward = chosen
    backend, strategy = chosen
    ys, xa = backend.forward(call, strategy, x, projections, base_outs, save)
    return ys, xa, backend.name


def run_backward(
    call: Call,
    x: Tensor,
    projections: Sequence[Projection],
    xa: Tensor | None,
    ran: str,
    dys: Sequence[Tensor],
    needs: Needs,
) -> Gradients:
    """The wanted gradients, from the backend named `ran`, which ran forward and saved `xa`."""
    entry: Entry | None = call.memory
    chosen = None if entry is None else entry.backward
    if chosen is None:
        problem = problem_of(call, x, projections, projections[0].weight is None, backward=True)
        try:
            chosen = choose(problem, ran, call.options.strategy)
        except RuntimeError:
            # The strategy that was forced for forward may not exist in backward.
            chosen = choose(problem, ran, "auto")
        if entry is not None:
            entry.backward = chosen
    backend, strategy = chosen
    if torch._C._is_any_autocast_enabled() and in_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return backend.backward(call, strategy, x, projections, xa, dys, needs)
    return backend.backward(call, strategy, x, projections, xa, dys, needs)


def in_autocast(x: Tensor) -> bool:
    """Whether PyTorch would compute with x in the autocast dtype."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
