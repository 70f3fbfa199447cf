"""Gradient checkpointing: a layer is recomputed under the state of its own forward.

The recomputation comes in the backward pass, when the forward is long over, other forwards may have
followed, and the thread may be another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .state import ForwardState, current_state, within

FUNCTION = "_gradient_checkpointing_func"  # where transformers keeps a layer's checkpoint function


def watch(modules: Iterable[nn.Module]) -> None:
    """Let every module of `modules` that checkpoints carry the state along."""
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
    """A checkpoint function that recomputes under the state in which it was called."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.function(function, *args, **kwargs)
        return self.function(Bound(function, current_state()), *args, **kwargs)


class Bound:
    """`function` under `state`."""

    def __init__(self, function: Any, state: ForwardState | None) -> None:
        self.function, self.state = function, state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with within(self.state):
            return self.function(*args, **kwargs)
