"""The adapters of one accelerated model: their configurations, and the layers that hold them."""

from __future__ import annotations

import uuid
from typing import Any

from torch import nn

from ..contract import Options
from ..invocation import invocation_of

OURS = "_alora_acceleration"  # the attribute in which a model keeps its Acceleration
FIELDS = "alora_"  # prefix of every attribute that we put on the model's modules


class Adapters:
    """The facts about one accelerated model that all files of this folder share.

    Attributes:
        root: the transformers model (or any module) that holds the LoRA layers. Its forward takes
            the tokens.
        options: passed to every op.
        key: identifies this model in the records that it writes on caches.
        layers: every LoRA layer, by its name in `root`.
        served: the names of the layers that run our forward.
        refused: the names of the other layers, each with the reason.
        modules: all modules that hold adapters: the LoRA layers, modules that an adapter trains as
            a whole (`modules_to_save`), and layers of other PEFT methods.
        checkpointing: the modules that can recompute their layers in the backward pass.
        inner_configs: configurations of adapters that were injected into a part of `root`.
        beside: names of layers that do not see the tokens, and for which the user was already told
            that no activated LoRA runs there.
    """

    def __init__(self, root: nn.Module, options: Options) -> None:
        self.root, self.options = root, options
        self.key = uuid.uuid4().hex
        self.layers: dict[str, Any] = {}
        self.served: set[str] = set()
        self.refused: dict[str, str] = {}
        self.modules: set[nn.Module] = set()
        self.checkpointing: list[nn.Module] = []
        self.inner_configs: dict[str, Any] = {}
        self.beside: set[str] = set()

    @property
    def configs(self) -> dict[str, Any]:
        """The configuration of each adapter, as PEFT holds it now."""
        own: dict[str, Any] = getattr(self.root, "peft_config", {})
        return {**self.inner_configs, **own} if self.inner_configs else own

    def invocation(self, name: str) -> list[int] | None:
        """The invocation tokens of adapter `name`; None for a plain LoRA."""
        return invocation_of(self.configs.get(name))

    def any_activated(self) -> bool:
        """Whether one of the adapters is an activated LoRA."""
        return any(invocation_of(config) is not None for config in self.configs.values())

    def active_names(self) -> tuple[str, ...]:
        """The active adapters of the first LoRA layer; empty while adapters are disabled."""
        for layer in self.layers.values():
            return () if layer._disable_adapters else active_in(layer)
        return ()


def active_in(module: Any) -> tuple[str, ...]:
    """The adapters that PEFT has made active in one module."""
    active: str | list[str] = module._active_adapter
    return (active,) if isinstance(active, str) else tuple(active)


def is_adopted(module: nn.Module) -> bool:
    """Whether `module` holds adapters of an accelerated model."""
    return "alora_adapters" in module.__dict__
