"""reduce: out[row, j] = [out +] Σ_s part[s, i, j] [+ bias[j]] [+ scaling · lora_bias[j]].

The parts of a split reduction, added in the order of s, so every run gives the same bits. With
ACTIVE only the first active_count of the H rows exist (xa from shrink's parts); row is then
active_rows[i] with ROWS, else i.

| part | float32 [S, H, W] | contiguous |
| out  | [H or M, W]       | any strides |

One program adds BLOCK_I × BLOCK_J elements. Reads 4·S·H·W bytes, writes H·W elements.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["S", "H"])
def masked_lora_reduce_kernel(
    part, out, bias, lora_bias, active_rows, active_count, row_adapter, scaling, S, H, W,
    stride_oi, stride_oj,
    ACTIVE: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LORA_BIAS: tl.constexpr,
    ADD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    count = H
    if ACTIVE:
        count = tl.load(active_count)
    i = (tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    here = (i[:, None] < count) & (j[None, :] < W)  # [BLOCK_I, BLOCK_J]
    total = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    size = tl.full((), H, tl.int64) * W
    for s in range(S):
        total += tl.load(part + s * size + i[:, None] * W + j[None, :], mask=here, other=0.0)
    row = i
    if ROWS:
        row = tl.load(active_rows + i, mask=i < count, other=0).to(tl.int64)
    if HAS_BIAS:
        total += tl.load(bias + j, mask=j < W, other=0.0).to(tl.float32)[None, :]
    if HAS_LORA_BIAS:
        active = tl.load(row_adapter + i, mask=i < count, other=-1) >= 0
        shift = scaling * tl.load(lora_bias + j, mask=j < W, other=0.0).to(tl.float32)
        total = tl.where(active[:, None], total + shift[None, :], total)
    at = out + row[:, None] * stride_oi + j.to(tl.int64)[None, :] * stride_oj
    if ADD:
        total += tl.load(at, mask=here, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=here)
