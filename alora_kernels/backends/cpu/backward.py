"""The backward pass of `delta` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...contract import Call, Gradients, Needs, Projection, saved_columns, saved_dtype
from .rows import (
    Part,
    add_product,
    add_rows,
    block_of,
    chunks,
    dropped,
    parts_of,
    scaled_product,
    take,
)

SLICE = 8  # rows of a gradient that are widened or transposed at a time


def run_backward(
    call: Call,
    x: Tensor,
    projections: Sequence[Projection],
    xa: Tensor | None,
    dys: Sequence[Tensor],
    needs: Needs,
) -> Gradients:
    parts = parts_of(call.activation)
    dx = _base_dx(call, x, projections, dys, parts) if needs.x else None
    dya = [_dya(call, projections, i, dy, parts, needs) for i, dy in enumerate(dys)]

    def grads_of_b() -> list[Tensor | None]:
        return [
            _grad_b(projections, i, dy, parts, xa) if needs.lora_b[i] else None
            for i, dy in enumerate(dys)
        ]

    # dB needs scratch memory for its transpose, and dA with dropout needs it for the masked rows.
    # The order below needs it before the other gradient is allocated, which lowers the peak.
    if call.options.dropout_p == 0.0:
        lora_b = grads_of_b()
        lora_a = _grad_a_and_dx(call, x, projections, parts, dya, dx, needs)
    else:
        lora_a = _grad_a_and_dx(call, x, projections, parts, dya, dx, needs)
        del dya
        lora_b = grads_of_b()
    lora_bias = [
        _grad_bias(call, p, i, dy, parts) if needs.lora_bias[i] else None
        for i, (p, dy) in enumerate(zip(projections, dys))
    ]
    return Gradients(dx, lora_a, lora_b, lora_bias)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums of several parts: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


class _Sum:
    """Adds partial gradients in the order of the calls; two or more are added in `_wide`."""

    total: Tensor | None = None

    def add(self, part: Tensor) -> None:
        if self.total is None:
            self.total = part
        else:
            self.total = self.total.to(_wide(part.dtype))
            # In slices, because torch makes a wide copy of a whole 16-bit operand before it adds.
            for total, piece in zip(self.total.split(SLICE), part.split(SLICE)):
                total.add_(piece)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """total += left · right. Without a temporary if the operands have the wide dtype."""
        if self.total is not None and left.dtype == _wide(left.dtype):
            self.total.addmm_(left, right)
        else:
            self.add(left @ right)

    def result(self, parameter: Tensor) -> Tensor:
        """The sum in the parameter's dtype; zeros if nothing was added."""
        if self.total is None:
            return torch.zeros_like(parameter, requires_grad=False)
        return self.total.to(parameter.dtype)


def _dya(
    call: Call,
    projections: Sequence[Projection],
    i: int,
    dy: Tensor,
    parts: Sequence[Part],
    needs: Needs,
) -> Tensor | None:
    """scaling · dy · lora_b on active rows, `[n, R]`; None if no gradient needs it."""
    if not parts or not (needs.x or needs.lora_a[i]):
        return None
    dtype = saved_dtype(dy.dtype, call.options.adapter_precision)
    b = projections[i].lora_b.to(dtype)
    dya = dy.new_empty(parts[-1].end, _rank(projections[i]), dtype=dtype)
    factor = call.scalings[i] / (1.0 - call.options.dropout_p)
    for part in parts:
        rows = take(dy, part.rows).to(dtype)
        scaled_product(rows, b, factor, dya[part.begin : part.end])
    return dya


