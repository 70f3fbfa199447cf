"""shrink: out[row, r] = scale · Σ_k left[row, k] · right[r, k] over active rows.

Forward: xa from x and lora_a; backward: dya from dy and lora_b. Reads f·M·K + R·K elements (right
from L2 after the first row block), writes f·M·R; 2·f·M·K·R FLOPs.
"""

import triton
import triton.language as tl

from .dot import dot
from .philox import keep_tile


@triton.jit
def shrink_kernel(
    left, right, out, active_rows, active_count, scale_ptr, seed, scale, threshold, K, R,
    stride_lm, stride_lk, stride_rr, stride_rk, stride_om,
    DTYPE: tl.constexpr, PER_COLUMN: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    count = tl.load(active_count)
    first = tl.program_id(0) * BLOCK_M
    if first >= count:
        return
    slot = first + tl.arange(0, BLOCK_M)
    here = slot < count
    rows = tl.load(active_rows + slot, mask=here, other=0).to(tl.int64)
    r = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        at = left + rows[:, None] * stride_lm + k[None, :] * stride_lk
        a = tl.load(at, mask=here[:, None] & (k[None, :] < K), other=0.0).to(DTYPE)
        if DROPOUT:
            a = tl.where(keep_tile(seed, threshold, rows, start, BLOCK_K), a, 0.0).to(DTYPE)
        at = right + r[None, :] * stride_rr + k[:, None] * stride_rk
        b = tl.load(at, mask=(r[None, :] < R) & (k[:, None] < K), other=0.0).to(DTYPE)
        acc = dot(a, b, acc, PRECISION)
    if PER_COLUMN:
        acc *= tl.load(scale_ptr + r, mask=r < R, other=0.0)[None, :]
    else:
        acc *= scale
    at = out + rows[:, None] * stride_om + r[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=here[:, None] & (r[None, :] < R))
