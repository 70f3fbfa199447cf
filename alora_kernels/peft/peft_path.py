"""Tells PEFT's own forward which adapters to run, in the layers and modules that keep it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapters import active_in
from .elsewhere import elsewhere
from .requests import BASE
from .state import BlockState, ForwardState, current_state
from .stream import BESIDE

# Passed to PEFT as alora_offsets. PEFT then neither searches for invocations nor sets hooks.
SERVED_HERE = object()


def peft_arguments(
    layer: Any,
    state: ForwardState,
    names: tuple[str, ...],
    x: Tensor,
) -> dict[str, Any]:
    """The keyword arguments with which PEFT's forward of `layer` runs `names` as `state` says.

    A single adapter for all rows needs no `adapter_names` argument: PEFT asks the layer which
    adapters are active, and our class (`Adopted`) names the chosen one. So layers that cannot mix
    adapters can run it too.

    Raises:
        NotImplementedError: PEFT's forward cannot run these rows.
        ValueError: an adapter is chosen, but another is merged into the base.
    """
    if state.names is not None:
        refuse_merged(layer)
    offsets: list[int | None] | None = None
    for name in names:
        if state.adapters.invocation(name) is None or name not in layer.lora_A:
            continue
        mine = _offsets(state, name, x)
        if offsets is None:
            offsets = mine
        elif state.row_names is not None:
            offsets = [b if a is None else a for a, b in zip(offsets, mine)]
        elif offsets != mine:
            raise NotImplementedError(
                "two activated LoRAs with different invocations are active in a layer that "
                "keeps PEFT's forward, which knows one start for each row"
            )
    arguments: dict[str, Any] = {} if offsets is None else {"alora_offsets": offsets}
    rows = _row_names(state, x)
    if rows is not None and (names or isinstance(state, BlockState)):
        arguments["adapter_names"] = [BASE if n is None else n for n in rows]
    return arguments


def refuse_merged(module: Any) -> None:
    """Refuse to choose an adapter for a layer that has adapters merged into its base."""
    if module.merged_adapters:
        raise ValueError(
            f"an adapter cannot be chosen for a layer that has merged adapters "
            f"({', '.join(module.merged_adapters)}): call unmerge_adapter first"
        )


def _row_names(state: ForwardState, x: Any) -> list[str | None] | None:
    """The adapter of each row, if PEFT must get it by an argument.

    None if one adapter runs in all rows of a forward: PEFT then asks the module (`chosen_for`).
    """
    if state.row_names is not None or not isinstance(state, BlockState):
        return state.row_names
    return [state.names[0] if state.names else None] * (len(x) if isinstance(x, Tensor) else 1)


def _offsets(state: ForwardState, name: str, x: Tensor) -> list[int | None]:
    """PEFT's `alora_offsets` for the rows of x `[B, T, K]`."""
    activation = state.activation_for(name, x)
    if x.dim() != 3 and activation.num_active != 0:
        raise NotImplementedError(
            f"adapter {name!r}: a layer that keeps PEFT's forward got an input of shape "
            f"{tuple(x.shape)}; PEFT's activated LoRA takes [batch, tokens, features] alone"
        )
    mask = activation.mask.view(x.shape[0], -1).cpu()
    counts = mask.sum(1)
    position = torch.arange(mask.shape[1])
    if not torch.equal(mask, position >= (mask.shape[1] - counts).unsqueeze(1)):
        raise NotImplementedError(
            f"adapter {name!r}: a layer that keeps PEFT's forward cannot run packed rows"
        )
    return [int(c) or None for c in counts]


def chosen_for(module: Any) -> tuple[str, ...] | None:
    """The adapters of `module` that the current forward chose in place of the active ones.

    None if the forward chose none, or if PEFT gets them by an argument (see `peft_arguments`).
    """
    state = current_state()
    if module.__dict__.get("alora_rows") == BESIDE:
        return _chosen_beside(module, state)
    if state is None or state.names is None or isinstance(state, BlockState):
        return None
    mine = _there(module, state.names)
    return None if mine and state.row_names is not None else mine


def _chosen_beside(module: Any, state: ForwardState | None) -> tuple[str, ...] | None:
    """The result of `chosen_for` in a layer that never sees the tokens: activated LoRAs are off."""
    chosen = None if state is None else state.names
    asked = _there(module, active_in(module) if chosen is None else chosen)
    adapters = module.alora_adapters
    plain = tuple([name for name in asked if adapters.invocation(name) is None])
    return None if chosen is None and plain == asked else plain


def _there(module: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that `module` has."""
    there = module._get_available_adapters()
    return tuple([name for name in names if name in there])


class OneAtATime:
    """LoRA on experts: PEFT changes the parameter of the base while the forward runs.

    Another thread must not see the change. So the forwards of all layers around one base take turns
    under a lock.
    """

    alora_kind: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        lock = None if torch.compiler.is_compiling() else self.__dict__.get("alora_lock")
        if lock is None:
            kind = getattr(type(self), "alora_kind", type(self))
            return kind.forward(self, x, *args, **kwargs)
        with lock:
            return self.alora_kind.forward(self, x, *args, **kwargs)


# ---------------------------------------------------------------------- forward pre-hooks


def before_layer(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a LoRA layer: add the arguments that PEFT's own model would pass to it."""
    state, place = current_state(), layer.alora_rows
    if place is not None:
        state = elsewhere(layer.alora_adapters, place, state)
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if state is None or x is None or layer._disable_adapters:
        return None
    if place == BESIDE:
        for name in _chosen_beside(layer, state) or ():
            state.activation_for(name, x)  # refuses rows that run different adapters
        return None
    mine = _there(layer, active_in(layer) if state.names is None else state.names)
    return args, {**kwargs, **peft_arguments(layer, state, mine, x)}


def before_auxiliary(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of `modules_to_save` and trainable tokens: add `adapter_names`, one for each row."""
    state = current_state()
    if state is None or state.names is None or chosen_for(module) is not None:
        return None
    rows = _row_names(state, args[0] if args else None)
    if rows is None:
        return None
    names = [BASE if n is None or n not in module._adapters else n for n in rows]
    return args, {**kwargs, "adapter_names": names}


def before_foreign(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of layers of other PEFT methods than LoRA.

    They take no argument for the adapter, so this refuses every choice that would need one.
    """
    state = current_state()
    if state is None or state.names is None or module._disable_adapters:
        return
    refuse_merged(module)
    if chosen_for(module) is None:
        raise ValueError(
            f"{type(module).__module__}.{type(module).__name__} runs one adapter for the whole "
            "batch, inside a forward of its model: it can neither mix adapters nor be called on "
            "its own under adapter_scope"
        )


def before_model(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a PeftModel with a wrapped PEFT forward on its instance: no search by PEFT."""
    if kwargs.get("alora_offsets") is not None:
        return None
    return args, {**kwargs, "alora_offsets": SERVED_HERE}


PRE_HOOKS = (before_layer, before_auxiliary, before_foreign, before_model)
