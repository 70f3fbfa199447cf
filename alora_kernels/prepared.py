"""Prepared: projections that are checked once and then called many times without a gradient.

Decoding calls the same small layers again and again, and the host's checks and choices cost more
than the arithmetic. What depends on the layer alone is done once here; what depends on the call is
checked in every call.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .activation import Activation
from .backends import Backend, Call, Projection
from .dispatch import choose, problem_of
from .functional import MAX_DIM, check_call

KEPT = 256  # choices kept for each group


class Prepared:
    """A group of masked-LoRA linears of one x, for inference.

    Args:
        projections, scalings: the group, as `alora_linear_group` takes it.
        options: of `alora_linear`; those for gradients and dropout mean nothing here.

    `run` never changes a result: it computes what `alora_linear_group` would, or nothing.
    """

    def __init__(
        self, projections: Sequence[Projection], scalings: Sequence[float], options: dict[str, Any]
    ) -> None:
        self.projections = list(projections)
        self.scalings = tuple([float(s) for s in scalings])
        self.call = Call(
            None,  # type: ignore[arg-type]  # each run has its own
            self.scalings,
            adapter_precision=options.get("adapter_precision", "compute"),
            strict_inactive=options.get("strict_inactive", False),
            backend=options.get("backend", "auto"),
            strategy=options.get("strategy", "auto"),
        )
        self.tensors = [t for p in projections for t in p if t is not None]
        self.plain = all(type(t) in (Tensor, nn.Parameter) for t in self.tensors)
        self.plain &= all(map(math.isfinite, self.scalings))  # else the ordinary call refuses
        self.chosen: dict[tuple[Any, ...], tuple[Backend, str]] = {}

    def serves(self, projection: Projection, scaling: float, options: tuple[str, ...]) -> bool:
        """Whether this was made for just this projection, and (backend, strategy, precision)."""
        mine, call = self.projections[0], self.call
        return (
            all(map(operator.is_, mine, projection))
            and self.scalings[0] == scaling
            and (call.backend, call.strategy, call.adapter_precision) == options
        )

    def run(self, x: Tensor, activation: Activation) -> tuple[Tensor, ...] | None:
        """The outputs `[..., N]`, or None where the ordinary call has to be made.

        The ordinary call is needed for gradients, autocast, tracing, tensor subclasses, and
        whatever has not been checked yet in this dtype and on this device.
        """
        device, shape = x.device, x.shape
        if (
            not self.plain
            or type(x) is not Tensor
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(device.type)
            or len(shape) > MAX_DIM
        ):
            return None
        count = activation.row_adapter.shape[0]
        rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        # Where the tensors lie is part of the key: `.to()` and `.data` change them in place.
        places = tuple(map(Tensor.data_ptr, self.tensors))
        key = (count, shape[-1], activation.planned_active, x.dtype, device, places)
        found = self.chosen.get(key)
        if found is None:
            check_call(x, self.projections, activation)
            call = self.call._replace(activation=activation)
            problem = problem_of(call, rows, self.projections, False, backward=False)
            if len(self.chosen) >= KEPT:
                self.chosen.clear()
            found = self.chosen[key] = choose(problem, call.backend, call.strategy)
        elif rows.shape[0] != count or activation.row_adapter.device != device:
            check_call(x, self.projections, activation)  # says what is wrong
        backend, strategy = found
        call = Call(activation, *self.call[1:])
        ys, _ = backend.forward(call, strategy, rows, self.projections, None, False)
        if len(shape) == 2:
            return tuple(ys)
        if len(shape) == 3 and shape[0] == 1:
            return tuple([y.unsqueeze(0) for y in ys])
        lead = shape[:-1]
        return tuple([y.view(*lead, y.shape[-1]) for y in ys])
