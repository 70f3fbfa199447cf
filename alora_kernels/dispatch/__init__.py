"""Dispatch chooses the backend and the strategy of a call, from estimates and measurements."""

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
