"""What every module of an accelerated model gets that holds adapters, served or not."""

from __future__ import annotations

import copyreg
from collections import OrderedDict
from typing import Any

from torch import nn

from .adapters import FIELDS
from .peft_path import PRE_HOOKS, chosen_for


class Adopted:
    """Copied into a subclass of `alora_kind`.

    A module travels without us (pickle, torch.save, deepcopy): what is loaded is of PEFT's class.
    The Acceleration travels with the root of the model, and adopts its layers again.
    """

    alora_kind: Any  # PEFT's class

    _disable_adapters: bool

    @property
    def active_adapters(self) -> Any:
        names = chosen_for(self)
        return self.alora_kind.active_adapters.fget(self) if names is None else list(names)

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters or chosen_for(self) == ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, protocol)


def reduced(module: Any, protocol: Any) -> tuple[Any, ...]:
    """`module.__reduce_ex__` as if `accelerate` had never met it."""
    kind = type(module).alora_kind
    _, _, state, *rest = kind.__reduce_ex__(module, protocol)
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if not name.startswith(FIELDS)}
        _leave_out_hooks(state)
    # (pickle's usual way to make an object insists on the class that it has now.)
    return copyreg._reconstructor, (kind, object, None), state, *rest  # type: ignore[attr-defined]


def _leave_out_hooks(state: dict[str, Any]) -> None:
    hooks = state.get("_forward_pre_hooks", {})
    mine = {key for key, hook in hooks.items() if hook in PRE_HOOKS}
    if not mine:
        return
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        state[name] = OrderedDict((k, v) for k, v in state[name].items() if k not in mine)


def remove_hooks(module: nn.Module) -> None:
    """Take our forward pre-hooks off a module that holds adapters."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook in PRE_HOOKS]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
