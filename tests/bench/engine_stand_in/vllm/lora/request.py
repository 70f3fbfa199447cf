"""Stands for vllm.lora.request."""

from typing import NamedTuple


class LoRARequest(NamedTuple):
    """An adapter of an engine."""

    name: str
    number: int
    path: str
