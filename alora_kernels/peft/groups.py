"""Groups of projections that read the same input, such as q, k and v: one call computes them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("alora_kernels")

# Names of projections that read the same input in the models of transformers.
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)


class Group:
    """Layers that read the same x. The first one that is called computes the outputs of all.

    The outputs wait in the state of the forward, so threads and recomputations do not mix them up.
    If the layers turn out to read different inputs, the group is dissolved.
    """

    def __init__(self, parent: nn.Module, members: list[Any]) -> None:
        self.parent, self.members = parent, members
        self.enabled = True

    def is_called_by_transformers(self) -> bool:
        """Whether the code that calls the members is transformers' own.

        That code does not write to x between the calls. Other code may, in ways that x's version
        counter does not show.
        """
        forward: Any = type(self.parent).forward
        # Both names must fit. Decorators copy `__module__` from the decorated function, while the
        # globals belong to the file that defines the decorator.
        names = (forward.__module__, getattr(forward, "__globals__", {}).get("__name__", ""))
        own = names[0].startswith("transformers.models.") and names[1].startswith("transformers.")
        return own and "forward" not in self.parent.__dict__

    def dissolve(self, why: str) -> None:
        if self.enabled and not torch.compiler.is_compiling():
            logger.info("a group of %d projections is computed one by one: %s", len(self), why)
            self.enabled = False

    def __len__(self) -> int:
        return len(self.members)


class Pending:
    """Outputs that a group has computed for layers that have not been called yet."""

    def __init__(
        self, group: Group, names: tuple[str, ...], x: Tensor, outputs: dict[int, Tensor]
    ) -> None:
        self.group, self.names, self.x, self.outputs = group, names, x, outputs
        self.mode = _mode(x)

    def fits(self, x: Tensor, names: tuple[str, ...]) -> bool:
        """Whether the outputs are still right: same tensor x, not written since, same adapters
        `names`, same torch modes."""
        return x is self.x and names == self.names and _mode(x) == self.mode


def _mode(x: Tensor) -> tuple[Any, ...]:
    """What else decides a layer's output: the version of x, and torch's grad and autocast modes."""
    if torch.compiler.is_compiling():
        return ()  # the compiler tracks them itself
    autocast = torch._C._is_any_autocast_enabled()
    return (
        x._version,
        torch.is_grad_enabled(),
        torch.get_autocast_dtype(x.device.type)
        if autocast and torch.is_autocast_enabled(x.device.type)
        else None,
    )


def find_groups(model: nn.Module, layers: dict[str, Any]) -> list[Group]:
    """Groups of those `layers` (by module name) that read the same input."""
    by_parent: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():
        parent, _, leaf = path.rpartition(".")
        by_parent.setdefault(parent, {})[leaf] = layer
    groups = []
    for parent, children in by_parent.items():
        for names in TOGETHER:
            members = [children[n] for n in names if n in children and children[n].alora_fused]
            inputs = {(layer.in_features, layer.alora_rows) for layer in members}
            if len(members) > 1 and len(inputs) == 1:
                groups.append(Group(model.get_submodule(parent), members))
    return groups
