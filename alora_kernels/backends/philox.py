"""Draws dropout masks on the CPU by Philox4x32-10, in chunks that fit the cache.

`reference.keep_mask` defines the masks. If the extension `alora_kernels._cpu`
(csrc/cpu/philox.cpp) was built, it draws the words. Otherwise int64 arithmetic of torch draws them,
about eight times slower. It computes the first two rounds on vectors: the counter's last two words
are zero, so after two rounds each word depends on the row alone, on the column alone, or is the
exclusive or of two such words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..reference import PHILOX_M0, PHILOX_M1, PHILOX_W0, PHILOX_W1, dropout_threshold

_cpu: Any
try:
    from .. import _cpu  # type: ignore[no-redef]
except ImportError:  # no C++ compiler when the package was installed
    _cpu = None

LOW = 0xFFFFFFFF
# Counters per chunk. One counter gives the four words that mask four elements of x.
COUNTERS_COMPILED = 12288  # the float32 elements that they mask fit into a cache of 256 KiB
COUNTERS_PER_THREAD = 32768  # six int64 words per counter fit into 2 MiB; also torch's grain size


class DropMask:
    """Draws the drop masks of one seed for a matrix with `num_columns` columns, chunk by chunk."""

    def __init__(self, seed: int, dropout_p: float, num_columns: int) -> None:
        self.num_columns = num_columns
        self.groups = -(-num_columns // 4)
        self.draw: Compiled | Int64Rounds
        threshold = dropout_threshold(dropout_p)
        if _cpu is not None:
            counters = COUNTERS_COMPILED
            self.draw = Compiled(seed, threshold)
        else:
            counters = COUNTERS_PER_THREAD * torch.get_num_threads()
            self.draw = Int64Rounds(seed, threshold, self.groups)
        self.rows_per_chunk = max(1, counters // self.groups)

    def chunks(self, rows: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Chunks of `rows` (int64 `[n]`, row numbers): begin, end, and the mask of rows[begin:end].

        The mask is bool `[end − begin, num_columns]`, true where an element is dropped. The next
        step of the iteration overwrites it.
        """
        rows = rows.contiguous()
        step = min(self.rows_per_chunk, len(rows))
        drop = torch.empty(step, self.groups, 4, dtype=torch.bool)
        for begin in range(0, len(rows), step):
            end = min(begin + step, len(rows))
            here = drop[: end - begin]
            self.draw(rows[begin:end], here)
            yield begin, end, here.view(end - begin, -1)[:, : self.num_columns]


class Compiled:
    """Draws masks by the extension: uint32 in registers, one thread."""

    def __init__(self, seed: int, threshold: int) -> None:
        self.seed, self.threshold = seed & 2**64 - 1, threshold

    def __call__(self, rows: Tensor, drop: Tensor) -> None:
        """Fill the contiguous `drop` `[n, groups, 4]` for `rows` `[n]`."""
        count, groups, _ = drop.shape
        _cpu.drop_mask(self.seed, self.threshold, rows.data_ptr(), count, groups, drop.data_ptr())


class Int64Rounds:
    """Draws masks by int64 operations of torch."""

    def __init__(self, seed: int, threshold: int, groups: int) -> None:
        self.threshold = threshold
        k0, k1 = seed & LOW, seed >> 32 & LOW
        self.keys = [((k0 + i * PHILOX_W0) & LOW, (k1 + i * PHILOX_W1) & LOW) for i in range(10)]
        # The part of rounds one and two that depends on the column alone.
        p0 = torch.arange(groups) * PHILOX_M0
        p1 = (_high(p0) ^ self.keys[0][1]) * PHILOX_M1
        self.column_c0 = _high(p1) ^ self.keys[1][0]
        self.column_c1 = p1
        self.column_c3 = (p0 & LOW) ^ self.keys[1][1]
        self.words = torch.empty(0, dtype=torch.int64)

    def __call__(self, rows: Tensor, drop: Tensor) -> None:
        """Fill `drop` `[n, groups, 4]` for `rows` `[n]`."""
        if self.words.shape[1:2] < (len(rows),):
            self.words = torch.empty(6, *drop.shape[:2], dtype=torch.int64)
        c0, c1, c2, c3, p0, p1 = self.words[:, : len(rows)].unbind()
        # The part of rounds one and two that depends on the row.
        q0 = ((rows ^ self.keys[0][0]) * PHILOX_M0).unsqueeze(1)
        c0.copy_(self.column_c0)
        c1.copy_(self.column_c1)
        torch.bitwise_xor(_high(q0), self.column_c3, out=c2)
        c3.copy_(q0)
        # c1 and c3 keep the whole 64-bit product. Its high half is cut off after the exclusive or.
        for k0, k1 in self.keys[2:]:
            torch.mul(c0, PHILOX_M0, out=p0)
            torch.mul(c2, PHILOX_M1, out=p1)
            torch.bitwise_right_shift(p1, 32, out=c0)
            c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(LOW)
            torch.bitwise_right_shift(p0, 32, out=c2)
            c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(LOW)
            c1, p1 = p1, c1
            c3, p0 = p0, c3
        for word, value in enumerate((c0, c1.bitwise_and_(LOW), c2, c3.bitwise_and_(LOW))):
            torch.lt(value, self.threshold, out=drop[:, :, word])


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & LOW
