"""The CPU backend: `delta` in place on slices of active rows.

The vendor's GEMM computes the base for all rows. The adapter then reads its active rows where they
lie (a slice for each contiguous segment, a gather only for scattered masks) and adds its part to y
in the GEMM's own epilogue: no copy of y or dy, no cast of x, no search.

Extra memory of a training step: `xa` and `dya`, 2·(f·M·R) elements, and the gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation import Activation, segments_of
from ..casting import cast_frozen
from . import Call, Gradients, Needs, Problem, Projection, saved_columns, saved_dtype
from .philox import DropMask

SHORT_SEGMENT = 32  # mean rows of a segment below which one gather beats a GEMM for each segment
FEW_SEGMENTS = 16  # as long as there are no more than these, slices are always used
SLICE = 8  # rows of a gradient that are widened or transposed at once

WHOLE = slice(None)


class Part(NamedTuple):
    """Active rows that are read and written together."""

    rows: slice | Tensor  # which rows of x and y: WHOLE, a slice, or int64 row numbers
    begin: int  # the same rows in `xa` and `dya`, which hold active rows alone
    end: int


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
        parts = _parts(call.activation)
        whole = len(parts) == 1 and parts[0].rows is WHOLE
        one_dtype = saved_dtype(x.dtype, call.adapter_precision) == x.dtype
        if whole and one_dtype and not save and call.dropout_p == 0.0:
            return _all_rows(call, x, projections, base_outs), None
        ys = _base_outputs(x, projections) if base_outs is None else list(base_outs)
        begins, columns = saved_columns([p.lora_a.shape[0] for p in projections])
        dtype = saved_dtype(x.dtype, call.adapter_precision)
        known = call.activation.num_active
        xa = x.new_empty(x.shape[0] if known is None else known, columns, dtype=dtype)
        if not parts:
            return ys, xa if save else None
        lora_a = [cast_frozen(p.lora_a, dtype, cache=not save) for p in projections]
        for part, drop in _chunks(call, x, parts):
            rows_x = _dropped(x, part.rows, drop, dtype)
            for a, column, scaling in zip(lora_a, begins, call.scalings):
                out = _block(xa, part, column, a.shape[0])
                _scaled_product(rows_x, a.t(), scaling / (1.0 - call.dropout_p), out)
        for p, y, column, scaling in zip(projections, ys, begins, call.scalings):
            b = cast_frozen(p.lora_b, dtype, cache=not save).t()  # [R, N]
            offset = None if p.lora_bias is None else p.lora_bias.detach().to(dtype) * scaling
            for part in parts:
                _add_product(y, part.rows, _block(xa, part, column, b.shape[0]), b, offset)
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
        parts = _parts(call.activation)
        dx = _base_dx(call, x, projections, dys, parts) if needs.x else None
        dya = [_dya(call, projections, i, dy, parts, needs) for i, dy in enumerate(dys)]

        def grads_of_b() -> list[Tensor | None]:
            return [
                _grad_b(projections, i, dy, parts, xa) if needs.lora_b[i] else None
                for i, dy in enumerate(dys)
            ]

        # dB needs room for its transpose, and dropout for masked rows: each while the other
        # gradient does not exist yet.
        if call.dropout_p == 0.0:
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
    """The dtype in which sums of several parts are kept."""
    return torch.promote_types(dtype, torch.float32)


class _Sum:
    """Adds partial gradients in the order they come; several of them in float32 or better."""

    total: Tensor | None = None

    def add(self, part: Tensor) -> None:
        if self.total is None:
            self.total = part
        else:
            self.total = self.total.to(_wide(part.dtype))
            # In slices, because torch widens a whole 16-bit operand before it adds it.
            for total, piece in zip(self.total.split(SLICE), part.split(SLICE)):
                total.add_(piece)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """total += left · right, without a temporary where the dtype needs none."""
        if self.total is not None and left.dtype == _wide(left.dtype):
            self.total.addmm_(left, right)
        else:
            self.add(left @ right)

    def result(self, parameter: Tensor) -> Tensor:
        """The sum in the parameter's dtype; zeros when nothing was added."""
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
    """scaling · dy · lora_b on active rows, `[n, R]`, where something is computed from it."""
    if not parts or not (needs.x or needs.lora_a[i]):
        return None
    dtype = saved_dtype(dy.dtype, call.adapter_precision)
    b = cast_frozen(projections[i].lora_b, dtype, cache=False)
    dya = dy.new_empty(parts[-1].end, _rank(projections[i]), dtype=dtype)
    factor = call.scalings[i] / (1.0 - call.dropout_p)
    for part in parts:
        rows = _take(dy, part.rows).to(dtype)
        _scaled_product(rows, b, factor, dya[part.begin : part.end])
    return dya


