"""Splits the active rows of a batch into parts, and reads and writes them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...activation import Activation, segments_of
from ...contract import Call
from ..philox import DropMask

SHORT_SEGMENT = 32  # below this mean length, one gather is faster than a GEMM for each segment
FEW_SEGMENTS = 16  # up to this many segments, slices are always used

ROUNDED_ROWS = 128  # rows per product that is rounded on its own, so that it stays in the cache

WHOLE = slice(None)


class Part(NamedTuple):
    """Active rows that are read and written together."""

    rows: slice | Tensor  # which rows of x and y: WHOLE, a slice, or int64 row numbers
    begin: int  # range of these rows in `xa` and `dya`, which contain active rows alone
    end: int


# The parts of each activation. The first layer that uses it finds them, all others read them.
_known_parts: weakref.WeakKeyDictionary[Activation, list[Part]] = weakref.WeakKeyDictionary()


def parts_of(activation: Activation) -> list[Part]:
    """The active rows as slices, or as one gather if they are scattered."""
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


def take(matrix: Tensor, rows: slice | Tensor) -> Tensor:
    return matrix if rows is WHOLE else matrix[rows]


def block_of(low: Tensor, part: Part, column: int, rank: int) -> Tensor:
    """The rows of `part` in `xa` or `dya`, and the columns of one projection."""
    if low.shape == (part.end - part.begin, rank):
        return low
    return low[part.begin : part.end, column : column + rank]


def chunks(call: Call, x: Tensor, parts: Sequence[Part]) -> Iterator[tuple[Part, Tensor | None]]:
    """The active rows and their drop masks.

    Without dropout, the parts themselves and no masks. With dropout, the parts in chunks that fit
    the cache; a mask is valid until the next chunk.
    """
    if call.options.dropout_p == 0.0:
        for part in parts:
            yield part, None
        return
    assert call.seed is not None
    mask = DropMask(int(call.seed), call.options.dropout_p, x.shape[1])
    for part in parts:
        rows = slice(0, x.shape[0]) if part.rows is WHOLE else part.rows
        numbers = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        for lo, hi, drop in mask.chunks(numbers):
            here = (
                slice(rows.start + lo, rows.start + hi) if isinstance(rows, slice) else rows[lo:hi]
            )
            yield Part(here, part.begin + lo, part.begin + hi), drop


def dropped(x: Tensor, rows: slice | Tensor, drop: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dropout(x) on these rows, without the factor 1/(1−p); not copied if nothing is dropped."""
    taken = take(x, rows).to(dtype)
    return taken if drop is None else taken.masked_fill(drop, 0)


def scaled_product(left: Tensor, right: Tensor, factor: float, out: Tensor) -> None:
    """out = factor · left · right. The factor is applied before the product is rounded."""
    torch.addmm(out, left, right, beta=0, alpha=factor, out=out)


def add_product(
    out: Tensor,
    rows: slice | Tensor,
    left: Tensor,
    right: Tensor,
    offset: Tensor | None = None,
    *,
    rounded: bool = False,
) -> None:
    """out[rows] += left · right + offset, in place, added in the operands' dtype.

    With `rounded`, the product is rounded to the operands' dtype before it is added.
    """
    if isinstance(rows, slice) and out.dtype == left.dtype and offset is None:
        here = take(out, rows)
        if not rounded:
            here.addmm_(left, right)
            return
        for piece, low in zip(here.split(ROUNDED_ROWS), left.split(ROUNDED_ROWS)):
            piece.add_(low @ right)
        return
    product = left @ right if offset is None else torch.addmm(offset, left, right)
    add_rows(out, rows, product)


def add_rows(out: Tensor, rows: slice | Tensor, part: Tensor) -> None:
    """out[rows] += part, rounded once."""
    if isinstance(rows, slice):
        here = take(out, rows)
        if out.dtype == part.dtype:
            here.add_(part)
        else:
            here.copy_(part.add_(here))
    elif out.dtype == part.dtype:
        out.index_add_(0, rows, part)
    else:
        out.index_copy_(0, rows, part.add_(out[rows]).to(out.dtype))
