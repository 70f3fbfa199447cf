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


KEPT = 64  # prepared calls of one layer


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
    # By adapters: what a call without gradient needs not do again.
    alora_ready: dict[tuple[str, ...], Ready]
    alora_strange: dict[str, str]  # adapters that keep PEFT's arithmetic, and why

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if "alora_ready" not in self.__dict__:  # held by what was put on the layer before `restore`
            return type(self).forward(self, x, *args, **kwargs)
        if args or kwargs or self._disable_adapters:
            return self.alora_kind.forward(self, x, *args, **kwargs)
        state = current_state()
        if self.merged_adapters:
            if state is not None and state.names is not None:
                return self._by_peft(x, state, state.names)  # which refuses to choose
            return self.alora_kind.forward(self, x)
        if state is None:
            state = self.alora_owner.outside(self, x)
        asked = state.names
        if asked is None:
            active = self._active_adapter
            asked = (active,) if isinstance(active, str) else tuple(active)
        pending = state.pending
        if pending is not None and self.alora_index in pending.outputs:
            waiting = pending.outputs.pop(self.alora_index)
            if not pending.outputs:
                state.pending = None
            if pending.fits(x, asked):
                return waiting
            state.pending = None
            pending.group.dissolve("they were given different inputs")
        quick = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if quick:
            ready = self.alora_ready.get(asked)
            if ready is not None:
                first = self._at_once(x, asked, state, ready)
                if first is not None:
                    return first
        modules = self._modules
        adapters, base = modules["lora_A"]._modules, modules["base_layer"]
        names = [name for name in asked if name in adapters]
        if not names:
            return base(x)  # type: ignore[misc]
        together = self._together(x, asked, names, state, quick)
        if together is not None:
            return together
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

    def _together(
        self,
        x: Tensor,
        asked: tuple[str, ...],
        names: list[str],
        state: ForwardState,
        quick: bool,
    ) -> Tensor | None:
        """My output, with all of my group where they can be computed in one call; else None.

        Without gradient a call serves several adapters, and the next one like it is short.
        """
        found = None
        group = self.alora_group
        if group is not None and group.enabled and (quick or len(asked) == 1):
            found = self._find_projections(x, names, self._members(asked, names, state, group))
        if found is None and quick:
            found = self._find_projections(x, names, [self])
        if found is None:
            return None
        members, projections, probability = found
        options = self.alora_owner.options
        if quick and probability == 0.0:
            ready = Ready(names, members, projections, options)
            weights = [layer._modules["base_layer"]._parameters["weight"] for layer in members]
            # (What shards or shares weights may make them anew, as views, for every call.)
            if not any(weight._is_view() for weight in weights):
                if len(self.alora_ready) >= KEPT:
                    self.alora_ready.clear()
                self.alora_ready[asked] = ready
            return self._at_once(x, asked, state, ready)
        if len(members) == 1 or len(names) > 1:
            return None
        scalings = [layer.scaling[names[0]] for layer in members]
        outputs = alora_linear_group(
            x,
            [
                (p.weight, p.bias, p.lora_a, p.lora_b, scaling, p.lora_bias)
                for p, scaling in zip(projections[0], scalings)
            ],
            state.activation_for(names[0], x),
            dropout_p=probability,
            **options,
        )
        return self._hand_out(x, asked, state, [m.alora_index for m in members], outputs)

    def _members(
        self, asked: tuple[str, ...], names: list[str], state: ForwardState, group: Group
    ) -> list[AcceleratedLayer]:
        """The layers of my group that have the same ones of the adapters; none if I am alone."""
        members = []
        for layer in group.members:
            if layer._disable_adapters or layer.merged_adapters:
                return []
            if state.names is None and layer._active_adapter != self._active_adapter:
                return []
            adapters = layer._modules["lora_A"]._modules
            if [name for name in asked if name in adapters] == names:
                members.append(layer)
        return members if len(members) > 1 else []

    def _find_projections(
        self, x: Tensor, names: list[str], members: list[AcceleratedLayer]
    ) -> tuple[list[AcceleratedLayer], list[list[Projection]], float] | None:
        """The projections of each name in each member, and their dropout; None if PEFT, or each
        layer alone, must compute them."""
        if not members or not self.alora_fused:
            return None
        rows, probabilities = [], set()
        for name in names:
            row = []
            for layer in members:
                parts = adapter_parts(layer, name, x)
                weights = plain_base(layer, layer._modules["base_layer"])
                if parts is None or weights is None:
                    return None
                lora_a, lora_b, lora_bias, dropout_p = parts
                probabilities.add(dropout_p)
                weight, bias = weights if name == names[0] else (None, None)
                row.append(Projection(weight, bias, lora_a, lora_b, lora_bias))
            rows.append(row)
        if len(probabilities) != 1:
            return None
        return members, rows, probabilities.pop()

    def _hand_out(
        self,
        x: Tensor,
        asked: tuple[str, ...],
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
            state.pending = Pending(self.alora_group, asked, x, waiting)
        return y

    def _at_once(
        self, x: Tensor, asked: tuple[str, ...], state: ForwardState, ready: Ready
    ) -> Tensor | None:
        """My output by the short way, or None when something has changed."""
        group = self.alora_group
        if len(ready.indices) > 1 and (group is None or not group.enabled):
            return None
        outputs = ready.run(x, state)
        if outputs is None:
            return None
        if len(outputs) == 1:
            return outputs[0]
        return self._hand_out(x, asked, state, ready.indices, outputs)

    def _by_peft(self, x: Tensor, state: ForwardState, names: Any) -> Any:
        """PEFT's own arithmetic, for what the op does not take (adapters in a third dtype)."""
        arguments = peft_arguments(self.alora_owner, self, state, tuple(names), x)
        return self.alora_kind.forward(self, x, **arguments)