def _grad_b(
    projections: Sequence[Projection],
    i: int,
    dy: Tensor,
    parts: Sequence[Part],
    xa: Tensor | None,
) -> Tensor:
    """dB = dyᵀ·xa, computed as xaᵀ·dy: the few rows first are faster and need less scratch."""
    p, total = projections[i], _Sum()
    begin = saved_columns([_rank(q) for q in projections])[0][i]
    for part in parts:
        assert xa is not None
        rows = _take(dy, part.rows).to(xa.dtype)
        total.add_product(_block(xa, part, begin, _rank(p)).t(), rows)  # [R, N]
    if total.total is None:
        return total.result(p.lora_b)
    grad = dy.new_empty(p.lora_b.shape, dtype=p.lora_b.dtype)
    # In slices, because torch transposes a whole matrix through a buffer.
    for columns, rows in zip(grad.split(SLICE, 1), total.total.split(SLICE)):
        columns.copy_(rows.t())
    return grad


def _grad_bias(
    call: Call, p: Projection, i: int, dy: Tensor, parts: Sequence[Part]
) -> Tensor | None:
    if p.lora_bias is None:
        return None
    dtype = saved_dtype(dy.dtype, call.adapter_precision)
    total = _Sum()
    for part in parts:
        rows = _take(dy, part.rows).to(dtype)
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
    """What pairs dya with the inputs: dA = dyaᵀ·x, and the adapter's part of dx, added to it."""
    dtype = saved_dtype(x.dtype, call.adapter_precision)
    totals = [_Sum() for _ in projections]
    dropout = call.dropout_p > 0.0
    lora_a: list[Tensor | None] = [None] * len(projections)
    if dx is not None and not dropout:
        _add_to_dx(dx, projections, parts, dya, dtype)
    elif dx is not None:
        lora_a = [cast_frozen(p.lora_a, dtype, cache=False) for p in projections]
    for part, drop in _chunks(call, x, parts):
        lows = [None if whole is None else whole[part.begin : part.end] for whole in dya]  # [n, R]
        for a, low in zip(lora_a, lows):
            if a is not None and low is not None and dx is not None and drop is not None:
                _add_rows(dx, part.rows, (low @ a).masked_fill_(drop, 0))
        if any(needs.lora_a):
            rows_x = _dropped(x, part.rows, drop, dtype)
            for total, low, wanted in zip(totals, lows, needs.lora_a):
                if wanted and low is not None:
                    total.add_product(low.t(), rows_x)  # [R, K]
            del rows_x  # before the next chunk's product is made
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
        a = cast_frozen(p.lora_a, dtype, cache=False)
        for part in parts:
            assert low is not None
            _add_product(dx, part.rows, low[part.begin : part.end], a)


def _base_dx(
    call: Call,
    x: Tensor,
    projections: Sequence[Projection],
    dys: Sequence[Tensor],
    parts: Sequence[Part],
) -> Tensor:
    """The base's part of dx, Σ dy·weight; on active rows alone without `prefix_grad`."""
    weights = [p.weight for p in projections if p.weight is not None]
    if not weights:
        return x.new_zeros(x.shape)
    if call.prefix_grad:
        dx = dys[0] @ weights[0]
        for dy, weight in zip(dys[1:], weights[1:]):
            dx.addmm_(dy, weight)
        return dx
    dx = x.new_zeros(x.shape)
    for part in parts:
        for i, (dy, weight) in enumerate(zip(dys, weights)):
            if isinstance(part.rows, slice) and i == 0:
                torch.mm(_take(dy, part.rows), weight, out=_take(dx, part.rows))
            else:
                _add_product(dx, part.rows, _take(dy, part.rows), weight)
    return dx


