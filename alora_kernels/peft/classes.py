"""Classes that take the place of a live object's class, so that the object stays the same."""

from __future__ import annotations

import inspect
import types
from typing import Any

_classes: dict[type, type] = {}


def accelerated_class(kind: type, methods: type) -> type:
    """A subclass of `kind` under the same name, with the functions of `methods`.

    Code that looks classes up by name (FSDP's wrapping, saved architectures) goes on finding it.
    """
    found = _classes.get(kind)
    if found is None:
        fields = {k: v for k, v in vars(methods).items() if callable(v)}
        fields |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        forward = fields["forward"]  # one function for each kind, for a signature of its own
        forward = types.FunctionType(forward.__code__, forward.__globals__, "forward")
        forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
        fields |= {"forward": forward, "alora_kind": kind}
        found = _classes[kind] = type(kind.__name__, (kind,), fields)
    return found


def is_accelerated(module: Any) -> bool:
    return "alora_kind" in vars(type(module))
