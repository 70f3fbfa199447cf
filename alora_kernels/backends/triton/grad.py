"""grad: part[s, p, r] = Σ wide[row, p] · low[row, r] over the active rows of split s.

dB from dy and xa, dA (transposed) from x and dya; `sums` also gets Σ wide[row, p] for lora_bias.
The caller adds the parts in a fixed order. Reads f·M·(P + R·P/BLOCK_P) elements, writes S·P·R
floats; 2·f·M·P·R FLOPs.
"""

import triton
import triton.language as tl

from .dot import dot
from .philox import keep_tile


@triton.jit
def grad_kernel(
    wide, low, part, sums, active_rows, active_count, seed, threshold, P, R, split_rows,
    stride_wm, stride_wp, stride_lm,
    DTYPE: tl.constexpr, DROPOUT: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(2)
    first = split * split_rows
    last = tl.minimum(tl.load(active_count), first + split_rows)
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    r = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    acc = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(first, last, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        here = slot < last
        rows = tl.load(active_rows + slot, mask=here, other=0).to(tl.int64)
        at = wide + rows[:, None] * stride_wm + p[None, :] * stride_wp
        a = tl.load(at, mask=here[:, None] & (p[None, :] < P), other=0.0).to(DTYPE)
        if DROPOUT:
            keep = keep_tile(seed, threshold, rows, tl.program_id(0) * BLOCK_P, BLOCK_P)
            a = tl.where(keep, a, 0.0).to(DTYPE)
        at = low + rows[:, None] * stride_lm + r[None, :]
        b = tl.load(at, mask=here[:, None] & (r[None, :] < R), other=0.0).to(DTYPE)
        acc = dot(tl.trans(a), b, acc, PRECISION)
        if SUMS:
            total += tl.sum(a.to(tl.float32), 0)
    at = part + (split * P + p[:, None]) * R + r[None, :]
    tl.store(at, acc, mask=(p[:, None] < P) & (r[None, :] < R))
    if SUMS:  # noqa: SIM102 (the outer test is the compiler's)
        if tl.program_id(1) == 0:
            tl.store(sums + split * P + p, total, mask=p < P)
