"""PEFT's LoRA layers with another forward: base and adapter in one op, groups in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends import Projection
from ..functional import alora_add, alora_linear, alora_linear_group
from .ambient import ForwardState, Pending, current_state
from .groups import Group
from .parts import adapter_parts, plain_base
from .ready import Ready
from .unserved import peft_arguments

if TYPE_CHECKING:
    from .acceleration import Acceleration


class AcceleratedLayer:
    """What the class of a served layer gets; its own attributes begin with `alora_`.

    Copied into a subclass of `alora_kind` (a second base would change the layout of the object, and
    a live layer could not change its class).
    """

    alora_kind: Any  # PEFT's class
    _modules: dict[str, Any]
    _disable_adapters: bool
    _active_adapter: str | list[str]
    merged_adapters: list[str]
    scaling: dict[str, float]

    alora_owner: Acceleration
    alora_group: Group | None
    alora_index: int
    alora_fused: bool  # the class's base may be computed together with the adapter
    alora_ready: dict[str, Ready]  # by adapter: what a call without gradient needs not do again
    alora_strange: dict[str, str]  # adapters that keep PEFT's arithmetic, and why

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self._disable_adapters:
            return self.alora_kind.forward(self, x, *args, **kwargs)
        state = current_state()
        if self.merged_adapters:
            if state is not None and state.names is not None:
                return self._by_peft(x, state, state.names)  # which refuses to choose
            return self.alora_kind.forward(self, x)
        if state is None:
            state = self.alora_owner.outside(self, x)
        names: Any = state.names
        if names is None:
            names = self._active_adapter
            names = (names,) if isinstance(names, str) else names
        alone = len(names) == 1
        pending = state.pending
        if pending is not None and alone and self.alora_index in pending.outputs:
            waiting = pending.outputs.pop(self.alora_index)
            if not pending.outputs:
                state.pending = None
            if pending.fits(x, names[0]):
                return waiting
            state.pending = None
            pending.group.dissolve("they were given different inputs")
        if alone and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            ready = self.alora_ready.get(names[0])
            if ready is not None:
                quick = self._at_once(x, names[0], state, ready)
                if quick is not None:
                    return quick
        adapters = self._modules["lora_A"]._modules
        if not alone or names[0] not in adapters:
            names = [name for name in names if name in adapters]
        modules = self._modules
        base = modules["base_layer"]
        if not names:
            return base(x)  # type: ignore[misc]
        group = self.alora_group
        if group is not None and group.enabled and alone:
            first = self._first_of_group(x, names[0], state, group)
            if first is not None:
                return first
        y: Tensor | None = None
        options = self.alora_owner.options
        weights = plain_base(self, base) if self.alora_fused else None
        for name in names:
            parts = adapter_parts(self, name, x)
            if parts is None:
                return self._by_peft(x, state, names)
            lora_a, lora_b, lora_bias, dropout_p = parts
            activation = state.activation_for(name, x)
            if y is None and weights is not None:
                if alone and dropout_p == 0.0:
                    self._prepare(name, [self], [Projection(*weights, lora_a, lora_b, lora_bias)])
                y = alora_linear(
                    x,
                    *weights,
                    lora_a,
                    lora_b,
                    activation,
                    self.scaling[name],
                    lora_bias=lora_bias,
                    dropout_p=dropout_p,
                    **options,
                )
                continue
            if y is None:
                y = base(x)  # type: ignore[misc]
            same = y.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
            add = alora_add(
                y if same else y.to(x.dtype),
                x,
                lora_a,
                lora_b,
                activation,
                self.scaling[name],
                lora_bias=lora_bias,
                dropout_p=dropout_p,
                **options,
            )
            y = add if same else add.to(y.dtype)
        return y

    def _first_of_group(
        self, x: Tensor, name: str, state: ForwardState, group: Group
    ) -> Tensor | None:
        """Compute all members' outputs and return mine; None when they cannot go together."""
        projections: list[Projection] = []
        members, scalings, probability = [], [], -1.0
        for layer in group.members:
            if layer._disable_adapters or layer.merged_adapters:
                return None
            if state.names is None and layer._active_adapter != self._active_adapter:
                return None
            if name not in layer._modules["lora_A"]._modules:
                continue
            parts = adapter_parts(layer, name, x)
            weights = plain_base(layer, layer._modules["base_layer"])
            if parts is None or weights is None:
                return None
            lora_a, lora_b, lora_bias, dropout_p = parts
            if probability not in (-1.0, dropout_p):
                return None
            probability = dropout_p
            projections.append(Projection(*weights, lora_a, lora_b, lora_bias))
            scalings.append(layer.scaling[name])
            members.append(layer)
        if len(members) < 2:
            return None
        if probability == 0.0:
            self._prepare(name, members, projections)
        outputs = alora_linear_group(
            x,
            [
                (p.weight, p.bias, p.lora_a, p.lora_b, scaling, p.lora_bias)
                for p, scaling in zip(projections, scalings)
            ],
            state.activation_for(name, x),
            dropout_p=probability,
            **self.alora_owner.options,
        )
        return self._hand_out(x, name, state, [m.alora_index for m in members], outputs)

    def _hand_out(
        self,
        x: Tensor,
        name: str,
        state: ForwardState,
        indices: Sequence[int],
        outputs: tuple[Tensor, ...],
    ) -> Tensor:
        """My output; the others wait in the state for their layers."""
        waiting = dict(zip(indices, outputs))
        y = waiting.pop(self.alora_index)
        if waiting:
            assert self.alora_group is not None
            if state.pending is not None:
                state.pending.group.dissolve("not all of them are called")
            state.pending = Pending(self.alora_group, name, x, waiting)
        return y

    def _prepare(
        self, name: str, members: list[AcceleratedLayer], projections: list[Projection]
    ) -> None:
        """Make the next call without gradient a short one."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        weights = [layer._modules["base_layer"]._parameters["weight"] for layer in members]
        if not any(weight._is_view() for weight in weights):
            # (What shards or shares weights may make them anew, as views, for every call.)
            self.alora_ready[name] = Ready(name, members, projections, self.alora_owner.options)

    def _at_once(self, x: Tensor, name: str, state: ForwardState, ready: Ready) -> Tensor | None:
        """My output by the short way, or None when something has changed."""
        group = self.alora_group
        if len(ready.indices) > 1 and (group is None or not group.enabled):
            return None
        outputs = ready.run(name, x, state)
        if outputs is None:
            return None
        if len(outputs) == 1:
            return outputs[0]
        return self._hand_out(x, name, state, ready.indices, outputs)

    def _by_peft(self, x: Tensor, state: ForwardState, names: Any) -> Any:
        """PEFT's own arithmetic, for what the op does not take (adapters in a third dtype)."""
        arguments = peft_arguments(self.alora_owner, self, state, tuple(names))
        return self.alora_kind.forward(self, x, **arguments)
