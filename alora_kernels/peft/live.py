"""An acceleration as a part of a live model: what hangs on its root, travels, and goes again."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from ..contract import Options
from . import adoption, watch
from .adopted import OURS
from .generation import CHUNKING, Called, Prepare, check_batching, generation, skips_hooks
from .refusal import check_arriving


class LiveModel:
    """The part of an `Acceleration` that knows its model.

    Attributes:
        root: the transformers model (or any module) that holds the LoRA layers.
        options: passed to every op.
        layers: every LoRA layer, by its name in `root`.
        served: the names of those that run our forward.
        refused: the names of the others, with the reasons.
        adopted: all modules that hold adapters: these layers, modules that an adapter trains as a
            whole (`modules_to_save`), layers of other methods.
        wrappers: the PeftModels around `root` that are served too.
        seen: at which of `watch.changes()` the model was last looked at; None: never.
    """

    before_forward: Any
    after_forward: Any

    def __init__(self, root: nn.Module, options: Options) -> None:
        self.root, self.options = root, options
        self.layers: dict[str, Any] = {}
        self.served: set[str] = set()
        self.refused: dict[str, str] = {}
        self.adopted: set[nn.Module] = set()
        self.inner_configs: dict[str, Any] = {}
        self.wrappers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.seen: int | None = None
        self.handles: list[Any] = []
        self.methods: dict[str, Any] = {}
        self.checkpointing: list[nn.Module] = []
        self.beside: set[str] = set()  # layers outside the tokens that were spoken of
        watch.begin()

    @property
    def configs(self) -> dict[str, Any]:
        own: dict[str, Any] = getattr(self.root, "peft_config", {})
        return {**self.inner_configs, **own} if self.inner_configs else own

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
            "prepare_inputs_for_generation": Prepare(self),  # type: ignore[arg-type]
            "init_continuous_batching": self.init_continuous_batching,
        }
        mine = {name: method for name, method in mine.items() if hasattr(kind, name)}
        if skips_hooks(getattr(kind, CHUNKING, None)):
            mine[CHUNKING] = self.prefill_in_chunks
        self.methods = {name: root.__dict__.get(name) for name in mine}
        root.__dict__.update(mine)

    def give_back_methods(self) -> None:
        """Undo what `attach` put into the instance, unless others have put theirs there since."""
        for name, before in self.methods.items():
            now = self.root.__dict__.get(name)
            if getattr(now, "__self__", getattr(now, "owner", None)) is not self:
                continue
            del self.root.__dict__[name]
            if before is not None:
                self.root.__dict__[name] = before

    def refresh(self) -> bool:
        """Look at the model again if adapters came, changed or went; whether it is still ours."""
        if self.seen != watch.changes():
            adoption.look_again(self)
        return self.root.__dict__.get(OURS) is self

    def complete(self) -> None:
        """Make what did not travel, if this one was loaded or is a copy."""
        if "layers" not in self.__dict__:
            travelled = self.__getstate__()
            self.__init__(self.root, self.options)  # type: ignore[misc]
            self.__dict__.update(travelled)

    def __getstate__(self) -> dict[str, Any]:
        """What travels with the model; the rest is found out again before its next forward."""
        return {name: self.__dict__[name] for name in ("root", "options", "handles", "methods")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, seen=None)

    def method(self, name: str) -> Any:
        """The method of `root` that ours took the place of."""
        before = self.methods.get(name)
        return getattr(type(self.root), name).__get__(self.root) if before is None else before

    # ------------------------------------------------------------------ methods of the root

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`root.generate` with the starts of its prompt."""
        method = self.method("generate")
        if not self.refresh():
            return method(*args, **kwargs)
        with generation(self, args, kwargs) as running:  # type: ignore[arg-type]
            return running.finish(method(*args, **kwargs))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """`root.init_continuous_batching`, which `generate_batch` calls too."""
        if self.refresh():
            check_batching(self)  # type: ignore[arg-type]
        return self.method("init_continuous_batching")(*args, **kwargs)

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`root.load_adapter` of transformers, which would load some adapters silently wrong."""
        name = (args[0] if args else kwargs.get("adapter_name")) or "default"
        check_arriving(name, peft_model_id, self.configs)
        result = self.method("load_adapter")(peft_model_id, *args, **kwargs)
        self.refresh()
        return result

    def prefill_in_chunks(self, *args: Any, **kwargs: Any) -> Any:
        """`root._prefill_chunking` through the hooks of `root`."""
        return getattr(type(self.root), CHUNKING)(Called(self.root), *args, **kwargs)
