"""Gives each kind of warning once per process."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable

_said: set[Hashable] = set()


def first_time(*what: Hashable) -> bool:
    """Whether this is the first call with `what` in this process."""
    if what in _said:
        return False
    _said.add(what)
    return True


def warn_once(text: str, *what: Hashable, stacklevel: int = 2) -> None:
    """Warn with `text`, once for each `what` (by default for each text)."""
    if first_time("warning", *(what or (text,))):
        warnings.warn(text, stacklevel=stacklevel + 1)


def log_once(logger: logging.Logger, text: str, *what: Hashable) -> None:
    """Log `text` as a warning, once for each `what` (by default for each text)."""
    if first_time("log", *(what or (text,))):
        logger.warning(text)


def forget() -> None:
    """Forget which warnings were given (for tests)."""
    _said.clear()
