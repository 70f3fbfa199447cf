"""Reads the tensors of a LoRA layer from PEFT's modules, anew in every call.

Nothing is kept from one call to the next. Modules, weights, scalings, hooks and forwards can change
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
    """The part of one adapter in the computation of layers that read the same x."""

    name: str
    projections: list[Projection]  # one per layer; those of the first step may hold the base too
    scalings: list[float | Tensor]
    dropout_p: float


PLAIN = (nn.Parameter, Tensor)
NO_BASE: tuple[Tensor | None, Tensor | None] = (None, None)


def runs_plainly(*modules: nn.Module) -> bool:
    """Whether a call of each module runs its class's forward and nothing else: no hooks of its
    own, no other forward on the instance."""
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


# torch's own forwards. If somebody replaces one in the class, it has to be called, not bypassed.
_FORWARDS = (nn.Linear.forward, nn.Dropout.forward)


def all_are_changed() -> bool:
    """Whether torch has global module hooks, or somebody replaced the forward of nn.Linear or
    nn.Dropout."""
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
    """The steps that compute `names` in `layers`; None if one call cannot compute them.

    Args:
        layers: LoRA layers that read the same x.
        names: adapters that each of them has.
        fused: the first step computes the base layers too.
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
        fused = False  # later steps add to the outputs of the first
    return steps


def adapter_of(
    layer: Any, name: str, x: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, float] | None:
    """lora_a, lora_b, lora_bias and the dropout probability; None if PEFT must compute the adapter.

    The modules are read, not called. If a call would do more than run their own forward (hooks,
    another class), the result is None: PEFT's forward calls them.
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
        return None  # quantised, masked or sharded tensors bring their own multiplication
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
    """weight `[N, K]` and bias of the base if it is a frozen plain linear layer; else None."""
    base = layer._modules["base_layer"]
    kind = type(base)
    weight = base._parameters.get("weight")
    if weight is None or weight.requires_grad or not runs_plainly(base):
        return None
    if type(weight) not in PLAIN:
        return None  # quantised or sharded tensors bring their own multiplication
    if kind is Conv1D:
        weight = weight.t()
    elif kind is not nn.Linear:
        return None
    bias = base._parameters.get("bias")
    if bias is not None and bias.requires_grad:
        return None
    return weight, bias
