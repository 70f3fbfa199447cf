"""Lets layers read the prefix's cache under gradient checkpointing.

transformers removes the cache from a layer that will be recomputed, because the layer would append
to an ordinary cache twice. A read-only cache does not have that problem. transformers 5.16 and
later have a switch that keeps the cache. In older versions the layer's checkpoint function is
wrapped to put the cache back (transformers still warns that it removed the cache).
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
    """The checkpointed layers that take a cache, with the position and name of that argument."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[nn.Module, tuple[int, str]] = {}
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            names = list(inspect.signature(type(module).forward).parameters)[1:]  # without self
            for place, name in enumerate(names):
                if name in CACHE_ARGUMENTS:
                    found[module] = (place, name)
    return found


def hooks_run_again() -> bool:
    """Whether transformers checkpoints the call of a layer including its hooks.

    Then PEFT's hooks can switch the adapter off before the layer is recomputed, if the layer's
    input needs no gradient.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


@contextmanager
def lending(model: nn.Module, cache: Any) -> Iterator[None]:
    """Make the checkpointed layers of `model` read `cache` in the block, and when recomputed.

    Args:
        model: the model.
        cache: a cache whose `update` stores nothing.
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
