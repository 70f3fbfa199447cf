"""Dispatch: which backend and which strategy run a problem, by estimates and measurements."""

from .choice import (
    BACKENDS,
    asked_for,
    choose,
    expected_seconds,
    forget_choices,
    model_seconds,
    problem_of,
)

__all__ = [
    "BACKENDS",
    "asked_for",
    "choose",
    "expected_seconds",
    "forget_choices",
    "model_seconds",
    "problem_of",
]
