"""Gradient checkpointing: recomputes a layer under the state of the forward it belongs to.

The recomputation happens in the backward pass. By then the forward is over, other forwards may have
run, and the thread may be another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .state import ForwardState, current_state, within

FUNCTION = "_gradient_checkpointing_func"  # where transformers keeps a layer's checkpoint function


def watch(modules: Iterable[nn.Module]) -> None:
    """Make the checkpoint function of every module restore the state when it recomputes."""
    for module in modules:
        function = module.__dict__.get(FUNCTION)
        if function is not None and not isinstance(function, CarriesState):
            module.__dict__[FUNCTION] = CarriesState(function)


def unwatch(modules: Iterable[nn.Module]) -> None:
    """Undo `watch`."""
    for module in modules:
        function = module.__dict__.get(FUNCTION)
        if isinstance(function, CarriesState):
            module.__dict__[FUNCTION] = function.function


class CarriesState:
    """A checkpoint function that recomputes under the state that was current at its call."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.function(function, *args, **kwargs)
        return self.function(Bound(function, current_state()), *args, **kwargs)


class Bound:
    """A call of `function` under `state`."""

    def __init__(self, function: Any, state: ForwardState | None) -> None:
        self.function, self.state = function, state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with within(self.state):
            return self.function(*args, **kwargs)
