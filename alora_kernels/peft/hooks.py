"""Runs before and after each forward of the model: finds its active rows, updates the record."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .adapters import Adapters
from .requests import current_request, rows_of
from .sequences import Sequences
from .state import ForwardState, current_state, restrict, set_state


class Forwards:
    """Sets and removes the state of each forward of one accelerated model."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self.sequences = Sequences(adapters)
        known = inspect.signature(adapters.root.forward).parameters.values()
        # The names of the arguments that can be passed by position.
        self.parameters = [
            p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the active rows of a forward with these arguments, and set its state."""
        state = self.state_of(args, kwargs)
        state.outer = current_state()
        set_state(state)

    def leave(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Remove the state after a forward. `output` is None if the forward raised."""
        state = current_state()
        if state is None or state.adapters is not self.adapters:
            return  # `enter` itself raised
        state.pending = None
        set_state(state.outer)
        if state.generation is not None:
            state.generation.awaited = False
        if torch.compiler.is_compiling() or output is None:
            return
        self.sequences.remember(state, self._arguments(args, kwargs), output)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.parameters, args)), **kwargs}

    def state_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardState:
        """The state of a forward with these arguments."""
        arguments = self._arguments(args, kwargs)
        ids = arguments.get("input_ids")
        tokens = ids if ids is not None else arguments.get("inputs_embeds")
        if tokens is None:  # not a transformers model: take its first tensor
            tokens = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if tokens is None:
                return ForwardState(self.adapters, None, {}, 0, 0)
            ids = None if tokens.is_floating_point() else tokens
        batch, seq_len = self._size(tokens, ids)
        if ids is not None and ids.dim() == 1:
            ids = ids.unsqueeze(0)
        keep = arguments.get("logits_to_keep")
        request = current_request(self.adapters)
        chosen = request is not None and request.chosen
        row_names = None
        if chosen:
            assert request is not None
            names, row_names = rows_of(request.names, batch)
        else:
            names = self.adapters.active_names()
        state = ForwardState(
            self.adapters,
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
