"""Notices that adapters were added to an accelerated model, changed, or removed.

PEFT, transformers and users add LoRA layers, add adapters to layers and put merged layers back, and
all of them do it by setting modules as attributes. torch calls a hook for each such registration.
This file counts the registrations inside accelerated models. A model remembers the count at which
it last looked at its layers, and looks again before its next forward if the count has changed.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from peft import PeftType
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import hotswap
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils.parametrize import ParametrizationList

from .adapters import is_adopted
from .state import current_state

ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
TOKENS = "alora_invocation_tokens"

_changes = 0
_watching = False
# The modules of accelerated models, by their ids. Only registrations inside these count: some
# models slice or wrap their layers in every forward, which changes nothing.
_inside: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def changes() -> int:
    """The number of changes in accelerated models since the process began."""
    return _changes


def look_inside(root: nn.Module) -> None:
    """Watch all modules that are in `root` now."""
    for module in root.modules():
        _inside[id(module)] = module


def note_change() -> None:
    global _changes
    _changes += 1


def begin() -> None:
    """Start to watch. Every call after the first does nothing."""
    global _watching
    if _watching:
        return
    _watching = True
    register_module_module_registration_hook(_registered)
    _guard_forwards()
    compared = hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA]
    if TOKENS not in compared:  # else a hotswap puts new weights under the old invocation
        compared.append(TOKENS)


def _registered(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    if torch.compiler.is_compiling() or _inside.get(id(parent)) is not parent:
        return  # while compiling, a model may slice its list of layers, which is no change
    # PEFT parametrizes experts while a forward runs, which is no change either.
    if name != "parametrizations" and not isinstance(parent, ParametrizationList):
        note_change()


def _guard_forwards() -> None:
    """Make a LoRA layer that nobody noticed raise an error instead of running on all tokens.

    This happens only to layers that were written into `_modules` directly, without torch's
    registration (`ModuleList.insert` does so).
    """
    check = LoraLayer._check_forward_args

    @functools.wraps(check)
    def checked(layer: Any, x: Any, *args: Any, **kwargs: Any) -> None:
        state = current_state()
        if state is not None and not is_adopted(layer):
            _refuse_unnoticed(layer, state)
        check(layer, x, *args, **kwargs)

    LoraLayer._check_forward_args = checked  # type: ignore[method-assign, assignment]


@torch.compiler.disable
def _refuse_unnoticed(layer: Any, state: Any) -> None:
    for path, module in state.adapters.root.named_modules():
        if module is layer:
            note_change()
            raise RuntimeError(
                f"LoRA layer {path!r} was put into an accelerated model past torch's registration "
                "of modules (ModuleList.insert, or a write into _modules), so it runs without its "
                "invocation; run the forward again, or call accelerate(model) after such a change"
            )
