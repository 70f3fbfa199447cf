"""The record of a place in vLLM that this plugin touches, and the check that it is as expected.

Each module of the plugin lists its places in `TOUCHED` and changes them in `install()`. Before any
of them is changed, `mismatches` compares all of them with what was expected. If one is missing or
has other parameters, this vLLM was never tested, and then nothing is changed at all.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

MARK = "__alora_original__"


@dataclass(frozen=True)
class Touch:
    """A function of vLLM.

    `name` is dotted, `package.module.function` or `package.module.Class.method`. `signature` is
    what `signature(function)` returns for the tested versions: parameter names and defaults, no
    annotations. `reason` says why the plugin needs the place, for the docs and the warning.
    """

    name: str
    signature: str
    reason: str


def find(name: str) -> tuple[Any, str, Any]:
    """The module or class that holds `name`, the attribute's own name, and its raw value there.

    The raw value of a class or static method is its descriptor. Raises LookupError if it is
    missing.
    """
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise LookupError(f"importing the module of {name} failed: {error}") from error
            continue
        except Exception as error:
            raise LookupError(f"importing the module of {name} failed: {error!r}") from error
        try:
            for part in parts[count:-1]:
                owner = getattr(owner, part)
            return owner, parts[-1], inspect.getattr_static(owner, parts[-1])
        except AttributeError as error:
            raise LookupError(f"there is no {name}: {error}") from error
    raise LookupError(f"there is no module of {name}")


def function_of(value: Any) -> Any:
    """The function inside a class method, a static method or a property."""
    if isinstance(value, property):
        return value.fget
    return getattr(value, "__func__", value)


def original(function: Any) -> Any:
    """vLLM's own function, also when the plugin has replaced it."""
    return getattr(function, MARK, function)


def signature(function: Any) -> str:
    """Parameter names, kinds and defaults of a function, without annotations."""
    found = inspect.signature(original(function), follow_wrapped=False)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return text


def mismatches(touches: Iterable[Touch]) -> list[str]:
    """What is not as expected, one line each. Nothing is changed."""
    found = []
    for touch in touches:
        try:
            _, _, value = find(touch.name)
            now = signature(function_of(value))
        except (LookupError, TypeError, ValueError) as error:
            found.append(f"{touch.name}: {error}")
            continue
        if now != touch.signature:
            found.append(f"{touch.name}: expected {touch.signature}, found {now}")
    return found


def wrap(touch: Touch, make: Callable[[Any], Any]) -> None:
    """Puts `make(function)` in the place of vLLM's function. A second call does nothing.

    `make` gets a plain function and returns one. A class method, static method or property of vLLM
    remains what it was.
    """
    owner, attribute, value = find(touch.name)
    function = function_of(value)
    if hasattr(function, MARK):
        return
    new = functools.wraps(function)(make(function))
    setattr(new, MARK, function)
    kind = type(value)
    setattr(owner, attribute, kind(new) if kind in (classmethod, staticmethod, property) else new)


def unwrap(touch: Touch) -> None:
    """Puts vLLM's own function back (for tests)."""
    owner, attribute, value = find(touch.name)
    function = original(function_of(value))
    kind = type(value)
    wrapped = kind in (classmethod, staticmethod, property)
    setattr(owner, attribute, kind(function) if wrapped else function)
