"""A value that holds for a block of code, in one thread or one asyncio task."""

from __future__ import annotations

import contextvars
import threading
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class _Slot(threading.local):
    # Set for each thread, not a default of the class: a graph that is traced while the name is
    # missing from the thread's own dict is guarded by its absence, and would be made again later.
    def __init__(self) -> None:
        self.value: Any = None


class Ambient(Generic[T]):
    """The innermost value that was set, or None.

    A ContextVar is right across threads and asyncio tasks. A compiler cannot trace one, so compiled
    code reads a copy that is local to the thread.
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
