"""Accelerate a PEFT model that holds activated LoRAs: one line, no other change."""

from .model import accelerate, adapter_scope, restore
from .support import check_adapter_folder

__all__ = ["accelerate", "adapter_scope", "check_adapter_folder", "restore"]
