"""Acceleration: what an accelerated model carries; the one search per forward happens here."""

from __future__ import annotations

import inspect
import uuid
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code

from ..activation import Activation, current_activation
from ..contract import Options
from . import checkpointing
from .ambient import ForwardState, current_request, current_state, set_state
from .live import LiveModel
from .refusal import invocation_of
from .rows import restrict, rows_of
from .sequences import Sequences


class Acceleration(LiveModel):
    """Hooks of one accelerated model. Attached to `root`, the model whose forward takes tokens.

    Attributes:
        key: names this model in what it writes down with caches.
    """

    def __init__(self, root: nn.Module, options: Options) -> None:
        super().__init__(root, options)
        self.key = uuid.uuid4().hex
        self.parameters = self._parameters()
        self.sequences = Sequences(self)

    def _parameters(self) -> list[str]:
        """The names of the arguments that may come by position."""
        known = inspect.signature(self.root.forward).parameters.values()
        return [p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    def active_names(self) -> tuple[str, ...]:
        """The active adapters, as the first LoRA layer has them; none when they are disabled."""
        for layer in self.layers.values():
            if layer._disable_adapters:
                return ()
            active = layer._active_adapter
            return (active,) if isinstance(active, str) else tuple(active)
        return ()

    # ------------------------------------------------------------------ one forward

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Forward pre-hook of `root`: find the active rows and make them the current state."""
        if torch.compiler.is_compiling():
            self._enter(args, kwargs)
        else:
            self._enter_eagerly(module, args, kwargs)

    def after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook of `root`, called after an exception as well."""
        if torch.compiler.is_compiling():
            self._leave(args, kwargs, output)
        else:
            self._leave_eagerly(args, kwargs, output)

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.state_of(args, kwargs)
        state.outer = current_state()
        set_state(state)

    @torch.compiler.disable
    def _enter_eagerly(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self.refresh():
            return  # all its adapters were merged or unloaded
        if module.training:
            checkpointing.watch(self.checkpointing)
        self._enter(args, kwargs)

    def _leave(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        state = current_state()
        if state is None or state.owner is not self:
            return  # the pre-hook itself raised
        state.pending = None
        set_state(state.outer)
        if state.generation is not None:
            state.generation.awaited = False
        if torch.compiler.is_compiling() or output is None:
            return
        self.sequences.remember(state, self._arguments(args, kwargs), output)

    _leave_eagerly = torch.compiler.disable(_leave)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.parameters, args)), **kwargs}

    def state_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardState:
        """The state of a forward with these arguments."""
        arguments = self._arguments(args, kwargs)
        ids = arguments.get("input_ids")
        tokens = ids if ids is not None else arguments.get("inputs_embeds")
        if tokens is None:  # a module of its own making: its first argument is what it has
            tokens = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if tokens is None:
                return ForwardState(self, None, {}, 0, 0)
            ids = None if tokens.is_floating_point() else tokens
        batch, seq_len = self._size(tokens, ids)
        if ids is not None and ids.dim() == 1:
            ids = ids.unsqueeze(0)
        keep = arguments.get("logits_to_keep")
        request = current_request(self)
        chosen = request is not None and request.chosen
        row_names = None
        if chosen:
            assert request is not None
            names, row_names = rows_of(request.names, batch)
        else:
            names = self.active_names()
        state = ForwardState(
            self,
            names if chosen else None,
            {},
            batch,
            seq_len,
            0 if keep is None else keep,
            row_names,
        )
        if request is not None and request.activation is not None:
            for name in names:
                state.activations[name] = restrict(state, name, request.activation)
            return state
        self.sequences.find(state, names, request, arguments, ids, tokens)
        return state

    @staticmethod
    def _size(tokens: Tensor, ids: Tensor | None) -> tuple[int, int]:
        shape = tokens.shape if ids is not None else tokens.shape[:-1]
        if len(shape) == 1:
            return 1, shape[0]
        if len(shape) == 0:
            return 1, 1
        return shape[0], shape[1:].numel()

    def late_activation(self, state: ForwardState, name: str) -> Activation:
        """For an adapter that is active in some layer only: it cannot be searched for now."""
        if state.rows and invocation_of(self.configs.get(name)) is None:
            return Activation.all(state.rows)
        raise RuntimeError(
            f"adapter {name!r} is active in a layer but not in the first LoRA layer of the model, "
            "so its invocation was not searched for; activate adapters through model.set_adapter"
        )

    # ------------------------------------------------------------------ outside a forward

    def outside(self, layer: Any, x: Tensor) -> ForwardState:
        """The state of a layer that is called on its own: by `activate`, or plain LoRA alone."""
        rows = x.shape[:-1].numel()
        batch, seq_len = (x.shape[0], rows // x.shape[0]) if x.dim() > 2 and rows else (1, rows)
        state = ForwardState(self, None, {}, batch, seq_len)
        ambient = current_activation()
        active = layer._active_adapter
        for name in (active,) if isinstance(active, str) else active:
            if invocation_of(self.configs.get(name)) is None:
                state.activations[name] = Activation.all(rows, device=x.device)
            elif ambient is not None:
                state.activations[name] = ambient
            elif name in layer.lora_A:
                raise RuntimeError(
                    f"adapter {name!r}: a layer was called outside the forward of "
                    f"{type(self.root).__name__}, so where its invocation begins is not known; "
                    "call the whole model, or run the layer under adapter_scope(model, name, "
                    "activation) or activate(activation). (A recomputation by a checkpoint that "
                    "is not the model's own gradient_checkpointing comes here too.)"
                )
        return state


# torch.compile of `root` itself runs its hooks outside the graph, and would compile each of them as
# a graph of its own; of a model around `root` it takes them into the graph.
for _hook in (Acceleration.before_forward, Acceleration.after_forward):
    skip_code(_hook.__code__)
