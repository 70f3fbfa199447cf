"""The behaviour that every module with adapters gets in an accelerated model, served or not."""

from __future__ import annotations

import copyreg
from collections import OrderedDict
from typing import Any

from torch import nn

from .adapters import FIELDS
from .peft_path import PRE_HOOKS, chosen_for


class Adopted:
    """Methods that are copied into a subclass of `alora_kind`.

    A pickled, saved or copied module has PEFT's class again and nothing of ours. The Acceleration
    itself is saved or copied with the root of the model, and adopts the layers again.
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
    """`module.__reduce_ex__` as if the module had never been accelerated."""
    kind = type(module).alora_kind
    _, _, state, *rest = kind.__reduce_ex__(module, protocol)
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if not name.startswith(FIELDS)}
        _leave_out_hooks(state)
    # (pickle's usual constructor insists on the object's present class.)
    return copyreg._reconstructor, (kind, object, None), state, *rest  # type: ignore[attr-defined]


def _leave_out_hooks(state: dict[str, Any]) -> None:
    hooks = state.get("_forward_pre_hooks", {})
    mine = {key for key, hook in hooks.items() if hook in PRE_HOOKS}
    if not mine:
        return
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        state[name] = OrderedDict((k, v) for k, v in state[name].items() if k not in mine)


def remove_hooks(module: nn.Module) -> None:
    """Remove our forward pre-hooks from a module."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook in PRE_HOOKS]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
