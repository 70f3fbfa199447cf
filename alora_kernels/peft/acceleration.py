"""Acceleration: what hangs on the root of an accelerated model, travels with it, and goes again."""

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

CHUNKING = "_prefill_chunking"  # where transformers 4.57 prefills in chunks

_lock = threading.RLock()  # one look at a time: another thread's forward waits for it


class Acceleration:
    """Hooks and methods on `root`, the model whose forward takes tokens.

    Attributes:
        adapters: the adapters and layers of `root`.
        forwards: what happens around each forward of `root`.
        wrappers: the PeftModels around `root` that are served too.
        seen: at which of `watch.changes()` the model was last looked at; None: never.
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
        """Hang onto `root`: its forward hooks, and the methods that have to know of a call."""
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
        """Undo the acceleration: the model, and the PeftModels around it, are as before."""
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
        """Undo what `attach` put into the instance, unless others have put theirs there since."""
        for name, before in self.methods.items():
            now = self.root.__dict__.get(name)
            if getattr(now, "__self__", getattr(now, "owner", None)) is not self:
                continue
            del self.root.__dict__[name]
            if before is not None:
                self.root.__dict__[name] = before

    def method(self, name: str) -> Any:
        """The method of `root` that ours took the place of."""
        before = self.methods.get(name)
        return getattr(type(self.root), name).__get__(self.root) if before is None else before

    # ------------------------------------------------------------------ a live model

    def refresh(self) -> bool:
        """Look at the model again if adapters came, changed or went; whether it is still ours."""
        if self.seen != watch.changes():
            self.look_again()
        return self.root.__dict__.get(OURS) is self

    def look_again(self) -> None:
        """Take over what came, and let go of what went, since the model was last looked at.

        Raises:
            ValueError: an adapter came that would be silently wrong (see `check_config`).
        """
        with _lock:
            seen = watch.changes()
            if self.seen == seen:  # another thread has looked
                return
            self._complete()
            before = self.adapters.refused
            watch.look_inside(self.root)
            adoption.adopt(self.adapters)
            if not self.adapters.modules:  # merged or unloaded: nothing of the model is ours now
                self.detach()
                return
            adoption.warn_of_refusals(self.adapters, before)
            self.seen = seen

    def check_names(self, names: Sequence[str], where: str) -> None:
        """Refuse adapters that no layer has."""
        self.refresh()
        adoption.check_names(self.adapters, names, where)

    def _complete(self) -> None:
        """Make what did not travel, if this one was loaded or is a copy."""
        if "adapters" not in self.__dict__:
            travelled = self.__getstate__()
            self.__init__(self.root, self.options)  # type: ignore[misc]
            self.__dict__.update(travelled)

    def __getstate__(self) -> dict[str, Any]:
        """What travels with the model; the rest is found out again before its next forward."""
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
        """Called after an exception as well."""
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
        """`root.generate` with the starts of its prompt."""
        method = self.method("generate")
        if not self.refresh():
            return method(*args, **kwargs)
        with generation(self.forwards.sequences, args, kwargs) as running:
            return running.finish(method(*args, **kwargs))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """`root.init_continuous_batching`, which `generate_batch` calls too."""
        if self.refresh():
            check_batching(self.adapters)
        return self.method("init_continuous_batching")(*args, **kwargs)

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`root.load_adapter` of transformers, which would load some adapters silently wrong."""
        name = (args[0] if args else kwargs.get("adapter_name")) or "default"
        self.refresh()
        check_arriving(name, peft_model_id, self.adapters.configs)
        result = self.method("load_adapter")(peft_model_id, *args, **kwargs)
        self.refresh()
        return result

    def prefill_in_chunks(self, *args: Any, **kwargs: Any) -> Any:
        """`root._prefill_chunking` through the hooks of `root`."""
        return getattr(type(self.root), CHUNKING)(Called(self.root), *args, **kwargs)


# torch.compile of `root` itself runs its hooks outside the graph, and would compile each of them as
# a graph of its own; of a model around `root` it takes them into the graph.
for _hook in (Acceleration.before_forward, Acceleration.after_forward):
    skip_code(_hook.__code__)


class Prepare:
    """`root.prepare_inputs_for_generation`: what it returns are the inputs of the next forward.

    transformers calls it right before each forward of a generation, and nobody else does. So the
    forward that gets these inputs is `generate`'s own, and any other is not.
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
    """A model whose `forward` is its call, hooks included."""

    def __init__(self, model: Any) -> None:
        self.model, self.forward = model, model.__call__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _skips_hooks(chunking: Any) -> bool:
    """Whether `chunking` calls the model's `forward`, past its hooks."""
    return "forward" in getattr(getattr(chunking, "__code__", None), "co_names", ())
