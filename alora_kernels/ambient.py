"""A value that holds for a block of code, in one thread or one asyncio task."""

from __future__ import annotations

import contextvars
import threading
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class _Slot(threading.local):
    # Set in the own dict of every thread, not as a default of the class. A compiler would guard a
    # graph on the missing name, and compile it again once the name is set.
    def __init__(self) -> None:
        self.value: Any = None


class Ambient(Generic[T]):
    """The innermost value that was set, or None.

    A ContextVar separates threads and asyncio tasks. A compiler cannot trace a ContextVar, so
    compiled code reads a copy that is local to the thread.
    """

    def __init__(self, name: str) -> None:
        self._variable: contextvars.ContextVar[T | None] = contextvars.ContextVar(name)
        self._slot = _Slot()

    def get(self) -> T | None:
        if torch.compiler.is_compiling():
            return self._slot.value  # type: ignore[no-any-return]
        return self._variable.get(None)

    def set(self, value: T | None) -> None:
        self._slot.value = value
        if not torch.compiler.is_compiling():
            self._variable.set(value)
