"""Classes that take the place of a live object's class, so that the object stays the same."""

from __future__ import annotations

import inspect
import types
from typing import Any

_classes: dict[tuple[type, tuple[type, ...]], type] = {}


def accelerated_class(kind: type, *methods: type) -> type:
    """A subclass of `kind` under the same name, with the functions and properties of `methods`.

    Code that looks classes up by name (FSDP's wrapping, saved architectures) goes on finding it.
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
        if forward is not None:  # one function for each kind, for a signature of its own
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
    """`kind` without what `accelerated_class` added.

    Others may have made a subclass of an accelerated class since (FSDP2 does): it is made again
    over the plain one.
    """
    if "alora_kind" in vars(kind):
        return kind.alora_kind  # type: ignore[attr-defined, no-any-return]
    if not hasattr(kind, "alora_kind"):
        return kind
    bases = tuple([plain_class(base) for base in kind.__bases__])
    fields = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind.__name__, bases, fields)
