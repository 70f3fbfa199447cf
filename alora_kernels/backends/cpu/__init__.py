"""The CPU backend: runs `delta` in place on slices of active rows.

The vendor's GEMM computes the base for all rows. The adapter's products then read the active rows
in place: a slice for each contiguous segment, a gather only for scattered masks. They add the
adapter's part to y in the epilogue of the GEMM. So y and dy are not copied, and x is not cast.

Extra memory of a training step: `xa` and `dya`, 2·(f·M·R) elements, and the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...contract import Call, Gradients, Needs, Problem, Projection
from .backward import run_backward
from .forward import one_row, run_forward

__all__ = ["CpuBackend"]


class CpuBackend:
    name = "cpu"

    def why_not_here(self) -> str | None:
        return None

    def why_not(self, problem: Problem, strategy: str) -> str | None:
        if problem.device != "cpu":
            return f"the tensors are on {problem.device}"
        if strategy != "delta":
            return "the CPU backend has the strategy 'delta' alone"
        return None

    def forward(
        self,
        call: Call,
        strategy: str,
        x: Tensor,
        projections: Sequence[Projection],
        base_outs: Sequence[Tensor] | None,
        save: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        return run_forward(call, x, projections, base_outs, save)

    def one_row(
        self, row: Tensor, projections: Sequence[Projection], scalings: Sequence[float]
    ) -> list[Tensor]:
        """The outputs `[N]` of one active row `[K]`, all in one dtype; nothing is checked."""
        return one_row(row, projections, scalings)

    def backward(
        self,
        call: Call,
        strategy: str,
        x: Tensor,
        projections: Sequence[Projection],
        xa: Tensor | None,
        dys: Sequence[Tensor],
        needs: Needs,
    ) -> Gradients:
        return run_backward(call, x, projections, xa, dys, needs)
