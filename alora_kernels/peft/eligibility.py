"""Which LoRA layers can be served, and why the others cannot."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import nn

# PEFT's layers over a quantised or foreign base: the base's own forward, then the adapter's part.
FOREIGN = (
    "Linear4bit",
    "Linear8bitLt",
    "TorchaoLoraLinear",
    "HqqLoraLinear",
    "GPTQLoraLinear",
    "AwqLoraLinear",
    "EetqLoraLinear",
    "AqlmLoraLinear",
    "IncLoraLinear",
)


def why_not_served(layer: Any) -> str | None:
    """Why this LoRA layer keeps PEFT's forward, or None."""
    kind = getattr(type(layer), "alora_kind", type(layer))
    if not isinstance(layer, LoraLayer):
        return "it is not a LoRA layer"
    if kind is not LoraLinear and kind.__name__ not in FOREIGN:
        return f"lora.{kind.__name__} is not a linear layer"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (a dispatch or offload hook)"
    if getattr(layer, "ephemeral_gpu_offload", False):
        return "ephemeral_gpu_offload moves its weights for every call"
    strange = strange_adapters(layer)
    if strange and len(strange) == len(layer.lora_A):
        return "; ".join(f"adapter {name!r}: {reason}" for name, reason in strange.items())
    return None


def strange_adapters(layer: Any) -> dict[str, str]:
    """The adapters of `layer` that keep PEFT's forward, with the reason."""
    reasons = {name: why_not_adapter(layer, name) for name in layer.lora_A}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def why_not_adapter(layer: Any, name: str) -> str | None:
    """Why this adapter of `layer` keeps PEFT's forward, or None."""
    variant = layer.lora_variant.get(name)
    if variant is not None and not isinstance(variant, ALoraLinearVariant):
        return f"the variant {type(variant).__name__} is not LoRA"
    for part in (layer.lora_A[name], layer.lora_B[name]):
        if not isinstance(part, nn.Linear):
            return f"its weight is held by a {type(part).__name__}"
    drop = layer.lora_dropout[name]
    if not isinstance(drop, nn.Identity | nn.Dropout) or getattr(drop, "p", 0.0) >= 1.0:
        return f"its dropout is {drop}"
    return None
