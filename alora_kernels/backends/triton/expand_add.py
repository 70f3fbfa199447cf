"""expand_add: out[row] += low[row] · right + scaling · bias over active rows, rounded once.

Reads f·M·(N + R) + R·N elements, writes f·M·N; 2·f·M·R·N FLOPs. With dropout the product is
selected by the keep mask, which is dx's adapter part.
"""

import triton
import triton.language as tl

from .dot import dot
from .philox import keep_tile


@triton.jit
def expand_add_kernel(
    low, right, bias, out, active_rows, active_count, seed, scaling, threshold, N, R,
    stride_lm, stride_rr, stride_rn, stride_om, stride_on,
    DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    count = tl.load(active_count)
    first = tl.program_id(0) * BLOCK_M
    if first >= count:
        return
    slot = first + tl.arange(0, BLOCK_M)
    here = slot < count
    rows = tl.load(active_rows + slot, mask=here, other=0).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        at = low + rows[:, None] * stride_lm + r[None, :]
        a = tl.load(at, mask=here[:, None] & (r[None, :] < R), other=0.0).to(DTYPE)
        at = right + r[:, None] * stride_rr + n[None, :] * stride_rn
        b = tl.load(at, mask=(r[:, None] < R) & (n[None, :] < N), other=0.0).to(DTYPE)
        acc = dot(a, b, acc, PRECISION)
    if DROPOUT:
        keep = keep_tile(seed, threshold, rows, tl.program_id(1) * BLOCK_N, BLOCK_N)
        acc = tl.where(keep, acc, 0.0)
    if HAS_BIAS:
        acc += scaling * tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = out + rows[:, None] * stride_om + n[None, :] * stride_on
    mask = here[:, None] & (n[None, :] < N)
    acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, acc.to(out.dtype.element_ty), mask=mask)
