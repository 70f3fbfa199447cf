"""accelerate, restore and adapter_scope: what a user calls."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..activation import Activation
from ..contract import Options
from .acceleration import Acceleration
from .ambient import (
    ForwardState,
    Names,
    Request,
    current_request,
    current_state,
    requesting,
    set_state,
)
from .checkpointing import unwatch
from .classes import accelerated_class, is_accelerated
from .eligibility import why_not_served
from .elsewhere import say_beside
from .groups import find_groups
from .layers import AcceleratedLayer
from .refusal import check_adapter_folder, check_config, invocation_of, why_unsuited
from .rows import BASE, restrict, rows_of
from .stream import find_places
from .unserved import Unserved

logger = logging.getLogger("alora_kernels")
OURS = "_alora_acceleration"
LAYER_FIELDS = ("owner", "group", "index", "fused", "rows")


def accelerate(
    model: Any,
    strict: bool = False,
    *,
    adapter_precision: str = "fp32",
    backend: str = "auto",
    strategy: str = "auto",
    prefix_grad: bool = True,
) -> Any:
    """Make a live PEFT model run its LoRA layers through this package; returns the same object.

    Everything of PEFT goes on working: saving, loading, adding, choosing and deleting adapters,
    mixed batches by `adapter_names`, `alora_offsets=`, generation, training. The invocation is
    searched for once per forward, and every layer shares the result. Layers that cannot be served
    keep PEFT's path and are logged with the reason. `restore` undoes it.

    Args:
        model: a `PeftModel`, or a model whose adapters came from `add_adapter` or
            `inject_adapter_in_model`, with any number of LoRA and aLoRA adapters.
        strict: raise when a layer cannot be served.
        adapter_precision, backend, strategy, prefix_grad: options of `alora_linear`. The default
            precision is PEFT's own arithmetic; "compute" rounds adapters to the base's dtype.

    Raises:
        TypeError: there is no LoRA layer in the model.
        ValueError: an adapter that would be silently wrong (see `check_config`).
        RuntimeError: with `strict`, lists every layer that is not served.
    """
    root = _root(model)
    if OURS in root.__dict__:
        restore(model)
    options = Options(
        dropout_p=0.0,  # each layer has its own
        prefix_grad=prefix_grad,
        adapter_precision=adapter_precision,
        strict_inactive=False,
        backend=backend,
        strategy=strategy,
    )
    owner = Acceleration(root, options)
    if not any(isinstance(m, LoraLayer) for m in root.modules()):
        raise TypeError(
            f"accelerate: {type(model).__name__} has no LoRA layer; expected a PeftModel, or a "
            "model with an adapter from add_adapter or inject_adapter_in_model"
        )
    check_configs(owner)
    refused = _refusals(root)
    if strict and refused:
        raise RuntimeError("accelerate: layers that cannot be served:\n" + _table(refused))
    root.__dict__[OURS] = owner
    adopt(owner)
    owner.handles += [
        root.register_forward_pre_hook(owner.before_forward, with_kwargs=True),
        root.register_forward_hook(owner.after_forward, with_kwargs=True, always_call=True),
    ]
    owner.replace_methods()
    if isinstance(model, PeftModel):
        model.__dict__[OURS] = owner
        model.__class__ = accelerated_class(type(model), AcceleratedModel)
        if SKIPS_HOOKS:
            tuner = model.base_model
            tuner.__class__ = accelerated_class(type(tuner), AcceleratedTuner)

    if refused:
        logger.warning(
            "alora_kernels serves %d of %d LoRA layers; these keep PEFT's path:\n%s",
            len(owner.served),
            len(owner.layers),
            _table(refused),
        )
    return model


def restore(model: Any) -> Any:
    """Undo `accelerate`: the model is as before; returns the same object."""
    root = _root(model)
    owner = root.__dict__.pop(OURS, None)
    if owner is None:
        return model
    for handle in owner.handles:
        handle.remove()
    for layer in root.modules():
        if is_accelerated(layer):
            _release(layer)
    unwatch(root.modules())
    owner.restore_methods()
    if model.__dict__.pop(OURS, None) is not None and is_accelerated(model):
        model.__class__ = type(model).alora_kind
        if is_accelerated(model.base_model):
            model.base_model.__class__ = type(model.base_model).alora_kind
    return model


@contextmanager
def adapter_scope(
    model: nn.Module,
    adapter: Names,
    activation: Activation | None = None,
    *,
    starts: Sequence[int | None] | None = None,
) -> Iterator[None]:
    """Choose the adapter of every forward in the block, without touching the model.

    with adapter_scope(model, "summary", starts=[812]):
        model(input_ids, past_key_values=cache)

    Safe across threads and asyncio tasks: each sees its own scopes. It overrides the active
    adapters, `disable_adapter` excepted.

    Args:
        model: an accelerated model.
        adapter: None for the base model, a name for all rows, or a list with one name (or None)
            for each row of the batch.
        activation: the active rows of the forwards in the block, `[B·T]`; layers called on their
            own use it too. By default each forward searches its own tokens.
        starts: absolute start for each row (None = base model), counted in tokens of the row from
            the beginning of its cache; serves prefill, chunks and decoding alike.

    `starts` and `activation` are meant for every forward in the block; around `generate`, for its
    own sequence alone (not for a negative prompt, or what a logits processor runs).

    Raises:
        ValueError: the model is not accelerated, an adapter is unknown, or both `activation` and
            `starts` are given.
    """
    owner = _root(model).__dict__.get(OURS)
    if owner is None:
        raise ValueError("adapter_scope: the model is not accelerated; call accelerate(model)")
    if activation is not None and starts is not None:
        raise ValueError("adapter_scope: give activation or starts, not both")
    names = [adapter] if adapter is None or isinstance(adapter, str) else list(adapter)
    check_names(owner, [n for n in names if n is not None], "adapter_scope")
    chosen = adapter if adapter is None or isinstance(adapter, str) else names
    request = Request(owner, True, chosen, starts=starts, activation=activation)
    outer, state = current_state(), None
    if activation is not None or adapter is None:
        state = _fixed_state(owner, chosen, activation)
        set_state(state)
    try:
        with requesting(request):
            yield
    finally:
        if state is not None:
            set_state(outer)


def _fixed_state(owner: Acceleration, chosen: Names, activation: Activation | None) -> ForwardState:
    """The state for layers that are called on their own inside a scope."""
    rows = 0 if activation is None else activation.num_rows
    batch = len(chosen) if isinstance(chosen, list) else 1
    if rows % batch:
        raise ValueError(
            f"adapter_scope: the activation has {rows} rows, which is no multiple of the {batch} "
            "adapter names"
        )
    names, row_names = rows_of(chosen, batch)
    if row_names is None:
        batch = 0  # any layout of these rows will do
    state = ForwardState(owner, names, {}, batch, rows // max(batch, 1), row_names=row_names)
    for name in names:
        assert activation is not None
        state.activations[name] = restrict(state, name, activation)
    return state


def check_names(owner: Acceleration, names: Sequence[str], where: str) -> None:
    """Refuse adapters that no layer has."""
    known = set(owner.configs)
    for layer in owner.layers.values():
        known |= set(layer.lora_A) | set(layer.lora_embedding_A)
    unknown = sorted({n for n in names if n != BASE} - known)
    if unknown:
        raise ValueError(
            f"{where}: unknown adapter {', '.join(map(repr, unknown))}; the model has "
            f"{', '.join(map(repr, sorted(known)))}"
        )


def check_configs(owner: Acceleration) -> None:
    """Refuse the model if one of its adapters cannot be right."""
    unsuited = why_unsuited(owner.root)
    for name, config in owner.configs.items():
        check_config(name, config, unsuited)


def adopt(owner: Acceleration) -> None:
    """Serve every LoRA layer of the model that can be; again after an adapter was added."""
    owner.layers = {
        path: module for path, module in owner.root.named_modules() if isinstance(module, LoraLayer)
    }
    owner.served.clear()
    places = find_places(owner.root, owner.layers)
    say_beside(owner, places)
    for index, (path, layer) in enumerate(owner.layers.items()):
        if is_accelerated(layer):
            _release(layer)
        reason = why_not_served(layer)
        if reason is not None:
            if path not in owner.refused:
                hook = Unserved(owner, places.get(path)).before_forward
                owner.handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            owner.refused[path] = reason
            continue
        fused = type(layer).__name__ == "Linear"
        layer.__class__ = accelerated_class(type(layer), AcceleratedLayer)
        values: tuple[Any, ...] = (owner, None, index, fused, places.get(path))
        for field, value in zip(LAYER_FIELDS, values):
            layer.__dict__[f"alora_{field}"] = value
        owner.served.add(path)
    for module in owner.root.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and module not in owner.auxiliary:
            owner.auxiliary.add(module)
            before = Unserved(owner).before_auxiliary
            owner.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    served = {path: owner.layers[path] for path in owner.served}
    for group in find_groups(owner.root, served):
        for member in group.members:
            member.__dict__["alora_group"] = group


def _release(layer: Any) -> None:
    layer.__class__ = type(layer).alora_kind
    for field in LAYER_FIELDS:
        layer.__dict__.pop(f"alora_{field}", None)


def _refusals(root: nn.Module) -> dict[str, str]:
    found = {}
    for path, module in root.named_modules():
        if isinstance(module, LoraLayer):
            reason = why_not_served(module)
            if reason is not None:
                found[path] = reason
    return found


def _table(refused: dict[str, str]) -> str:
    width = max(map(len, refused))
    return "\n".join(f"  {path:<{width}}  {reason}" for path, reason in refused.items())


def _root(model: nn.Module) -> nn.Module:
    """The module whose forward takes the tokens."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


