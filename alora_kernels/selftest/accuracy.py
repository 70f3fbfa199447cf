"""When a result is right: its error is at most twice the error that PyTorch itself makes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The error may be at most so many times PyTorch's own in the same dtype. The worst element of a
# small tensor scatters by a factor of four between two right orders of summation (seen in 1 of 500
# tries), so it only has to catch what the root mean square hides: one wrong row or column.
FACTORS = {"rms": 2.0, "largest": 8.0}


def excess(got: Tensor, truth: Tensor, own: Tensor) -> str | None:
    """By how much `got` is too far from `truth`, or None; `own` is PyTorch's own result."""
    if got.shape != truth.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    for measure, norm in (("rms", _rms), ("largest", _largest)):
        error, own_error = norm(got, truth), norm(own, truth)
        # One rounding to the result's dtype is granted to all: where PyTorch happens to be exact
        # (a single active row, a zero), a multiple of nothing would ask for the impossible.
        rounding = torch.finfo(got.dtype).eps * norm(truth, None) / 2
        allowed = FACTORS[measure] * max(own_error, rounding)
        if not error <= allowed:  # NaN is wrong, too
            return (
                f"{measure} error {error:.3g}, allowed {allowed:.3g} "
                f"({FACTORS[measure]:g} times PyTorch's own)"
            )
    return None


def _rms(value: Tensor, truth: Tensor | None) -> float:
    difference = value.double() if truth is None else value.double() - truth
    return math.sqrt(float(difference.square().mean())) if difference.numel() else 0.0


def _largest(value: Tensor, truth: Tensor | None) -> float:
    difference = value.double() if truth is None else value.double() - truth
    return float(difference.abs().amax()) if difference.numel() else 0.0
