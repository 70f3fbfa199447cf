"""Takes over the modules of a model that hold adapters, and gives them back to PEFT."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..invocation import invocation_of
from . import watch
from .adapters import FIELDS, Adapters
from .adopted import Adopted, remove_hooks
from .checkpointing import unwatch
from .classes import accelerated_class, is_accelerated, plain_class
from .elsewhere import say_beside
from .groups import Group, find_groups
from .layers import AcceleratedLayer
from .peft_path import OneAtATime, before_auxiliary, before_foreign, before_layer
from .requests import BASE
from .stream import find_places
from .support import check_config, why_not_served, why_unsuited

logger = logging.getLogger("alora_kernels")


def adopt(adapters: Adapters) -> None:
    """Serve every LoRA layer that can be served; the others keep PEFT's forward and get a pre-hook.

    Raises:
        ValueError: an adapter would give wrong results (see `check_config`).
    """
    modules: dict[str, Any] = {
        path: module
        for path, module in adapters.root.named_modules()
        if isinstance(module, watch.ADAPTED)
    }
    layers: dict[str, Any] = {p: m for p, m in modules.items() if isinstance(m, LoraLayer)}
    check_configs(adapters.root, layers)
    here: set[nn.Module] = set(modules.values())
    for module in adapters.modules - here:
        release(module)
    adapters.layers, adapters.modules = layers, here
    adapters.checkpointing = [
        m for m in adapters.root.modules() if hasattr(m, "gradient_checkpointing")
    ]
    adapters.refused = {}
    own = getattr(adapters.root, "peft_config", {})
    adapters.inner_configs = {n: c for n, c in configs_of(adapters.root).items() if n not in own}
    taken = [layer.alora_index for layer in layers.values() if is_served(layer)]
    indices = itertools.count(max(taken, default=-1) + 1)
    locks: dict[int, threading.RLock] = {}
    places = find_places(adapters.root, layers)
    say_beside(adapters, places)
    for path, module in modules.items():
        reason = why_unserved(module)
        if reason is None:
            _serve(adapters, module, indices)
        else:
            _keep_pefts(adapters, module)
        module.__dict__["alora_rows"] = places.get(path)
        if reason is None:
            continue
        if path in layers:
            adapters.refused[path] = reason
        if isinstance(module, ParamWrapper):
            mine = module.__dict__.get("alora_lock") or threading.RLock()
            module.__dict__["alora_lock"] = locks.setdefault(id(module.get_base_layer()), mine)
    adapters.served = set(layers) - set(adapters.refused)
    _regroup(adapters)


def why_unserved(module: Any) -> str | None:
    """Why a module that holds adapters keeps PEFT's forward, or None.

    A served layer stays served: a forward that was put on it later wraps ours.
    """
    return None if is_served(module) else why_not_served(module)


def is_served(module: nn.Module) -> bool:
    return "alora_index" in module.__dict__


def _serve(adapters: Adapters, layer: Any, indices: Iterator[int]) -> None:
    if not is_served(layer):
        release(layer)
        kind = type(layer)
        fused = kind.__name__ == "Linear"
        layer.__dict__.update(alora_group=None, alora_index=next(indices), alora_fused=fused)
        layer.__class__ = accelerated_class(kind, Adopted, AcceleratedLayer)
    layer.__dict__["alora_adapters"] = adapters


def _keep_pefts(adapters: Adapters, module: Any) -> None:
    hook: Any = before_foreign
    if isinstance(module, LoraLayer):
        hook = before_layer
    elif isinstance(module, AuxiliaryTrainingWrapper):
        hook = before_auxiliary
    if not is_accelerated(module):
        methods = (Adopted, OneAtATime) if isinstance(module, ParamWrapper) else (Adopted,)
        module.__class__ = accelerated_class(type(module), *methods)
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)
    module.__dict__["alora_adapters"] = adapters


def _regroup(adapters: Adapters) -> None:
    grouped: dict[Any, Group | None] = {}
    served = {path: adapters.layers[path] for path in adapters.served}
    for group in find_groups(adapters.root, served):
        before = group.members[0].alora_group
        same = before is not None and before.members == group.members
        grouped |= dict.fromkeys(group.members, before if same else group)
    for path in adapters.served:
        adapters.layers[path].__dict__["alora_group"] = grouped.get(adapters.layers[path])


def release(module: Any) -> None:
    """Give one module back to PEFT: its class, its attributes, its hooks."""
    remove_hooks(module)
    for name in [name for name in module.__dict__ if name.startswith(FIELDS)]:
        del module.__dict__[name]
    if not is_accelerated(module):
        return
    ours = type(module)
    module.__class__ = plain_class(ours)
    for name, value in list(module.__dict__.items()):  # Hugging Face's accelerate keeps a forward
        method = getattr(value, "__func__", None)
        called = getattr(method, "__name__", "")
        if method is not None and getattr(ours, called, None) is method:
            module.__dict__[name] = getattr(type(module), called).__get__(module)


def give_back(adapters: Adapters) -> None:
    """Give every module that holds adapters back to PEFT."""
    for module in {*adapters.modules, *adapters.root.modules()}:
        if isinstance(module, watch.ADAPTED):
            release(module)
    unwatch(adapters.root.modules())
    adapters.layers, adapters.modules, adapters.served = {}, set(), set()


# ---------------------------------------------------------------------- refusals


def check_configs(root: nn.Module, layers: dict[str, Any]) -> None:
    """Refuse the model if one of its adapters would give wrong results.

    Raises:
        ValueError: see `check_config`; or the invocation of an activated LoRA is not known.
    """
    configs = configs_of(root)
    unsuited = why_unsuited(root)
    for name, config in configs.items():
        check_config(name, config, unsuited)
    for path, layer in layers.items():
        for name, variant in layer.lora_variant.items():
            if isinstance(variant, ALoraLinearVariant) and invocation_of(configs.get(name)) is None:
                raise ValueError(
                    f"adapter {name!r}: layer {path!r} is part of an activated LoRA, but no "
                    f"module of {type(root).__name__} has a peft_config with its "
                    "alora_invocation_tokens; accelerate the model that the adapter was added to"
                )


def check_names(adapters: Adapters, names: Sequence[str], where: str) -> None:
    """Refuse adapters that no layer has."""
    known = set(adapters.configs)
    for layer in adapters.layers.values():
        known |= set(layer.lora_A) | set(layer.lora_embedding_A)
    unknown = sorted({n for n in names if n != BASE} - known)
    if unknown:
        raise ValueError(
            f"{where}: unknown adapter {', '.join(map(repr, unknown))}; the model has "
            f"{', '.join(map(repr, sorted(known)))}"
        )


def configs_of(root: nn.Module) -> dict[str, Any]:
    """The configurations of all adapters in `root`, in whichever part they were injected.

    Raises:
        ValueError: two adapters of one name have different invocations.
    """
    found: dict[str, Any] = {}
    for path, module in root.named_modules():
        configs = module.__dict__.get("peft_config")
        for name, config in (configs if isinstance(configs, dict) else {}).items():
            known = invocation_of(found.setdefault(name, config))
            if invocation_of(config) != known:
                raise ValueError(
                    f"adapter {name!r}: its alora_invocation_tokens are {known}, but those of the "
                    f"adapter of that name in {path!r} are {invocation_of(config)}; give adapters "
                    "that begin at different tokens names of their own"
                )
    return found


def refusals(layers: dict[str, Any]) -> dict[str, str]:
    """The LoRA layers that cannot be served, each with the reason."""
    reasons = {path: why_unserved(layer) for path, layer in layers.items()}
    return {path: reason for path, reason in reasons.items() if reason is not None}


def table(refused: dict[str, str]) -> str:
    width = max(map(len, refused))
    return "\n".join(f"  {path:<{width}}  {reason}" for path, reason in refused.items())


def warn_of_refusals(adapters: Adapters, said: Mapping[str, str]) -> None:
    """Warn of the layers that keep PEFT's forward, except those in `said` (warned of before)."""
    came = {path: reason for path, reason in adapters.refused.items() if path not in said}
    if came:
        logger.warning(
            "alora_kernels serves %d of %d LoRA layers; these keep PEFT's path:\n%s",
            len(adapters.served),
            len(adapters.layers),
            table(came),
        )
