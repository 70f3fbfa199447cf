"""Gives a PeftModel, and the tuner in it, classes that know of the accelerated model inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .acceleration import Acceleration
from .adapters import OURS
from .adopted import reduced
from .adoption import release
from .classes import accelerated_class, is_accelerated
from .peft_path import SERVED_HERE, before_model
from .requests import Request, current_request, requesting
from .support import check_arriving, check_config, why_unsuited

# PEFT before 0.21 calls `forward` of its model directly, which skips all hooks, ours too.
SKIPS_HOOKS = "forward" in BaseTuner.forward.__code__.co_names


def unwrap(model: Any) -> Any:
    """The model inside torch's wrappers (torch.compile, DataParallel, DistributedDataParallel)."""
    while isinstance(model, OptimizedModule | DataParallel | DistributedDataParallel):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


def root_of(model: Any) -> nn.Module:
    """The module whose forward takes the tokens."""
    model = unwrap(model)
    if isinstance(model, PeftModel):
        return model.get_base_model()  # type: ignore[no-any-return]
    if isinstance(model, PeftMixedModel):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model  # type: ignore[no-any-return]


def tuner_of(model: Any) -> BaseTuner | None:
    """The tuner that `model` is, or that it holds; None if there is none."""
    model = unwrap(model)
    tuner = model.base_model if isinstance(model, PeftModel | PeftMixedModel) else model
    return tuner if isinstance(tuner, BaseTuner) else None


def wrap(model: Any, owner: Acceleration) -> None:
    """Give a model around the root of `owner`, and its tuner, our classes."""
    model, tuner = unwrap(model), tuner_of(model)
    if tuner is not None and not is_accelerated(tuner):
        kinds = (PassingHooks,) if SKIPS_HOOKS else ()
        tuner.__class__ = accelerated_class(type(tuner), *kinds, AcceleratedTuner)
    if tuner is not None:
        owner.wrappers.add(tuner)
    if not isinstance(model, PeftModel):
        return
    model.__dict__[OURS] = owner
    owner.wrappers.add(model)
    if not is_accelerated(model):
        model.__class__ = accelerated_class(type(model), AcceleratedModel)
    if "forward" in model.__dict__ and before_model not in model._forward_pre_hooks.values():
        # The forward on the instance calls PEFT's forward, not that of our class.
        model.register_forward_pre_hook(before_model, with_kwargs=True)


class PassingHooks:
    """The forward that a tuner's class gets if PEFT skips hooks."""

    model: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class AcceleratedTuner:
    """The methods that a tuner's class gets. The tuner merges and unloads adapters."""

    alora_kind: Any  # PEFT's class
    model: nn.Module

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        root = self.model
        result = self.alora_kind._unload_and_optionally_merge(self, *args, **kwargs)
        owner = root.__dict__.get(OURS)
        if owner is not None:  # not reached if merging raises: the model stays accelerated
            owner.detach()
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, protocol)


class AcceleratedModel:
    """The methods that the class of an accelerated PeftModel gets.

    They are copied into a subclass, as those of `AcceleratedLayer` in `layers`. A model that is
    pickled, saved or copied stays accelerated: it serves its layers again when it is loaded.
    """

    alora_kind: Any  # PEFT's class

    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.__dict__.get(OURS)
        if owner is None:  # somebody kept this method beyond `restore`
            return type(self).forward(self, *args, **kwargs)
        offsets = kwargs.pop("alora_offsets", None)
        names = kwargs.pop("adapter_names", None)
        with self._requesting(owner, names, offsets):
            return self.alora_kind.forward(self, *args, alora_offsets=SERVED_HERE, **kwargs)

    def _requesting(self, owner: Acceleration, names: Any, offsets: Any) -> Any:
        offsets = None if offsets is SERVED_HERE else offsets
        if names is None and offsets is None:
            return nullcontext()
        outer = current_request(owner.adapters)
        if names is not None:
            if self.training:
                raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
            owner.check_names(names, "adapter_names")
            return requesting(Request(owner.adapters, True, list(names), offsets=offsets))
        if outer is not None and outer.chosen:
            return requesting(Request(owner.adapters, True, outer.names, offsets=offsets))
        return requesting(Request(owner.adapters, offsets=offsets))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.__dict__.get(OURS)
        if owner is None or not owner.refresh():
            return type(self).generate(self, *args, **kwargs)
        names = kwargs.pop("adapter_names", None)
        offsets = kwargs.pop("alora_offsets", None)
        with self._requesting(owner, names, offsets):
            return self.alora_kind.generate(self, *args, alora_offsets=SERVED_HERE, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names, offsets = kwargs.get("adapter_names"), kwargs.get("alora_offsets")
        with self._requesting(self.__dict__[OURS], names, offsets):
            yield

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        check_config(adapter_name, peft_config, why_unsuited(self.__dict__[OURS].root))
        self.alora_kind.add_adapter(self, adapter_name, peft_config, *args, **kwargs)
        self.__dict__[OURS].refresh()

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        owner = self.__dict__[OURS]
        owner.refresh()
        check_arriving(adapter_name, model_id, owner.adapters.configs)
        result = self.alora_kind.load_adapter(self, model_id, adapter_name, *args, **kwargs)
        owner.refresh()
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, state, *rest = reduced(self, protocol)
        return accelerated_model, (self.alora_kind,), state, *rest

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.alora_kind.__setstate__(self, state)
        owner = self.__dict__[OURS]
        if owner.refresh():
            wrap(self, owner)
        else:
            release(self)


def accelerated_model(kind: type) -> Any:
    """An empty object of the accelerated class of `kind`; pickle and deepcopy then fill it."""
    return object.__new__(accelerated_class(kind, AcceleratedModel))
