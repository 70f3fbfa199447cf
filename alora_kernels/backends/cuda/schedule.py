"""What the backend would launch for a problem: its own plans, made with tensors without memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ...activation import Activation
from ...contract import Backend, Call, Needs, Problem, Projection, saved_columns
from ...cost import OLD_INSTRUCTIONS, Schedule
from .plan import Plan


@functools.lru_cache(maxsize=1024)
def schedules(problem: Problem, strategy: str, machine: tuple[int, int]) -> tuple[Schedule, ...]:
    """The GEMM of each projection; empty where the vendor's serves (`delta`, a given base).

    `machine`: multiprocessors and arch. Operands are taken to be contiguous and aligned.
    """
    found = []
    for plan in plans(problem, strategy, machine):
        if plan.tile == (0, 0):
            continue
        full = "sm90" in plan.kernel or problem.arch not in OLD_INSTRUCTIONS
        splits = plan.grid[1] if "decode" in plan.kernel else 1
        kind = (
            "decode" if "decode" in plan.kernel else "fused" if "fused" in plan.kernel else "gemm"
        )
        found.append(Schedule(kind, *plan.tile, full, splits))
    return tuple(found)


def plans(problem: Problem, strategy: str, machine: tuple[int, int]) -> list[Plan]:
    """All launches of the problem's pass, in order."""
    from .backend import CudaBackend

    sent: list[Plan] = []
    backend: Backend = CudaBackend(lambda plan, fields: sent.append(plan), machine)
    rows, active, dtype = problem.rows, problem.active, problem.dtype

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    activation = Activation(
        empty(rows, dtype=torch.int32), empty(active, dtype=torch.int32),
        empty(1, dtype=torch.int32), active, active, (),
    )  # fmt: skip
    projections = [
        Projection(
            None if problem.base_given else empty(n, problem.in_features), None,
            empty(r, problem.in_features, dtype=problem.adapter_dtype),
            empty(n, r, dtype=problem.adapter_dtype), None,
        )
        for n, r in zip(problem.out_features, problem.ranks)
    ]  # fmt: skip
    count = len(projections)
    dropout = (0.5, empty(1, dtype=torch.int64)) if problem.dropout else (0.0, None)
    call = Call(activation, (1.0,) * count, *dropout)
    x = empty(rows, problem.in_features)
    outs: Sequence[Any] = [empty(rows, n) for n in problem.out_features]
    if problem.backward:
        xa = empty(rows, saved_columns(problem.ranks)[1])
        needs = Needs(True, (True,) * count, (True,) * count, (False,) * count)
        backend.backward(call, strategy, x, projections, xa, outs, needs)
    else:
        backend.forward(call, strategy, x, projections, outs if problem.base_given else None, False)
    return sent
