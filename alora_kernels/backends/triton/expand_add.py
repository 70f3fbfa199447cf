"""expand_add: out[row] += keep ⊙ (low[row] · right) + scaling · bias over active rows.

The second half of `delta`: y from xa and lora_bᵀ, or dx (with dropout's keep mask) from dya and
lora_a. Added in float32 and rounded once.

| low | [M, R16], or [active, R16] with COMPACT | zeros past R |
| right | [R, N], any strides, converted on load |
| out | [M, N], any strides |

One program makes BLOCK_M active rows × BLOCK_N columns. Reads f·M·(N + R) + R·N elements, writes
f·M·N; 2·f·M·R·N FLOPs.
"""

import triton
import triton.language as tl

from .dot import dot
from .philox import keep_tile


@triton.jit(
    do_not_specialize=["threshold"],
    do_not_specialize_on_alignment=["active_rows", "active_count", "seed"],
)
def masked_lora_expand_add_kernel(
    low, right, bias, out, active_rows, active_count, seed, scaling, threshold, N,
    stride_lm, stride_rr, stride_rn, stride_om, stride_on,
    RANK: tl.constexpr, RIGHT_ROWS: tl.constexpr, COMPACT: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    PADDED: tl.constexpr = (RANK + 15) // 16 * 16
    if RIGHT_ROWS:  # right lies along R: how far its rows are apart is known when compiled
        stride_rr, stride_rn = 1, RIGHT_ROWS
    count = tl.load(active_count)
    # One axis for rows and columns: only the first of a grid holds millions of rows.
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // tiles_n * BLOCK_M
    if first >= count:
        return
    slot = first + tl.arange(0, BLOCK_M)
    here = slot < count
    row = tl.load(active_rows + slot, mask=here, other=0).to(tl.int64)
    low_row = row
    if COMPACT:
        low_row = slot.to(tl.int64)
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    n = first_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    # out is asked for first: it arrives while the product is formed.
    to = out + row[:, None] * stride_om + n[None, :] * stride_on
    inside = here[:, None] & (n[None, :] < N)
    before = tl.load(to, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, PADDED, BLOCK_R):
        r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        at = low + low_row[:, None] * stride_lm + r[None, :]
        a = tl.load(at, mask=here[:, None] & (r[None, :] < PADDED), other=0.0)
        at = right + r[:, None] * stride_rr + n[None, :] * stride_rn
        b = tl.load(at, mask=(r[:, None] < RANK) & (n[None, :] < N), other=0.0)
        acc = dot(a.to(DTYPE), b.to(DTYPE), acc, PRECISION)
    if seed is not None:
        acc = tl.where(keep_tile(seed, threshold, row, first_n, BLOCK_N), acc, 0.0)
    if bias is not None:
        acc += scaling * tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(to, (acc + before.to(tl.float32)).to(out.dtype.element_ty), mask=inside)
