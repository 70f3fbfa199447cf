"""What is said once: a process hears each warning of a kind a single time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable

_said: set[Hashable] = set()


def first_time(*what: Hashable) -> bool:
    """Whether `what` is said for the first time in this process."""
    if what in _said:
        return False
    _said.add(what)
    return True


def warn_once(text: str, *what: Hashable, stacklevel: int = 2) -> None:
    """Warn of `what` the first time; without `what`, of this text."""
    if first_time("warning", *(what or (text,))):
        warnings.warn(text, stacklevel=stacklevel + 1)


def log_once(logger: logging.Logger, text: str, *what: Hashable) -> None:
    """Log a warning about `what` the first time; without `what`, this text."""
    if first_time("log", *(what or (text,))):
        logger.warning(text)


def forget() -> None:
    """Say everything again (for tests)."""
    _said.clear()
