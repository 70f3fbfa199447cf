"""Attaches our hooks and methods to the root of a model, and detaches them again."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code

from ..contract import Options
from . import adoption, checkpointing, watch
from .adapters import OURS, Adapters
from .generate import check_batching, generation
from .hooks import Forwards
from .requests import current_request
from .support import check_arriving

CHUNKING = "_prefill_chunking"  # the method with which transformers 4.57 prefills in chunks

_lock = threading.RLock()  # one look at a time: another thread's forward waits for it


class Acceleration:
    """Our hooks and methods on `root`, the model whose forward takes the tokens.

    Attributes:
        root: the model. It keeps this object in the attribute `OURS`.
        options: passed to every op.
        adapters: the adapters and layers of `root`.
        forwards: runs before and after each forward of `root`.
        wrappers: the PeftModels and tuners around `root` whose class is ours.
        seen: the value of `watch.changes()` when the layers were last looked at; None: never.
        handles: the handles of the forward hooks.
        methods: what `root` had in its instance under the names of our methods.
    """

    def __init__(self, root: nn.Module, options: Options) -> None:
        self.root, self.options = root, options
        self.adapters = Adapters(root, options)
        self.forwards = Forwards(self.adapters)
        self.wrappers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.seen: int | None = None
        self.handles: list[Any] = []
        self.methods: dict[str, Any] = {}
        watch.begin()

    # ------------------------------------------------------------------ the root

    def attach(self) -> None:
        """Set the forward hooks of `root`, and replace the methods that we must run through."""
        root, kind = self.root, type(self.root)
        root.__dict__[OURS] = self
        self.handles = [
            root.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            root.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
        ]
        mine: dict[str, Any] = {
            "generate": self.generate,
            "load_adapter": self.load_adapter,
            "prepare_inputs_for_generation": Prepare(self),
            "init_continuous_batching": self.init_continuous_batching,
        }
        mine = {name: method for name, method in mine.items() if hasattr(kind, name)}
        if _skips_hooks(getattr(kind, CHUNKING, None)):
            mine[CHUNKING] = self.prefill_in_chunks
        self.methods = {name: root.__dict__.get(name) for name in mine}
        root.__dict__.update(mine)

    def detach(self) -> None:
        """Undo the acceleration of the model and of the PeftModels around it."""
        with _lock:
            root = self.root
            if root.__dict__.get(OURS) is not self:
                return
            self._complete()
            del root.__dict__[OURS]
            for handle in self.handles:
                handle.remove()
            self._give_back_methods()
            adoption.give_back(self.adapters)
            for model in list(self.wrappers):
                model.__dict__.pop(OURS, None)
                adoption.release(model)
            watch.note_change()  # for another accelerated model that shares layers with this one

    def _give_back_methods(self) -> None:
        """Remove our methods from the instance, except where somebody has replaced them since."""
        for name, before in self.methods.items():
            now = self.root.__dict__.get(name)
            if getattr(now, "__self__", getattr(now, "owner", None)) is not self:
                continue
            del self.root.__dict__[name]
            if before is not None:
                self.root.__dict__[name] = before

    def method(self, name: str) -> Any:
        """The method of `root` that our method replaced."""
        before = self.methods.get(name)
        return getattr(type(self.root), name).__get__(self.root) if before is None else before

    # ------------------------------------------------------------------ a live model

    def refresh(self) -> bool:
        """Look at the layers again if adapters have changed; returns whether the model is ours."""
        if self.seen != watch.changes():
            self.look_again()
        return self.root.__dict__.get(OURS) is self

    def look_again(self) -> None:
        """Take over modules that were added since the last look, and release those removed.

        Raises:
            ValueError: a new adapter would give wrong results (see `check_config`).
        """
        with _lock:
            seen = watch.changes()
            if self.seen == seen:  # another thread has looked
                return
            self._complete()
            before = self.adapters.refused
            watch.look_inside(self.root)
            adoption.adopt(self.adapters)
            if not self.adapters.modules:  # all adapters were merged or unloaded
                self.detach()
                return
            adoption.warn_of_refusals(self.adapters, before)
            self.seen = seen

    def check_names(self, names: Sequence[str], where: str) -> None:
        """Refuse adapters that no layer has."""
        self.refresh()
        adoption.check_names(self.adapters, names, where)

    def _complete(self) -> None:
        """Rebuild the attributes that are not pickled, if this object was loaded or copied."""
        if "adapters" not in self.__dict__:
            travelled = self.__getstate__()
            self.__init__(self.root, self.options)  # type: ignore[misc]
            self.__dict__.update(travelled)

    def __getstate__(self) -> dict[str, Any]:
        """The attributes that are saved and copied; the others are rebuilt before a forward."""
        return {name: self.__dict__[name] for name in ("root", "options", "handles", "methods")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, seen=None)

    # ------------------------------------------------------------------ forward hooks of the root

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if torch.compiler.is_compiling():
            self.forwards.enter(args, kwargs)
        else:
            self._enter_eagerly(module, args, kwargs)

    def after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Runs after an exception too."""
        if torch.compiler.is_compiling():
            self.forwards.leave(args, kwargs, output)
        else:
            self._leave_eagerly(args, kwargs, output)

    @torch.compiler.disable
    def _enter_eagerly(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self.refresh():
            return  # all its adapters were merged or unloaded
        if module.training:
            checkpointing.watch(self.adapters.checkpointing)
        self.forwards.enter(args, kwargs)

    @torch.compiler.disable
    def _leave_eagerly(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.forwards.leave(args, kwargs, output)

    # ------------------------------------------------------------------ methods of the root

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`root.generate`, with the starts of its adapters."""
        method = self.method("generate")
        if not self.refresh():
            return method(*args, **kwargs)
        with generation(self.forwards.sequences, args, kwargs) as running:
            return running.finish(method(*args, **kwargs))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """`root.init_continuous_batching` after a check; `generate_batch` calls it too."""
        if self.refresh():
            check_batching(self.adapters)
        return self.method("init_continuous_batching")(*args, **kwargs)

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`root.load_adapter` of transformers after a check: it loads some adapters wrongly."""
        name = (args[0] if args else kwargs.get("adapter_name")) or "default"
        self.refresh()
        check_arriving(name, peft_model_id, self.adapters.configs)
        result = self.method("load_adapter")(peft_model_id, *args, **kwargs)
        self.refresh()
        return result

    def prefill_in_chunks(self, *args: Any, **kwargs: Any) -> Any:
        """`root._prefill_chunking`, with calls of `root` that run its hooks."""
        return getattr(type(self.root), CHUNKING)(Called(self.root), *args, **kwargs)


# If `root` itself is compiled, torch runs its hooks outside the graph and would compile each hook
# on its own; `skip_code` prevents that. If a model around `root` is compiled, the hooks are traced
# into its graph.
for _hook in (Acceleration.before_forward, Acceleration.after_forward):
    skip_code(_hook.__code__)


class Prepare:
    """`root.prepare_inputs_for_generation`, which returns the inputs of the next forward.

    Only transformers calls it, right before each forward of a generation. So a forward that gets
    these inputs belongs to `generate`, and any other forward does not.
    """

    def __init__(self, owner: Acceleration) -> None:
        self.owner = owner

    @property
    def __signature__(self) -> inspect.Signature:  # which transformers reads
        return inspect.signature(self.owner.method("prepare_inputs_for_generation"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.owner.method("prepare_inputs_for_generation")(*args, **kwargs)
        request = current_request(self.owner.adapters) if self.owner.refresh() else None
        if request is not None and request.generation is not None and isinstance(inputs, dict):
            request.generation.expect(kwargs.get("input_ids", args[0] if args else None), inputs)
        return inputs


class Called:
    """A model whose `forward` is its `__call__`, so that hooks run."""

    def __init__(self, model: Any) -> None:
        self.model, self.forward = model, model.__call__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _skips_hooks(chunking: Any) -> bool:
    """Whether `chunking` calls the model's `forward` directly, which skips the hooks."""
    return "forward" in getattr(getattr(chunking, "__code__", None), "co_names", ())
