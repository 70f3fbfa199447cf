"""The forward of accelerated LoRA layers: base and adapter in one op, a group in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import MAX_DIM
from ..functional import run
from .adapters import Adapters, active_in
from .elsewhere import elsewhere
from .groups import Group, Pending
from .peft_path import peft_arguments
from .state import ForwardState, current_state, state_outside
from .tensors import Step, runs_plainly, steps_of


class AcceleratedLayer:
    """The methods that the class of a served layer gets. Their attributes begin with `alora_`.

    They are copied into a subclass of `alora_kind`. A second base class would change the layout of
    the object, and Python would refuse to change the class of a live layer.
    """

    alora_kind: Any  # PEFT's class
    _modules: dict[str, Any]
    _disable_adapters: bool
    _active_adapter: str | list[str]
    merged_adapters: list[str]

    alora_adapters: Adapters
    alora_group: Group | None
    alora_index: int
    alora_rows: str | None  # its place (see `stream`); None if its rows are the forward's tokens
    alora_fused: bool  # whether one op may compute base and adapter
    alora_known: Any  # returns the forward that PEFT's class had when ours was made

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if "alora_index" not in self.__dict__:  # somebody kept this method beyond `restore`
            return type(self).forward(self, x, *args, **kwargs)
        if args or kwargs or self._disable_adapters:
            return self.alora_kind.forward(self, x, *args, **kwargs)
        if x.dim() > MAX_DIM:  # a vision tower adds a dimension for the tiles of an image
            return self.forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        state = current_state()
        if self.merged_adapters:
            if state is not None and state.names is not None:
                return self._by_peft(x, state, state.names)  # raises: cannot choose when merged
            return self.alora_kind.forward(self, x)
        if self.alora_rows is not None:
            state = elsewhere(self.alora_adapters, self.alora_rows, state)
        if state is None:
            state = state_outside(self.alora_adapters, self, x)
        asked = state.names
        if asked is None:
            asked = active_in(self)
        waiting = self._waiting(x, asked, state)
        if waiting is not None:
            return waiting
        modules = self._modules
        adapters = modules["lora_A"]._modules
        names = [name for name in asked if name in adapters]
        if not names:
            return modules["base_layer"](x)
        plan = self._plan(x, asked, names, state)
        if plan is None:
            return self._by_peft(x, state, names)
        members, steps = plan
        outputs: Any = None
        if steps[0].projections[0].weight is None:
            outputs = (modules["base_layer"](x),)
            if not isinstance(outputs[0], Tensor):
                raise self._no_sum(outputs[0])
        outputs = self._run(x, state, steps, outputs)
        if len(outputs) == 1:
            return outputs[0]
        return self._hand_out(x, asked, state, [m.alora_index for m in members], outputs)

    def _waiting(self, x: Tensor, asked: tuple[str, ...], state: ForwardState) -> Tensor | None:
        """This layer's output, if another layer of its group has computed it already."""
        pending = state.pending
        if pending is None or self.alora_index not in pending.outputs:
            return None
        waiting = pending.outputs.pop(self.alora_index)
        if not pending.outputs:
            state.pending = None
        if pending.fits(x, asked):
            return waiting
        state.pending = None
        pending.group.dissolve("they were given different inputs")
        return None

    def _plan(
        self, x: Tensor, asked: tuple[str, ...], names: list[str], state: ForwardState
    ) -> tuple[list[Any], list[Step]] | None:
        """The layers to compute now, and the steps for it; None if PEFT must compute this layer.

        The layers are those of the group, or this layer alone. If the op cannot compute the base,
        the steps hold the adapters alone.
        """
        alone: list[Any] = [self]
        if not torch.compiler.is_compiling() and self.alora_kind.forward is not self.alora_known():
            return None  # somebody has replaced the forward of PEFT's class
        if self.alora_fused:
            together = self._together(x, asked, names, state)
            for layers in (together, alone) if together else (alone,):
                steps = steps_of(layers, names, x, True)
                if steps is not None:
                    return layers, steps
        steps = steps_of(alone, names, x, False)
        return None if steps is None else (alone, steps)

    def _together(
        self, x: Tensor, asked: tuple[str, ...], names: list[str], state: ForwardState
    ) -> list[Any]:
        """The layers of the group that can be computed together with this one; empty if none can.

        The output of another layer waits until that layer is called. So a layer is left out if its
        call may do more than run its forward. And nothing is computed together if x might change
        between the calls without a trace: this layer has hooks, the calling code is not
        transformers' own, or inference mode is on, which counts no writes to x.
        """
        group = self.alora_group
        if group is None or not group.enabled:
            return []
        if not torch.compiler.is_compiling():
            if x.is_inference() or not runs_plainly(self):  # type: ignore[arg-type]
                return []
            if not group.is_called_by_transformers():
                return []
        members = []
        for layer in group.members:
            if layer._disable_adapters or layer.merged_adapters:
                return []
            if state.names is None and layer._active_adapter != self._active_adapter:
                return []
            if layer is not self and not runs_plainly(layer):  # type: ignore[arg-type]
                continue
            adapters = layer._modules["lora_A"]._modules
            if [name for name in asked if name in adapters] == names:
                members.append(layer)
        return members if len(members) > 1 else []

    def _run(
        self, x: Tensor, state: ForwardState, steps: list[Step], outputs: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        """The outputs after all steps. `outputs` are those of the base, if already computed."""
        options = self.alora_adapters.options
        inplace = False
        for step in steps:
            dtype = None if outputs is None else outputs[0].dtype
            foreign = not (
                outputs is None or dtype is x.dtype or torch.is_autocast_enabled(x.device.type)
            )
            if outputs is not None and foreign:
                outputs = tuple([y.to(x.dtype) for y in outputs])
            outputs = run(
                "alora_linear_group",
                x,
                step.projections,
                step.scalings,
                state.activation_for(step.name, x),
                options if step.dropout_p == 0.0 else options._replace(dropout_p=step.dropout_p),
                base_outs=outputs,
                inplace=inplace,
            )
            if foreign:
                outputs = tuple([y.to(dtype) for y in outputs])
            # Without gradients nobody needs the output of a step, so the next one may add in place.
            inplace = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        assert outputs is not None
        return outputs

    def _hand_out(
        self,
        x: Tensor,
        asked: tuple[str, ...],
        state: ForwardState,
        indices: Sequence[int],
        outputs: tuple[Tensor, ...],
    ) -> Tensor:
        """This layer's output. The outputs of the other layers wait in the state."""
        waiting = dict(zip(indices, outputs))
        y = waiting.pop(self.alora_index)
        assert self.alora_group is not None
        if state.pending is not None:
            state.pending.group.dissolve("not all of them are called")
        state.pending = Pending(self.alora_group, asked, x, waiting)
        return y

    def _no_sum(self, output: Any) -> TypeError:
        mine = [path for path, layer in self.alora_adapters.layers.items() if layer is self]
        return TypeError(
            f"{', '.join(mine)}: the base layer, a {type(self._modules['base_layer']).__name__}, "
            f"returns a {type(output).__name__}, to which no adapter's part can be added (PEFT "
            "adds to tensors too); leave it out of target_modules"
        )

    def _by_peft(self, x: Tensor, state: ForwardState, names: Any) -> Any:
        """Run PEFT's forward for inputs that the op does not take (adapters of a third dtype)."""
        arguments = peft_arguments(self, state, tuple(names), x)
        return self.alora_kind.forward(self, x, **arguments)