def _base_outputs(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    return [F.linear(x, p.weight, p.bias) for p in projections]  # type: ignore[arg-type]


def _all_rows(
    call: Call, x: Tensor, projections: Sequence[Projection], base_outs: Sequence[Tensor] | None
) -> list[Tensor]:
    """Decoding's short way: every row is active, nothing is saved, one dtype is computed in."""
    dtype = x.dtype
    # One row: matrix times vector needs no transposes; in 16 bits torch is faster without it.
    vector = x.shape[0] == 1 and base_outs is None and dtype.itemsize >= 4
    if vector:
        row = x.reshape(-1)
        ys = [_base_vector(p, row) for p in projections]
    else:
        ys = _base_outputs(x, projections) if base_outs is None else list(base_outs)
    for p, y, scaling in zip(projections, ys, call.scalings):
        a, b = cast_frozen(p.lora_a, dtype), cast_frozen(p.lora_b, dtype)
        if vector:
            y.addmv_(b, a.mv(row), alpha=scaling)
        else:
            y.addmm_(torch.mm(x, a.t()), b.t(), alpha=scaling)
        if p.lora_bias is not None:
            y.add_(p.lora_bias.to(dtype), alpha=scaling)
    return [y.view(1, -1) for y in ys] if vector else ys


def _base_vector(p: Projection, row: Tensor) -> Tensor:
    """The base of one row `[K]`, `[N]`."""
    assert p.weight is not None
    return p.weight.mv(row) if p.bias is None else torch.addmv(p.bias, p.weight, row)


def _rank(p: Projection) -> int:
    return p.lora_a.shape[0]


# The parts of an activation, found by its first layer and read by all others.
_known_parts: weakref.WeakKeyDictionary[Activation, list[Part]] = weakref.WeakKeyDictionary()


def _parts(activation: Activation) -> list[Part]:
    """The active rows as slices, or as one gather when they lie scattered."""
    parts = _known_parts.get(activation)
    if parts is None:
        parts = _known_parts[activation] = _find_parts(activation)
    return parts


def _find_parts(activation: Activation) -> list[Part]:
    segments = segments_of(activation)
    count = sum(stop - start for start, stop in segments)
    if count == activation.num_rows and count > 0:
        return [Part(WHOLE, 0, count)]
    if len(segments) > FEW_SEGMENTS and count < SHORT_SEGMENT * len(segments):
        return [Part(activation.active_rows[:count].long(), 0, count)]
    parts, begin = [], 0
    for start, stop in segments:
        parts.append(Part(slice(start, stop), begin, begin + stop - start))
        begin += stop - start
    return parts


def _take(matrix: Tensor, rows: slice | Tensor) -> Tensor:
    return matrix if rows is WHOLE else matrix[rows]


def _block(low: Tensor, part: Part, column: int, rank: int) -> Tensor:
    """A projection's columns of `xa` on the rows of a part."""
    if low.shape == (part.end - part.begin, rank):
        return low
    return low[part.begin : part.end, column : column + rank]


def _chunks(call: Call, x: Tensor, parts: Sequence[Part]) -> Iterator[tuple[Part, Tensor | None]]:
    """The active rows and their drop masks.

    Without dropout these are the parts. With dropout parts come in cache-sized chunks, and a mask
    lives until the next one.
    """
    if call.dropout_p == 0.0:
        for part in parts:
            yield part, None
        return
    assert call.seed is not None
    mask = DropMask(int(call.seed), call.dropout_p, x.shape[1])
    for part in parts:
        rows = slice(0, x.shape[0]) if part.rows is WHOLE else part.rows
        numbers = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        for lo, hi, drop in mask.chunks(numbers):
            here = (
                slice(rows.start + lo, rows.start + hi) if isinstance(rows, slice) else rows[lo:hi]
            )
            yield Part(here, part.begin + lo, part.begin + hi), drop


def _dropped(x: Tensor, rows: slice | Tensor, drop: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dropout(x) on these rows, without its 1/(1−p); read where it lies when nothing is dropped."""
    taken = _take(x, rows).to(dtype)
    return taken if drop is None else taken.masked_fill(drop, 0)


def _scaled_product(left: Tensor, right: Tensor, factor: float, out: Tensor) -> None:
    """out = factor · left · right, the factor applied before the product is rounded."""
    torch.addmm(out, left, right, beta=0, alpha=factor, out=out)


def _add_product(
    out: Tensor, rows: slice | Tensor, left: Tensor, right: Tensor, offset: Tensor | None = None
) -> None:
    """out[rows] += left · right + offset, in place, added in the operands' dtype."""
    if isinstance(rows, slice) and out.dtype == left.dtype and offset is None:
        _take(out, rows).addmm_(left, right)
        return
    product = left @ right if offset is None else torch.addmm(offset, left, right)
    _add_rows(out, rows, product)


def _add_rows(out: Tensor, rows: slice | Tensor, part: Tensor) -> None:
    """out[rows] += part, rounded once."""
    if isinstance(rows, slice):
        here = _take(out, rows)
        if out.dtype == part.dtype:
            here.add_(part)
        else:
            here.copy_(part.add_(here))
    elif out.dtype == part.dtype:
        out.index_add_(0, rows, part)
    else:
        out.index_copy_(0, rows, part.add_(out[rows]).to(out.dtype))
