"""Gradients of the adapter: sums over active rows, without atomics.

grad:   part[s, p, r] = Σ keep ⊙ wide[row, p] · low[row, r]
        dB from dy and xa; dA from x (dropped as in forward) and dya. SUMS also gets
        sums[s, p] = scaling · Σ wide[row, p], the gradient of lora_bias.
grad_b: the same dB and, in the same pass over dy,
        dya_part[h, slot, r] = scale · Σ_{p in block h} dy[row, p] · lora_b[p, r]

| wide | [M, P] | dy (P = N) or x (P = K), any strides |
| low | [M, R16] | xa or dya, zeros past R |
| part | [S, P, R] by strides | float32 for `reduce`, or the gradient itself when S = 1 |
| dya_part | float32 [H, active, R16] | H = P/BLOCK_P parts for `reduce`, zeros past R |

Schedule: a program owns BLOCK_P columns and the active rows of one split, which it walks in steps
of BLOCK_M. The splits share the rows that are active, not those that might be; where there are
fewer steps than splits the last ones have none, and neither write nor are read. Bytes: grad reads
f·M·P·size, grad_b the same once for both results instead of twice, and pays 8·R·H·f·M for the
parts of dya; each split pays 8·R·P. FLOPs: 2·f·M·P·R, grad_b twice.
"""

import triton
import triton.language as tl

from .dot import dot
from .philox import keep_tile


@triton.jit
def own_rows(active_count, split, splits, BLOCK_M: tl.constexpr):
    """The slots [first, last) of a split; first >= last where none is left for it."""
    count = tl.load(active_count)
    each = tl.cdiv(tl.cdiv(count, BLOCK_M), splits) * BLOCK_M
    return split * each, tl.minimum(count, (split + 1) * each)


@triton.jit(
    do_not_specialize=["threshold"],
    do_not_specialize_on_alignment=["active_rows", "active_count", "seed"],
)
def masked_lora_grad_kernel(
    wide, low, part, sums, active_rows, active_count, seed, scaling, threshold, P,
    stride_wm, stride_wp, stride_lm, stride_ps, stride_pp, stride_pr,
    RANK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    PADDED: tl.constexpr = (RANK + 15) // 16 * 16
    split, splits = tl.program_id(2), tl.num_programs(2)
    first, last = own_rows(active_count, split, splits, BLOCK_M)
    if (first >= last) & (split > 0):
        return
    first_p = tl.program_id(0) * BLOCK_P
    p = first_p.to(tl.int64) + tl.arange(0, BLOCK_P)
    r = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    acc = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(first, last, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        here = slot < last
        row = tl.load(active_rows + slot, mask=here, other=0).to(tl.int64)
        at = wide + row[:, None] * stride_wm + p[None, :] * stride_wp
        a = tl.load(at, mask=here[:, None] & (p[None, :] < P), other=0.0).to(DTYPE)
        if seed is not None:
            a = tl.where(keep_tile(seed, threshold, row, first_p, BLOCK_P), a, 0.0).to(DTYPE)
        at = low + row[:, None] * stride_lm + r[None, :]
        b = tl.load(at, mask=here[:, None] & (r[None, :] < PADDED), other=0.0).to(DTYPE)
        acc = dot(tl.trans(a), b, acc, PRECISION)
        if sums is not None:
            total += tl.sum(a.to(tl.float32), 0)
    at = part + split.to(tl.int64) * stride_ps + p[:, None] * stride_pp + r[None, :] * stride_pr
    inside = (p[:, None] < P) & (r[None, :] < RANK)
    tl.store(at, acc.to(part.dtype.element_ty), mask=inside)
    if sums is not None:  # noqa: SIM102 (the outer test is the compiler's)
        if tl.program_id(1) == 0:
            to = sums + split.to(tl.int64) * P + p
            tl.store(to, (total * scaling).to(sums.dtype.element_ty), mask=p < P)


@triton.jit(
    do_not_specialize=["part_rows"], do_not_specialize_on_alignment=["active_rows", "active_count"]
)
def masked_lora_grad_b_kernel(
    dy, xa, lora_b, part, dya_part, sums, active_rows, active_count, scale, scaling, P, part_rows,
    stride_ym, stride_yp, stride_xm, stride_bp, stride_br, stride_ps, stride_pp, stride_pr,
    RANK: tl.constexpr, UP_ROWS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    PADDED: tl.constexpr = (RANK + 15) // 16 * 16
    if UP_ROWS:  # lora_b lies along R: how far its rows are apart is known when compiled
        stride_bp, stride_br = UP_ROWS, 1
    split, splits = tl.program_id(1), tl.num_programs(1)
    first, last = own_rows(active_count, split, splits, BLOCK_M)
    if (first >= last) & (split > 0):
        return
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    inside = (p[:, None] < P) & (r[None, :] < RANK)
    up = tl.load(lora_b + p[:, None] * stride_bp + r[None, :] * stride_br, mask=inside, other=0.0)
    up = up.to(DTYPE)  # [BLOCK_P, BLOCK_R]
    acc = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    block = dya_part + tl.program_id(0).to(tl.int64) * part_rows * PADDED
    for start in range(first, last, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        here = slot < last
        row = tl.load(active_rows + slot, mask=here, other=0).to(tl.int64)
        at = dy + row[:, None] * stride_ym + p[None, :] * stride_yp
        a = tl.load(at, mask=here[:, None] & (p[None, :] < P), other=0.0).to(DTYPE)
        low_inside = here[:, None] & (r[None, :] < PADDED)
        b = tl.load(xa + row[:, None] * stride_xm + r[None, :], mask=low_inside, other=0.0)
        acc = dot(tl.trans(a), b.to(DTYPE), acc, PRECISION)
        dya = dot(a, up, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION) * scale
        tl.store(block + slot.to(tl.int64)[:, None] * PADDED + r[None, :], dya, mask=low_inside)
        if sums is not None:
            total += tl.sum(a.to(tl.float32), 0)
    at = part + split.to(tl.int64) * stride_ps + p[:, None] * stride_pp + r[None, :] * stride_pr
    tl.store(at, acc.to(part.dtype.element_ty), mask=inside)
    if sums is not None:
        to = sums + split.to(tl.int64) * P + p
        tl.store(to, (total * scaling).to(sums.dtype.element_ty), mask=p < P)
