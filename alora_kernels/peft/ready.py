"""Ready: a layer or group whose next call without gradient is a short one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from ..backends import Call, Projection
from ..functional import run_again
from .ambient import ForwardState


class Ready:
    """A layer or group as it was last called without gradient, and whether it still is so.

    What a call would look up in a dozen modules is remembered; the parameters, scalings and
    dropout are compared in every call, hooks by torch's own count of all registrations.

    Args:
        names: the adapters that run, one after the other.
        members: the layers of one x.
        projections: for each name one for each member; the first name's have the base's weights.
        options: of `alora_linear`.
    """

    __slots__ = ("cells", "hooks", "indices", "registrations", "steps")

    def __init__(
        self,
        names: Sequence[str],
        members: Sequence[Any],
        projections: Sequence[list[Projection]],
        options: dict[str, Any],
    ) -> None:
        self.indices = tuple([layer.alora_index for layer in members])
        self.registrations = RemovableHandle.next_id
        self.hooks: list[dict[int, Any]] = []
        self.steps: list[tuple[str, Call, list[Projection]]] = []
        cells = []
        for name, of_name in zip(names, projections):
            scalings = tuple([float(layer.scaling[name]) for layer in members])
            # (Each run has its own activation.)
            self.steps.append((name, Call(None, scalings, **options), of_name))  # type: ignore[arg-type]
            cells += [self._cell(name, *both) for both in zip(members, of_name, projections[0])]
        self.cells = tuple(cells)

    def _cell(self, name: str, layer: Any, p: Projection, first: Projection) -> tuple[Any, ...]:
        """All that the part of one adapter in one layer depends on, and what it is now."""
        modules = layer._modules
        adapters, base = modules["lora_A"]._modules, modules["base_layer"]
        a, b = adapters[name], modules["lora_B"]._modules[name]
        drop = modules["lora_dropout"]._modules[name]
        drop = drop if isinstance(drop, nn.Dropout) and drop.p > 0.0 else None
        numbers = (a._parameters, b._parameters, base._parameters)
        self.hooks += [d for m in (a, b, base) for d in (m._forward_pre_hooks, m._forward_hooks)]
        # Conv1D keeps its weight the other way round; the projection holds a view of it.
        stored, turned = base._parameters["weight"], None
        if type(base) is Conv1D and first.weight is not None:
            turned = first.weight.t()
        weights = (stored, turned, first.bias, p.lora_a, p.lora_b, p.lora_bias)
        scalings = layer.scaling
        return (
            name, modules, base, adapters, a, *numbers, drop, scalings, weights, scalings[name],
        )  # fmt: skip

    def run(self, x: Tensor, state: ForwardState) -> tuple[Tensor, ...] | None:
        """The outputs of all members, or None when one of them has changed."""
        if RemovableHandle.next_id != self.registrations:
            if any(self.hooks):
                return None
            self.registrations = RemovableHandle.next_id  # the new hooks are elsewhere
        for (
            name,
            modules,
            base,
            adapters,
            a,
            of_a,
            of_b,
            of_base,
            drop,
            scalings,
            weights,
            scaling,
        ) in self.cells:
            weight, turned, bias, lora_a, lora_b, lora_bias = weights
            if (
                modules["base_layer"] is not base
                or adapters.get(name) is not a
                or of_a.get("weight") is not lora_a
                or of_b.get("weight") is not lora_b
                or of_b.get("bias") is not lora_bias
                or of_base.get("weight") is not weight
                or (turned is not None and not weight.is_set_to(turned))
                or of_base.get("bias") is not bias
                or scalings.get(name) != scaling
                or (drop is not None and drop.training)
            ):
                return None
        outputs = None
        for name, call, projections in self.steps:
            activation = state.activation_for(name, x)
            outputs = run_again(call, x, projections, activation, outputs)
        return outputs
