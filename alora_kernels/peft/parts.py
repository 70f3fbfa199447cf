"""The tensors of a LoRA layer, where PEFT keeps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def adapter_parts(
    layer: Any, name: str, x: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, float] | None:
    """lora_a, lora_b, lora_bias and the dropout of this call; None when PEFT must compute it.

    The modules are read, not called: if someone hooked them, PEFT's forward calls them.
    """
    modules = layer._modules
    a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear or name in layer.alora_strange:
        return None
    if a._forward_pre_hooks or a._forward_hooks or b._forward_pre_hooks or b._forward_hooks:
        return None
    lora_a = a._parameters.get("weight")
    lora_b = b._parameters.get("weight")
    if lora_a is None or lora_b is None:
        return None
    if (
        lora_a.dtype is not x.dtype
        and lora_a.dtype is not torch.float32
        and not (x.dtype is torch.float32 and torch.is_autocast_enabled(x.device.type))
    ) or lora_a.dtype is not lora_b.dtype:
        return None
    drop = modules["lora_dropout"]._modules[name]
    dropout_p = drop.p if drop.training and type(drop) is nn.Dropout else 0.0
    return lora_a, lora_b, b._parameters.get("bias"), dropout_p


def plain_base(layer: Any, base: Any) -> tuple[Tensor, Tensor | None] | None:
    """weight `[N, K]` and bias of a base that is a frozen plain linear layer; else None."""
    kind = type(base)
    if kind is nn.Linear:
        weight = base._parameters.get("weight")
    elif kind is Conv1D:
        weight = base._parameters.get("weight")
        weight = None if weight is None else weight.t()
    else:
        return None
    if weight is None or weight.requires_grad or base._forward_pre_hooks or base._forward_hooks:
        return None
    bias = base._parameters.get("bias")
    if (bias is not None and bias.requires_grad) or "forward" in base.__dict__:
        return None
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return None  # quantised or sharded: its own forward knows how to multiply it
    return weight, bias
