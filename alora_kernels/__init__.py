"""Fused kernels and tools for Activated LoRA."""

from typing import Any

from .activation import Activation, activate, current_activation, find_invocation_starts
from .autograd import AloraFunction
from .functional import alora_add, alora_linear, alora_linear_group
from .nn import AloraLinear
from .reference import alora_linear_reference
from .warming import warmup

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "AloraFunction",
    "AloraLinear",
    "accelerate",
    "activate",
    "alora_add",
    "alora_linear",
    "alora_linear_group",
    "alora_linear_reference",
    "current_activation",
    "find_invocation_starts",
    "restore",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """accelerate and restore, imported at their first use: only they need peft."""
    if name in ("accelerate", "restore"):
        from . import peft

        return getattr(peft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
