"""The forward pass of `delta` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...contract import Call, Projection, saved_columns, saved_dtype
from .rows import WHOLE, add_product, block_of, chunks, dropped, parts_of, scaled_product


def run_forward(
    call: Call,
    x: Tensor,
    projections: Sequence[Projection],
    base_outs: Sequence[Tensor] | None,
    save: bool,
) -> tuple[list[Tensor], Tensor | None]:
    parts = parts_of(call.activation)
    whole = len(parts) == 1 and parts[0].rows is WHOLE
    rounded = call.options.adapter_precision == "autocast"
    one_dtype = saved_dtype(x.dtype, call.options.adapter_precision) == x.dtype
    if whole and one_dtype and not save and call.options.dropout_p == 0.0:
        return _all_rows(call, x, projections, base_outs), None
    ys = _base_outputs(x, projections) if base_outs is None else list(base_outs)
    begins, columns = saved_columns([p.lora_a.shape[0] for p in projections])
    dtype = saved_dtype(x.dtype, call.options.adapter_precision)
    known = call.activation.num_active
    # The padding between projections must be zero. On a CPU with AMX, torch's 16-bit products read
    # one element past a row of odd length and multiply it by zero, which gives NaN if it is NaN.
    xa = x.new_zeros(x.shape[0] if known is None else known, columns, dtype=dtype)
    if not parts:
        return ys, xa if save else None
    lora_a = [p.lora_a.to(dtype) for p in projections]
    for part, drop in chunks(call, x, parts):
        rows_x = dropped(x, part.rows, drop, dtype)
        for a, column, scaling in zip(lora_a, begins, call.scalings):
            out = block_of(xa, part, column, a.shape[0])
            scaled_product(rows_x, a.t(), scaling / (1.0 - call.options.dropout_p), out)
    for p, y, column, scaling in zip(projections, ys, begins, call.scalings):
        b = p.lora_b.to(dtype).t()  # [R, N]
        offset = None if p.lora_bias is None else p.lora_bias.detach().to(dtype) * scaling
        for part in parts:
            low = block_of(xa, part, column, b.shape[0])
            add_product(y, part.rows, low, b, offset, rounded=rounded)
    return ys, xa if save else None


def _base_outputs(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    return [F.linear(x, p.weight, p.bias) for p in projections]  # type: ignore[arg-type]


def _all_rows(
    call: Call, x: Tensor, projections: Sequence[Projection], base_outs: Sequence[Tensor] | None
) -> list[Tensor]:
    """The fast path for decoding: all rows are active, nothing is saved, all is in x's dtype."""
    dtype = x.dtype
    if any(p.lora_a.dtype != dtype for p in projections):
        projections = [p._replace(lora_a=p.lora_a.to(dtype), lora_b=p.lora_b.to(dtype))
                       for p in projections]  # fmt: skip
    # In 16 bits torch multiplies matrices faster than matrix and vector.
    if x.shape[0] == 1 and base_outs is None and dtype.itemsize >= 4:
        return one_row(x.reshape(-1), projections, call.scalings)
    ys = _base_outputs(x, projections) if base_outs is None else list(base_outs)
    for p, y, scaling in zip(projections, ys, call.scalings):
        if call.options.adapter_precision == "autocast":
            low = torch.mm(x, p.lora_a.t()).mul_(scaling)
            add_product(y, WHOLE, low, p.lora_b.t(), rounded=True)
        else:
            y.addmm_(torch.mm(x, p.lora_a.t()), p.lora_b.t(), alpha=scaling)
        if p.lora_bias is not None:
            y.add_(p.lora_bias.to(dtype), alpha=scaling)
    return ys


def one_row(
    row: Tensor, projections: Sequence[Projection], scalings: Sequence[float]
) -> list[Tensor]:
    """The outputs `[N]` of one active row `[K]`: matrix times vector needs no transposes."""
    ys = []
    for p, scaling in zip(projections, scalings):
        assert p.weight is not None
        y = p.weight.mv(row) if p.bias is None else torch.addmv(p.bias, p.weight, row)
        y.addmv_(p.lora_b, p.lora_a.mv(row), alpha=scaling)
        if p.lora_bias is not None:
            y.add_(p.lora_bias.to(y.dtype), alpha=scaling)
        ys.append(y)
    return ys
