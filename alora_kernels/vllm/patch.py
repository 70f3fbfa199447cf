"""The record of a place in vLLM that this plugin touches, and the check that all are as expected.

Each module of the plugin lists its places in `TOUCHED` and changes them in `install()`. Before any
is changed, `mismatches` compares every place with what was expected: one that is missing or has
other parameters means that this vLLM was never tested, and then nothing is changed at all.
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
    """The module or class that holds `name`, the attribute, and the attribute's raw value there.

    A class or static method comes as its descriptor. Raises LookupError where there is none.
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
    """vLLM's own function, behind what the plugin may have put in its place."""
    return getattr(function, MARK, function)


def signature(function: Any) -> str:
    """Parameter names, kinds and defaults of a function, without annotations."""
    found = inspect.signature(original(function), follow_wrapped=False)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return text


def mismatches(touches: Iterable[Touch]) -> list[str]:
    """What is not as expected, one line each; empty when all is well. Changes nothing."""
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
    """Puts `make(function)` in the place of vLLM's function; the second time, does nothing.

    `make` gets the plain function and returns a plain function; a class or static method stays one.
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
