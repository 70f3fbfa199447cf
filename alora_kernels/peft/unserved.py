"""Layers, adapters and modules that keep PEFT's own forward: what it has to be handed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .ambient import ForwardState, current_state
from .refusal import invocation_of
from .rows import BASE

if TYPE_CHECKING:
    from .acceleration import Acceleration


def peft_arguments(
    owner: Acceleration, layer: Any, state: ForwardState, names: tuple[str, ...]
) -> dict[str, Any]:
    """The keyword arguments with which PEFT's forward does the same for `layer`."""
    offsets: list[int | None] | None = None
    for name in names:
        if invocation_of(owner.configs.get(name)) is None or name not in layer.lora_A:
            continue
        mask = state.activations[name].mask.view(state.batch, state.seq_len).cpu()
        counts = mask.sum(1)
        position = torch.arange(state.seq_len)
        if not torch.equal(mask, position >= (state.seq_len - counts).unsqueeze(1)):
            raise NotImplementedError(
                f"adapter {name!r}: a layer that keeps PEFT's forward cannot run packed rows"
            )
        mine = [int(c) or None for c in counts]
        if offsets is None:
            offsets = mine
        elif state.row_names is not None:
            offsets = [b if a is None else a for a, b in zip(offsets, mine)]
        elif offsets != mine:
            raise NotImplementedError(
                "two activated LoRAs with different invocations are active in a layer that "
                "keeps PEFT's forward, which knows one start for each row"
            )
    arguments: dict[str, Any] = {"alora_offsets": offsets}
    if state.names is not None:
        rows = state.row_names or [*(state.names or (None,))] * state.batch
        arguments["adapter_names"] = [BASE if n is None else n for n in rows]
    return arguments


class Unserved:
    """The hooks of the modules of one model that keep PEFT's forward."""

    def __init__(self, owner: Acceleration) -> None:
        self.owner = owner

    def before_forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the layer: hand it what PEFT would."""
        state = current_state()
        if state is None or state.owner is not self.owner or layer._disable_adapters:
            return None
        names = state.names
        if names is None:
            active: Any = layer._active_adapter
            names = (active,) if isinstance(active, str) else tuple(active)
        known = getattr(layer, "lora_A", {})
        extra = peft_arguments(self.owner, layer, state, tuple(n for n in names if n in known))
        if extra["alora_offsets"] is None:
            del extra["alora_offsets"]
        return args, {**kwargs, **extra}

    def before_auxiliary(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of a `modules_to_save` or trainable tokens: the adapter of each row."""
        state = current_state()
        if state is None or state.owner is not self.owner or state.names is None:
            return None
        active = list(module.active_adapters)
        if state.row_names is None and active == list(state.names):
            return None
        one = state.names[0] if state.names else None
        rows = [one] * len(args[0]) if state.row_names is None else state.row_names
        names = [BASE if n is None or n not in module._adapters else n for n in rows]
        return args, {**kwargs, "adapter_names": names}
