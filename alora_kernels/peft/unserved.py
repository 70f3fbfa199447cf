"""Layers, adapters and modules that keep PEFT's own forward: what it has to be handed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .ambient import ForwardState, current_state
from .elsewhere import elsewhere
from .refusal import invocation_of
from .rows import BASE
from .stream import BESIDE

if TYPE_CHECKING:
    from .acceleration import Acceleration


def peft_arguments(
    owner: Acceleration, layer: Any, state: ForwardState, names: tuple[str, ...], x: Tensor
) -> dict[str, Any]:
    """The keyword arguments with which PEFT's forward does the same for `layer` and its input."""
    offsets: list[int | None] | None = None
    batch = x.shape[0]
    for name in names:
        if invocation_of(owner.configs.get(name)) is None or name not in layer.lora_A:
            continue
        activation = state.activation_for(name, x)
        if x.dim() != 3 and activation.num_active != 0:
            raise NotImplementedError(
                f"adapter {name!r}: a layer that keeps PEFT's forward got an input of shape "
                f"{tuple(x.shape)}; PEFT's activated LoRA takes [batch, tokens, features] alone"
            )
        mask = activation.mask.view(batch, -1).cpu()
        counts = mask.sum(1)
        position = torch.arange(mask.shape[1])
        if not torch.equal(mask, position >= (mask.shape[1] - counts).unsqueeze(1)):
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


def beside_arguments(
    owner: Acceleration, layer: Any, state: ForwardState, names: tuple[str, ...], x: Tensor
) -> dict[str, Any]:
    """The same for a layer outside the tokens, whatever its kind: activated LoRAs are off."""
    names = tuple(n for n in names if n in {*layer.lora_A, *layer.lora_embedding_A})
    plain = [n for n in names if invocation_of(owner.configs.get(n)) is None]
    for name in plain:
        state.activation_for(name, x)  # refuses rows that run different adapters
    if len(plain) == len(names) and state.names is None:
        return {}
    if len(plain) > 1 or (plain and len(names) > 1 and state.names is None):
        raise NotImplementedError(
            f"adapters {', '.join(map(repr, names))} are active in a layer outside the tokens that "
            "keeps PEFT's forward, which runs one of them alone; activate one adapter"
        )
    return {"adapter_names": [plain[0] if plain else BASE] * len(x)}


class Unserved:
    """The hooks of the modules of one model that keep PEFT's forward."""

    def __init__(self, owner: Acceleration, place: str | None = None) -> None:
        self.owner, self.place = owner, place

    def before_forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the layer: hand it what PEFT would."""
        state: Any = current_state()
        if state is not None and state.owner is not self.owner:
            state = None
        if self.place is not None:
            state = elsewhere(self.owner, self.place, state)
        if state is None or layer._disable_adapters:
            return None
        names = state.names
        if names is None:
            active: Any = layer._active_adapter
            names = (active,) if isinstance(active, str) else tuple(active)
        if self.place == BESIDE:
            return args, {**kwargs, **beside_arguments(self.owner, layer, state, names, args[0])}
        known = getattr(layer, "lora_A", {})
        names = tuple(n for n in names if n in known)
        extra = peft_arguments(self.owner, layer, state, names, args[0])
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
