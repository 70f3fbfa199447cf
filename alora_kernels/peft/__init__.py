"""Accelerates a PEFT model with activated LoRAs: one line of code, and no other change."""

from .model import accelerate, adapter_scope, restore
from .support import check_adapter_folder

__all__ = ["accelerate", "adapter_scope", "check_adapter_folder", "restore"]
