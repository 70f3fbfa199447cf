"""Makes subclasses that replace the class of a live object, so that the object itself stays."""

from __future__ import annotations

import inspect
import types
from typing import Any

_classes: dict[tuple[type, tuple[type, ...]], type] = {}


def accelerated_class(kind: type, *methods: type) -> type:
    """A subclass of `kind` with the same name, and the functions and properties of `methods`.

    Code that looks up classes by name (FSDP's wrapping, saved architectures) still finds it.
    """
    found = _classes.get((kind, methods))
    if found is None:
        fields = {
            name: value
            for holder in methods
            for name, value in vars(holder).items()
            if callable(value) or isinstance(value, property)
        }
        fields |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        forward = fields.get("forward")
        if forward is not None:  # a copy for each kind, because its signature is that of the kind
            forward = types.FunctionType(forward.__code__, forward.__globals__, "forward")
            forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
            fields["forward"] = forward
        fields["alora_kind"] = kind
        known = kind.forward  # type: ignore[attr-defined]
        fields["alora_known"] = staticmethod(lambda: known)
        found = _classes[kind, methods] = type(kind.__name__, (kind,), fields)
    return found


def is_accelerated(module: Any) -> bool:
    return hasattr(type(module), "alora_kind")


def plain_class(kind: type) -> type:
    """The class that `kind` was before `accelerated_class`.

    If others have made a subclass of the accelerated class (FSDP2 does), the same subclass is made
    of the plain class.
    """
    if "alora_kind" in vars(kind):
        return kind.alora_kind  # type: ignore[attr-defined, no-any-return]
    if not hasattr(kind, "alora_kind"):
        return kind
    bases = tuple([plain_class(base) for base in kind.__bases__])
    fields = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind.__name__, bases, fields)