# ---------------------------------------------------------------------- the PeftModel itself

SERVED_HERE = object()  # in place of alora_offsets: PEFT then neither searches nor sets hooks


# Before 0.21 PEFT calls its model's `forward`, past every hook on the model, ours among them.
SKIPS_HOOKS = "forward" in BaseTuner.forward.__code__.co_names


class AcceleratedTuner:
    """What the class of the LoraModel between the two gets, where PEFT skips hooks."""

    model: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class AcceleratedModel:
    """What the class of an accelerated PeftModel gets, as `AcceleratedLayer` in `layers`."""

    alora_kind: Any  # PEFT's class

    training: bool
    peft_config: dict[str, Any]
    base_model: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.__dict__[OURS]
        offsets = kwargs.pop("alora_offsets", None)
        names = kwargs.pop("adapter_names", None)
        if offsets is None and names is None:
            return self.alora_kind.forward(self, *args, alora_offsets=SERVED_HERE, **kwargs)
        with requesting(self._request(owner, names, offsets)):
            return self.alora_kind.forward(self, *args, alora_offsets=SERVED_HERE, **kwargs)

    def _request(self, owner: Acceleration, names: Any, offsets: Any) -> Request:
        outer = current_request(owner)
        if names is not None:
            if self.training:
                raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
            check_names(owner, names, "adapter_names")
            return Request(owner, True, list(names), offsets=offsets)
        if outer is not None and outer.chosen:
            return Request(owner, True, outer.names, offsets=offsets)
        return Request(owner, offsets=offsets)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.__dict__[OURS]
        names = kwargs.pop("adapter_names", None)
        offsets = kwargs.pop("alora_offsets", None)
        if offsets is None and names is None:
            return self.alora_kind.generate(self, *args, alora_offsets=SERVED_HERE, **kwargs)
        with requesting(self._request(owner, names, offsets)):
            return self.alora_kind.generate(self, *args, alora_offsets=SERVED_HERE, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        check_config(adapter_name, peft_config, why_unsuited(self.__dict__[OURS].root))
        self.alora_kind.add_adapter(self, adapter_name, peft_config, *args, **kwargs)
        adopt(self.__dict__[OURS])

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if os.path.isfile(os.path.join(str(model_id), "adapter_config.json")):
            check_adapter_folder(str(model_id))
        result = self.alora_kind.load_adapter(self, model_id, adapter_name, *args, **kwargs)
        adopt(self.__dict__[OURS])
        return result

    def unload(self) -> Any:
        restore(self)
        return self.unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        alora = [n for n, c in self.peft_config.items() if invocation_of(c) is not None]
        if not alora:
            restore(self)
        return self.base_model.merge_and_unload(*args, **kwargs)
