"""reduce: out[row, j] = [out +] Σ_s part[s, i, j] [+ bias[j]] [+ scaling · lora_bias[j]].

The parts of a split reduction, added in the order of s, so every run gives the same bits. With
ACTIVE only the first active_count of the H rows exist (xa from shrink's parts); row is then
active_rows[i] with ROWS, else i. With STEP_ROWS the parts are those of `grad`, in steps of so many
active rows: only the splits that had rows are read.

| part | float32 [S, H, W] | contiguous |
| out  | [H or M, W]       | any strides |

One program adds BLOCK_I × BLOCK_J elements, UNROLL parts at a time: their loads do not wait for
each other. Reads 4·S·H·W bytes, writes H·W elements.
"""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["S", "H"],
    do_not_specialize_on_alignment=["active_rows", "active_count", "row_adapter"],
)
def masked_lora_reduce_kernel(
    part, out, bias, lora_bias, active_rows, active_count, row_adapter, scaling, S, H, W,
    stride_oi, stride_oj,
    ACTIVE: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, STEP_ROWS: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    count, used = H, S
    if ACTIVE:
        count = tl.load(active_count)
    if STEP_ROWS:
        steps = tl.cdiv(tl.load(active_count), STEP_ROWS)
        used = tl.cdiv(steps, tl.maximum(tl.cdiv(steps, S), 1))
    i = (tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    here = (i[:, None] < count) & (j[None, :] < W)  # [BLOCK_I, BLOCK_J]
    total = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    size = tl.full((), H, tl.int64) * W
    first = part + i[:, None] * W + j[None, :]
    for s in range(0, used, UNROLL):
        for t in tl.static_range(UNROLL):
            inside = here & (tl.full((BLOCK_I, BLOCK_J), s + t, tl.int32) < used)
            total += tl.load(first + (s + t) * size, mask=inside, other=0.0)
    row = i
    if ROWS:
        row = tl.load(active_rows + i, mask=i < count, other=0).to(tl.int64)
    if bias is not None:
        total += tl.load(bias + j, mask=j < W, other=0.0).to(tl.float32)[None, :]
    if lora_bias is not None:
        active = tl.load(row_adapter + i, mask=i < count, other=-1) >= 0
        shift = scaling * tl.load(lora_bias + j, mask=j < W, other=0.0).to(tl.float32)
        total = tl.where(active[:, None], total + shift[None, :], total)
    at = out + row[:, None] * stride_oi + j.to(tl.int64)[None, :] * stride_oj
    if ADD:
        total += tl.load(at, mask=here, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=here)