def _grad_b(
    projections: Sequence[Projection],
    i: int,
    dy: Tensor,
    parts: Sequence[Part],
    xa: Tensor | None,
) -> Tensor:
    """dB = dyᵀ·xa. It is computed as xaᵀ·dy, which is faster and needs less scratch memory."""
    p, total = projections[i], _Sum()
    begin = saved_columns([_rank(q) for q in projections])[0][i]
    for part in parts:
        assert xa is not None
        rows = take(dy, part.rows).to(xa.dtype)
        total.add_product(block_of(xa, part, begin, _rank(p)).t(), rows)  # [R, N]
    if total.total is None:
        return total.result(p.lora_b)
    grad = dy.new_empty(p.lora_b.shape, dtype=p.lora_b.dtype)
    # In slices, because torch needs a buffer of the whole size to transpose a whole matrix.
    for columns, rows in zip(grad.split(SLICE, 1), total.total.split(SLICE)):
        columns.copy_(rows.t())
    return grad


def _grad_bias(
    call: Call, p: Projection, i: int, dy: Tensor, parts: Sequence[Part]
) -> Tensor | None:
    if p.lora_bias is None:
        return None
    dtype = saved_dtype(dy.dtype, call.options.adapter_precision)
    total = _Sum()
    for part in parts:
        rows = take(dy, part.rows).to(dtype)
        total.add(rows.sum(0, dtype=_wide(dtype)).mul_(call.scalings[i]))
    return total.result(p.lora_bias)


def _grad_a_and_dx(
    call: Call,
    x: Tensor,
    projections: Sequence[Projection],
    parts: Sequence[Part],
    dya: Sequence[Tensor | None],
    dx: Tensor | None,
    needs: Needs,
) -> list[Tensor | None]:
    """dA = dyaᵀ·dropout(x). Also adds the adapter's part to `dx`, as both need the drop masks."""
    dtype = saved_dtype(x.dtype, call.options.adapter_precision)
    totals = [_Sum() for _ in projections]
    dropout = call.options.dropout_p > 0.0
    lora_a: list[Tensor | None] = [None] * len(projections)
    if dx is not None and not dropout:
        _add_to_dx(dx, projections, parts, dya, dtype)
    elif dx is not None:
        lora_a = [p.lora_a.to(dtype) for p in projections]
    for part, drop in chunks(call, x, parts):
        lows = [None if whole is None else whole[part.begin : part.end] for whole in dya]  # [n, R]
        for a, low in zip(lora_a, lows):
            if a is not None and low is not None and dx is not None and drop is not None:
                add_rows(dx, part.rows, (low @ a).masked_fill_(drop, 0))
        if any(needs.lora_a):
            rows_x = dropped(x, part.rows, drop, dtype)
            for total, low, wanted in zip(totals, lows, needs.lora_a):
                if wanted and low is not None:
                    total.add_product(low.t(), rows_x)  # [R, K]
            del rows_x  # frees the memory before the next chunk needs it
    return [
        total.result(p.lora_a) if wanted else None
        for total, p, wanted in zip(totals, projections, needs.lora_a)
    ]


def _add_to_dx(
    dx: Tensor,
    projections: Sequence[Projection],
    parts: Sequence[Part],
    dya: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> None:
    """dx += dya·lora_a on active rows."""
    for p, low in zip(projections, dya):
        a = p.lora_a.to(dtype)
        for part in parts:
            assert low is not None
            add_product(dx, part.rows, low[part.begin : part.end], a)


def _base_dx(
    call: Call,
    x: Tensor,
    projections: Sequence[Projection],
    dys: Sequence[Tensor],
    parts: Sequence[Part],
) -> Tensor:
    """The base's part of dx, Σ dy·weight; without `prefix_grad` on active rows alone."""
    weights = [p.weight for p in projections if p.weight is not None]
    if not weights:
        return x.new_zeros(x.shape)
    if call.options.prefix_grad:
        dx = dys[0] @ weights[0]
        for dy, weight in zip(dys[1:], weights[1:]):
            dx.addmm_(dy, weight)
        return dx
    dx = x.new_zeros(x.shape)
    for part in parts:
        for i, (dy, weight) in enumerate(zip(dys, weights)):
            if isinstance(part.rows, slice) and i == 0:
                torch.mm(take(dy, part.rows), weight, out=take(dx, part.rows))
            else:
                add_product(dx, part.rows, take(dy, part.rows), weight)
    return dx


def _rank(p: Projection) -> int:
    return p.lora_a.shape[0]
