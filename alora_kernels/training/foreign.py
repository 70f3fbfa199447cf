"""Finds foreign code inside a model. Prefixes that such code computed must not be kept.

A kept prefix is found again by the weights and settings of the model, and foreign code is part of
neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as nn_module

# The libraries whose hooks and forwards are determined by version, config and weights alone.
KNOWN = ("torch", "transformers", "peft", "accelerate", "trl", "alora_kernels")


def foreign_code(base: nn.Module, attention: str | None) -> str | None:
    """The first hook or forward in `base` that is not from a known library; None if there is none.

    Args:
        base: the transformers model.
        attention: the name of the model's attention implementation.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS.get(attention) if attention else None
    if function is not None and not _is_known(function):
        return f"an attention function of {_home(function)}"
    hooks = (nn_module._global_forward_pre_hooks, nn_module._global_forward_hooks)
    for hook in (hook for kind in hooks for hook in kind.values()):
        if not _is_known(hook):
            return f"a hook of {_home(hook)} on all modules"
    for path, module in base.named_modules():
        for what, code in _code_of(module):
            if not _is_known(code):
                return f"{what} of {_home(code)} on {path or type(module).__name__}"
        forward = getattr(type(module), "forward", None)
        homes = {kind.__module__ for kind in type(module).__mro__}
        if forward is not None and _home(forward) not in homes and not _is_known(forward):
            return f"a forward of {_home(forward)} in the class {type(module).__name__}"
    return None


def _code_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        yield "a hook", hook
    if "forward" in module.__dict__:
        yield "a forward", module.__dict__["forward"]


def _home(code: Any) -> str:
    """The module that defines a function, or the class of a callable object."""
    while hasattr(code, "func") and not hasattr(code, "__code__"):  # functools.partial
        code = code.func
    code = getattr(code, "__func__", code)
    return str(getattr(code, "__module__", None) or type(code).__module__)


def _is_known(code: Any) -> bool:
    return _home(code).partition(".")[0] in KNOWN
