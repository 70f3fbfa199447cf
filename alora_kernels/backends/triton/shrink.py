"""shrink: out[row, r] = scale · Σ_k keep[row, k] · left[row, k] · right[r, k] over active rows.

Forward: xa from x and lora_a, for up to four projections that share x; backward: dya from dy and
lora_bᵀ.

| left | [M, K] | any strides |
| right0 to right3 | [R_i, K] | one for each projection, the same strides, converted on load |
| out | [M, ΣR_i], or [active, ΣR_i] with COMPACT | projection i begins at column_i |
| out | float32 [S, active, ΣR_i] with SPLIT | parts for `reduce`, `split_steps` steps of K each |

One program makes BLOCK_M active rows × BLOCK_R columns of one projection; programs of the same rows
run side by side, so left is read from memory once for the group. Reads f·M·K + ΣR·K elements,
writes f·M·ΣR (SPLIT: 4·S·f·M·ΣR bytes); 2·f·M·K·ΣR FLOPs.
"""

import triton
import triton.language as tl

from .dot import dot
from .philox import keep_tile


@triton.jit(
    do_not_specialize=["split_steps", "part_rows", "threshold"],
    do_not_specialize_on_alignment=["active_rows", "active_count", "seed"],
)
def masked_lora_shrink_kernel(
    left, right0, right1, right2, right3, out, active_rows, active_count, seed,
    scale0, scale1, scale2, scale3, threshold, K, split_steps, part_rows,
    stride_lm, stride_lk, stride_rr, stride_rk, stride_om,
    column1: tl.constexpr, column2: tl.constexpr, column3: tl.constexpr,
    rank0: tl.constexpr, rank1: tl.constexpr, rank2: tl.constexpr, rank3: tl.constexpr,
    RIGHT_ROWS: tl.constexpr, COUNT: tl.constexpr, COMPACT: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, R_TILES: tl.constexpr,
):  # fmt: skip
    if RIGHT_ROWS:  # right lies along R: how far its rows are apart is known when compiled
        stride_rr, stride_rk = 1, RIGHT_ROWS
    count = tl.load(active_count)
    # One axis for rows and columns: only the first of a grid holds millions of rows.
    tile = tl.program_id(0) % (COUNT * R_TILES)
    first = tl.program_id(0) // (COUNT * R_TILES) * BLOCK_M
    if first >= count:
        return
    which = tile // R_TILES
    right, rank, scale, column = right0, rank0, scale0, 0
    if COUNT > 1:  # noqa: SIM102 (the outer tests are the compiler's)
        if which == 1:
            right, rank, scale, column = right1, rank1, scale1, column1
    if COUNT > 2:  # noqa: SIM102
        if which == 2:
            right, rank, scale, column = right2, rank2, scale2, column2
    if COUNT > 3:  # noqa: SIM102
        if which == 3:
            right, rank, scale, column = right3, rank3, scale3, column3
    slot = first + tl.arange(0, BLOCK_M)
    here = slot < count
    row = tl.load(active_rows + slot, mask=here, other=0).to(tl.int64)
    r = tile % R_TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    begin, end = 0, tl.cdiv(K, BLOCK_K)
    if SPLIT:
        begin = split * split_steps
        end = tl.minimum(begin + split_steps, end)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for step in range(begin, end):
        start = step * BLOCK_K
        k = start + tl.arange(0, BLOCK_K)
        at = left + row[:, None] * stride_lm + k.to(tl.int64)[None, :] * stride_lk
        inside = here[:, None] if EVEN_K else here[:, None] & (k[None, :] < K)
        a = tl.load(at, mask=inside, other=0.0).to(DTYPE)
        if seed is not None:
            a = tl.where(keep_tile(seed, threshold, row, start, BLOCK_K), a, 0.0).to(DTYPE)
        at = right + r.to(tl.int64)[None, :] * stride_rr + k.to(tl.int64)[:, None] * stride_rk
        inside = r[None, :] < rank if EVEN_K else (r[None, :] < rank) & (k[:, None] < K)
        b = tl.load(at, mask=inside, other=0.0).to(DTYPE)
        acc = dot(a, b, acc, PRECISION)
    to = row
    if COMPACT or SPLIT:
        to = slot.to(tl.int64)
    if SPLIT:
        to += split.to(tl.int64) * part_rows
    # The columns that pad a projection to 16 elements become zeros.
    padded = tl.cdiv(rank, 16) * 16
    at = out + to[:, None] * stride_om + column + r[None, :]
    tl.store(at, (acc * scale).to(out.dtype.element_ty), mask=here[:, None] & (r[None, :] < padded))
