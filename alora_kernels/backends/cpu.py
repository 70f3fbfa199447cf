"""The CPU backend: `delta` in place on slices of active rows.

The vendor's GEMM computes the base for all rows. The adapter then reads its active rows where they
lie (a slice for each contiguous segment, a gather only for scattered masks) and adds its part to y
in the GEMM's own epilogue: no copy of y or dy, no cast of x, no search.

Extra memory of a training step: `xa` and `dya`, 2·(f·M·R) elements, and the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation import Activation, segments_of
from ..casting import cast_frozen
from . import Call, Gradients, Needs, Problem, Projection, saved_columns, saved_dtype
from .philox import DropMask

Selector = slice | Tensor
SHORT_SEGMENT = 32  # mean rows of a segment below which one gather beats a GEMM for each segment
FEW_SEGMENTS = 16  # as long as there are no more than these, slices are always used


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
        if base_outs is None:
            ys = [F.linear(x, p.weight, p.bias) for p in projections]  # type: ignore[arg-type]
        else:
            ys = list(base_outs)
        parts, count = _active_parts(call.activation)
        begins, columns = saved_columns([p.lora_a.shape[0] for p in projections], "cpu")
        dtype = saved_dtype(x.dtype, call.adapter_precision)
        rows = call.activation.num_active if call.activation.num_active is not None else len(x)
        xa = x.new_empty((rows if save else count, columns), dtype=dtype)  # first `count` rows used
        if count == 0:
            return ys, xa if save else None
        lora_a = [cast_frozen(p.lora_a, dtype) for p in projections]  # [R, K] each
        lora_b = [cast_frozen(p.lora_b, dtype) for p in projections]  # [N, R] each
        kept = 1.0 - call.dropout_p
        for begin, end, rows_x, _ in _inputs(call, x, parts, dtype):
            for a, column, scaling in zip(lora_a, begins, call.scalings):
                out = xa[begin:end, column : column + a.shape[0]]
                torch.addmm(out, rows_x, a.t(), beta=0, alpha=scaling / kept, out=out)
        for selector, begin, end in parts:
            for p, y, b, column, scaling in zip(projections, ys, lora_b, begins, call.scalings):
                part = xa[begin:end, column : column + b.shape[1]]
                offset = None if p.lora_bias is None else p.lora_bias.to(dtype) * scaling
                _add_product(y, selector, part, b.t(), offset)
        return ys, xa if save else None

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
        parts, count = _active_parts(call.activation)
        begins, columns = saved_columns([p.lora_a.shape[0] for p in projections], "cpu")
        dys = [_row_major(dy) for dy in dys]
        dx = _base_dx(call, x, projections, dys, parts) if needs.x else None
        if count == 0:
            return Gradients(
                dx,
                [_zeros(p.lora_a, need) for p, need in zip(projections, needs.lora_a)],
                [_zeros(p.lora_b, need) for p, need in zip(projections, needs.lora_b)],
                [_zeros(p.lora_bias, need) for p, need in zip(projections, needs.lora_bias)],
            )
        dtype = saved_dtype(x.dtype, call.adapter_precision)
        kept = 1.0 - call.dropout_p
        dya = x.new_empty((count, columns), dtype=dtype) if needs.x or any(needs.lora_a) else None
        grad_b = [_Sum(len(parts)) for _ in projections]
        grad_bias = [_Sum(len(parts)) for _ in projections]
        for selector, begin, end in parts:
            for i, (p, dy) in enumerate(zip(projections, dys)):
                rank, scaling = p.lora_a.shape[0], call.scalings[i]
                wants_dya = dya is not None and (needs.x or needs.lora_a[i])
                if not (wants_dya or needs.lora_b[i] or needs.lora_bias[i]):
                    continue
                rows_dy = dy[selector].to(dtype)  # [n, N]
                columns_i = slice(begins[i], begins[i] + rank)
                if wants_dya:
                    assert dya is not None
                    out = dya[begin:end, columns_i]
                    b = cast_frozen(p.lora_b, dtype)
                    torch.addmm(out, rows_dy, b, beta=0, alpha=scaling / kept, out=out)
                if needs.lora_b[i]:
                    assert xa is not None
                    grad_b[i].add(xa[begin:end, columns_i].t() @ rows_dy)  # [R, N]
                if needs.lora_bias[i]:
                    grad_bias[i].add(rows_dy.sum(0, dtype=torch.promote_types(dtype, torch.float32)))
        grad_a = [_Sum(2) for _ in projections]
        if dya is not None:
            lora_a = [cast_frozen(p.lora_a, dtype) for p in projections]
            inputs = _inputs(call, x, parts, dtype, values=any(needs.lora_a))
            for begin, end, rows_x, drop in inputs:
                for i, (a, column) in enumerate(zip(lora_a, begins)):
                    rows_dya = dya[begin:end, column : column + a.shape[0]]  # [n, R]
                    if needs.lora_a[i]:
                        grad_a[i].add(rows_dya.t() @ rows_x)  # [R, K]
                    if dx is not None and drop is not None:
                        masked = (rows_dya @ a).masked_fill_(drop, 0)
                        _add_rows(dx, parts, begin, end, masked)
            if dx is not None and call.dropout_p == 0.0:
                for selector, begin, end in parts:
                    for a, column in zip(lora_a, begins):
                        _add_product(dx, selector, dya[begin:end, column : column + a.shape[0]], a)
        return Gradients(
            dx,
            [g.result(p.lora_a) if need else None for g, p, need in zip(grad_a, projections, needs.lora_a)],
            [g.result(p.lora_b, transpose=True) if need else None for g, p, need in zip(grad_b, projections, needs.lora_b)],
            [
                g.result(p.lora_bias, s) if need and p.lora_bias is not None else None
                for g, p, s, need in zip(grad_bias, projections, call.scalings, needs.lora_bias)
            ],
        )
