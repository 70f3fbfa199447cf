"""Layers that are checkpointed keep a cache that running them again does not change.

transformers takes the cache away from a layer that will run again, since an ordinary cache would
grow twice. Some versions have a switch against that; in others the function that checkpoints a
layer puts the cache back (and transformers warns all the same that it has taken it away).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

SWITCH = "_can_checkpoint_with_cache"  # since transformers 5.16
FUNCTION = "_gradient_checkpointing_func"
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")


def checkpointed_layers(model: nn.Module) -> dict[nn.Module, tuple[int, str]]:
    """The layers that are checkpointed and take a cache: its place among their arguments and its
    name."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[nn.Module, tuple[int, str]] = {}
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            names = list(inspect.signature(type(module).forward).parameters)[1:]  # but self
            for place, name in enumerate(names):
                if name in CACHE_ARGUMENTS:
                    found[module] = (place, name)
    return found


def hooks_run_again() -> bool:
    """Whether transformers checkpoints the call of a layer, with its hooks: PEFT's take the adapter
    away from a layer whose input needs no gradient before it runs again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


@contextmanager
def lending(model: nn.Module, cache: Any) -> Iterator[None]:
    """Within the block the checkpointed layers of `model` read `cache`, also when they run again.

    Args:
        cache: one whose `update` stores nothing.
    """
    changed: list[tuple[nn.Module, str, Any]] = []
    for layer, argument in checkpointed_layers(model).items():
        name: str = SWITCH
        value: Any = True
        if not hasattr(layer, SWITCH):
            name = FUNCTION
            value = partial(_put_back, getattr(layer, FUNCTION), argument, cache)
        changed.append((layer, name, layer.__dict__.get(name)))
        layer.__dict__[name] = value
    try:
        yield
    finally:
        for layer, name, before in changed:
            if before is None:
                del layer.__dict__[name]
            else:
                layer.__dict__[name] = before


def _put_back(
    checkpoint: Any, argument: tuple[int, str], cache: Any, function: Any, *args: Any
) -> Any:
    place, name = argument
    if len(args) > place:
        return checkpoint(function, *args[:place], cache, *args[place + 1 :])
    return checkpoint(partial(function, **{name: cache}), *args)
