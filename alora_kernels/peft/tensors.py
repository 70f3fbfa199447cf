"""The tensors of a LoRA layer, read where PEFT keeps them, in every call.

Nothing is remembered of a layer: its modules, weights, scalings, hooks and forwards may be changed
between two calls in ways that leave no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from ..contract import Projection


class Step(NamedTuple):
    """What one adapter does in layers that read the same x."""

    name: str
    projections: list[Projection]  # one for each layer; the first step's have the base's weights
    scalings: list[float | Tensor]
    dropout_p: float


PLAIN = (nn.Parameter, Tensor)
NO_BASE: tuple[Tensor | None, Tensor | None] = (None, None)


def runs_plainly(*modules: nn.Module) -> bool:
    """Whether calling each module runs its class's forward alone: no hook of its own, no other
    forward."""
    for module in modules:
        own = module.__dict__
        if (
            own["_forward_pre_hooks"]
            or own["_forward_hooks"]
            or own["_backward_pre_hooks"]
            or own["_backward_hooks"]
            or "forward" in own
        ):
            return False
    return True


# As torch has them: what takes their place in the class must be called.
_FORWARDS = (nn.Linear.forward, nn.Dropout.forward)


def all_are_changed() -> bool:
    """Whether torch calls a hook around every module, or the class has got another forward."""
    if not torch.compiler.is_compiling() and (nn.Linear.forward, nn.Dropout.forward) != _FORWARDS:
        return True
    return bool(
        nn_module._global_forward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_backward_pre_hooks
        or nn_module._global_backward_hooks
    )


def steps_of(
    layers: Sequence[Any], names: Sequence[str], x: Tensor, fused: bool
) -> list[Step] | None:
    """The steps of `names` in `layers`; None when they cannot be computed in one call.

    Args:
        layers: LoRA layers that read the same x.
        names: adapters that each of them has.
        fused: the first step computes the bases too.
    """
    if all_are_changed():
        return None
    steps = []
    for name in names:
        projections, scalings, probability = [], [], None
        for layer in layers:
            base = base_of(layer) if fused else NO_BASE
            adapter = adapter_of(layer, name, x)
            if base is None or adapter is None:
                return None
            lora_a, lora_b, lora_bias, dropout_p = adapter
            if probability is None:
                probability = dropout_p
            elif dropout_p != probability:
                return None
            projections.append(Projection(*base, lora_a, lora_b, lora_bias))
            scalings.append(layer.scaling[name])
        steps.append(Step(name, projections, scalings, probability or 0.0))
        fused = False  # the bases are computed once
    return steps


def adapter_of(
    layer: Any, name: str, x: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, float] | None:
    """lora_a, lora_b, lora_bias and the dropout of this call; None when PEFT must compute it.

    The modules are read, not called. PEFT's forward calls them where a call would be more than
    their own forward.
    """
    modules = layer._modules
    a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    drop = modules["lora_dropout"]._modules[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return None
    if not runs_plainly(a, b, drop):
        return None
    variant = layer.lora_variant.get(name)
    if variant is not None and not isinstance(variant, ALoraLinearVariant):
        return None
    lora_a = a._parameters.get("weight")
    lora_b = b._parameters.get("weight")
    if lora_a is None or lora_b is None or a._parameters.get("bias") is not None:
        return None
    if type(lora_a) not in PLAIN or type(lora_b) not in PLAIN:
        return None  # quantised, masked or sharded: their own operations know how to multiply them
    if (
        lora_a.dtype is not x.dtype
        and lora_a.dtype is not torch.float32
        and not (x.dtype is torch.float32 and torch.is_autocast_enabled(x.device.type))
    ) or lora_a.dtype is not lora_b.dtype:
        return None
    dropout_p = 0.0
    if type(drop) is nn.Dropout:
        if drop.training:
            dropout_p = drop.p
            if dropout_p >= 1.0:
                return None
    elif type(drop) is not nn.Identity:
        return None
    return lora_a, lora_b, b._parameters.get("bias"), dropout_p


def base_of(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    """weight `[N, K]` and bias of a base that is a frozen plain linear layer; else None."""
    base = layer._modules["base_layer"]
    kind = type(base)
    weight = base._parameters.get("weight")
    if weight is None or weight.requires_grad or not runs_plainly(base):
        return None
    if type(weight) not in PLAIN:
        return None  # quantised or sharded: its own forward knows how to multiply it
    if kind is Conv1D:
        weight = weight.t()
    elif kind is not nn.Linear:
        return None
    bias = base._parameters.get("bias")
    if bias is not None and bias.requires_grad:
        return None
    return weight, bias
