"""Loads the extension `alora_kernels._cuda` (csrc/binding.cpp) and checks that it fits."""

from __future__ import annotations

from typing import Any

from .params import exported

_agreed: Any = None  # the module that passed the check last


def extension() -> Any:
    """The module `_cuda`.

    Raises:
        ImportError: it was not built, does not load, or was built from other sources.
    """
    global _agreed
    from ... import _cuda

    if _cuda is not _agreed:
        odd = disagreement(_cuda)
        if odd is not None:
            raise ImportError(f"it was built from other sources: {odd}; build it again")
        _agreed = _cuda
    return _cuda


def disagreement(module: Any) -> str | None:
    """The first difference between the kernel parameters in `module` and in `params`, or None."""
    for name, mine in exported().items():
        other = getattr(module, name, None)
        if mine != other:
            return _difference(name, mine, other)
    return None


def _difference(name: str, mine: Any, other: Any) -> str:
    """Describe where two values differ, down to the innermost dictionary entry."""
    if isinstance(mine, dict) and isinstance(other, dict):
        for key in sorted(mine.keys() | other.keys()):
            if mine.get(key) != other.get(key):
                return _difference(f"{name}.{key}", mine.get(key), other.get(key))
    if isinstance(mine, tuple) and isinstance(other, tuple) and len(mine) == len(other):
        for own, its in zip(reversed(mine), reversed(other)):
            if own != its and isinstance(own, dict):
                return _difference(name, own, its)
    return f"{name} is {mine} in Python and {other} in C++"
