"""gemm: out = left · right + bias + mask ⊙ (keep ⊙ (low · up) + scaling · lora_bias).

One kernel for the strategies `tail` and `onepass`, forward and dx, by compile-time switches:

| | left [M, K] | right [K, N] | down [K, R] | low [M, R] | up [R, N] |
|---|---|---|---|---|---|
| forward | x | weightᵀ | lora_aᵀ | xa | lora_bᵀ |
| dx | dy | weight | lora_b | dya | lora_a |

`tail` reads low, which `shrink` wrote. `onepass` forms low = scaling · mask ⊙ (left · down) in the
main loop, beside the base's product, and rounds it to left's dtype; with STORE_LOW the first column
of tiles stores it.

Schedule: one program makes one BLOCK_M × BLOCK_N tile, in groups of GROUP row tiles for reuse in
L2. Tail's R steps run before the K steps, so that the keep mask of dx acts on them alone. A tile
with an active row takes `onepass`'s first loop (with low), any other the second (without): LoRA
costs an inactive tile nothing. With ACTIVE_ONLY (prefix_grad=False) an inactive tile stores zeros.
With SPLITS > 1 a program takes a slice of K and stores float32 parts for `reduce`: low is linear in
the slices, so each adds its own part.

Reads M·K + K·N + R·(f·M + N) elements (`onepass`: R·(K + N)), writes M·N (SPLITS: 4·S·M·N bytes);
2·M·N·(K + f·R) FLOPs, and 2·f·M·K·R for each column of tiles with `onepass`.
"""

import triton
import triton.language as tl

from .dot import dot
from .philox import keep_tile


@triton.jit
def _k_steps(
    acc, low_acc, left, right, down, m, n, r, first_m, first_n, begin, end, M, N, K, R,
    stride_lm, stride_lk, stride_rk, stride_rn, stride_dk, stride_dr,
    LOW: tl.constexpr, LEFT_TMA: tl.constexpr, RIGHT_TMA: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds left · right (and with LOW left · down) over K steps in [begin, end)."""
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if LEFT_TMA:
            a = left.load([first_m, start])  # [BLOCK_M, BLOCK_K]
        else:
            at = left + m[:, None] * stride_lm + k.to(tl.int64)[None, :] * stride_lk
            a = tl.load(at, mask=(m[:, None] < M) & (k[None, :] < end), other=0.0)
        if RIGHT_TMA == "rows":
            b = right.load([start, first_n])  # [BLOCK_K, BLOCK_N]
        elif RIGHT_TMA == "columns":
            b = right.load([first_n, start]).T
        else:
            at = right + k.to(tl.int64)[:, None] * stride_rk + n[None, :] * stride_rn
            b = tl.load(at, mask=(k[:, None] < end) & (n[None, :] < N), other=0.0)
        acc = dot(a, b, acc, PRECISION)
        if LOW:
            at = down + k.to(tl.int64)[:, None] * stride_dk + r[None, :] * stride_dr
            d = tl.load(at, mask=(k[:, None] < end) & (r[None, :] < R), other=0.0)
            low_acc = dot(a, d.to(DTYPE), low_acc, PRECISION)
    return acc, low_acc


@triton.jit
def _expand(
    acc, low, up, n, r, N, R, stride_ur, stride_un, DTYPE: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + low · up, low `[BLOCK_M, BLOCK_R]` rounded to DTYPE."""
    if (DTYPE == tl.float32) and (PRECISION == "ieee"):  # noqa: SIM300
        # FMA would hold both operands in registers: one column at a time instead.
        for j in range(0, R):
            column = tl.sum(tl.where(r[None, :] == j, low, 0.0), 1)  # [BLOCK_M]
            at = up + tl.full((), j, tl.int64) * stride_ur + n * stride_un
            row = tl.load(at, mask=n < N, other=0.0).to(tl.float32)  # [BLOCK_N]
            acc += column[:, None] * row[None, :]
    else:
        at = up + r[:, None] * stride_ur + n[None, :] * stride_un
        b = tl.load(at, mask=(r[:, None] < R) & (n[None, :] < N), other=0.0)
        acc = dot(low.to(DTYPE), b.to(DTYPE), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "split_depth", "threshold"])
def masked_lora_gemm_kernel(
    left, right, bias, down, low, up, lora_bias, out, row_adapter, seed, scaling, threshold,
    M, N, K, R, split_depth,
    stride_lm, stride_lk, stride_rk, stride_rn, stride_dk, stride_dr, stride_wm, stride_ur,
    stride_un, stride_om,
    LORA: tl.constexpr, STORE_LOW: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LORA_BIAS: tl.constexpr, DROPOUT: tl.constexpr, ADD: tl.constexpr,
    ACTIVE_ONLY: tl.constexpr, SPLITS: tl.constexpr, LEFT_TMA: tl.constexpr,
    RIGHT_TMA: tl.constexpr, OUT_TMA: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + pid % (GROUP * tiles_n) % group_rows
    tile_n = pid % (GROUP * tiles_n) // group_rows
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
    n = first_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    split = tl.program_id(1)
    begin, end = 0, K
    if SPLITS > 1:
        begin = split * split_depth
        end = tl.minimum(begin + split_depth, K)
    active = tl.load(row_adapter + m, mask=m < M, other=-1) >= 0
    any_active = tl.max(active.to(tl.int32), 0) > 0
    if ACTIVE_ONLY:
        end = tl.where(any_active, end, begin)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if LORA == "tail":  # noqa: SIM102 (the outer test is the compiler's)
        if any_active & (split == 0):
            for start in range(0, R, BLOCK_R):
                rs = start + r
                at = low + m[:, None] * stride_wm + rs[None, :]
                a = tl.load(at, mask=active[:, None] & (rs[None, :] < R), other=0.0)
                at = up + rs[:, None] * stride_ur + n[None, :] * stride_un
                b = tl.load(at, mask=(rs[:, None] < R) & (n[None, :] < N), other=0.0)
                acc = dot(a, b.to(DTYPE), acc, PRECISION)
            if DROPOUT:
                acc = tl.where(keep_tile(seed, threshold, m, first_n, BLOCK_N), acc, 0.0)

    if LORA == "onepass":
        with_low = tl.where(any_active, end, begin)
        low_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        acc, low_acc = _k_steps(
            acc, low_acc, left, right, down, m, n, r, first_m, first_n, begin, with_low, M, N, K, R,
            stride_lm, stride_lk, stride_rk, stride_rn, stride_dk, stride_dr,
            True, LEFT_TMA, RIGHT_TMA, DTYPE, PRECISION, BLOCK_K,
        )  # fmt: skip
        if any_active:
            # Select, do not multiply: NaN of an inactive row must not leak.
            low_acc = tl.where(active[:, None], low_acc * scaling, 0.0)
            if DROPOUT:
                delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                delta = _expand(
                    delta, low_acc, up, n, r, N, R, stride_ur, stride_un, DTYPE, PRECISION
                )
                acc += tl.where(keep_tile(seed, threshold, m, first_n, BLOCK_N), delta, 0.0)
            else:
                acc = _expand(acc, low_acc, up, n, r, N, R, stride_ur, stride_un, DTYPE, PRECISION)
        if STORE_LOW:  # noqa: SIM102
            if tile_n == 0:
                at = low + (split.to(tl.int64) * M + m[:, None]) * stride_wm + r[None, :]
                kept = (m[:, None] < M) & (r[None, :] < R)
                tl.store(at, low_acc.to(low.dtype.element_ty), mask=kept)
        begin = with_low
    acc, _ = _k_steps(
        acc, acc, left, right, left, m, n, r, first_m, first_n, begin, end, M, N, K, R,
        stride_lm, stride_lk, stride_rk, stride_rn, 0, 0,
        False, LEFT_TMA, RIGHT_TMA, DTYPE, PRECISION, BLOCK_K,
    )  # fmt: skip

    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_LORA_BIAS:
        shift = scaling * tl.load(lora_bias + n, mask=n < N, other=0.0).to(tl.float32)
        acc = tl.where(active[:, None], acc + shift[None, :], acc)
    if ACTIVE_ONLY:
        acc = tl.where(active[:, None], acc, 0.0)
    if OUT_TMA:
        out.store([first_m, first_n], acc.to(DTYPE))
    else:
        at = out + (split.to(tl.int64) * M + m[:, None]) * stride_om + n[None, :]
        here = (m[:, None] < M) & (n[None, :] < N)
        if ADD:
            acc += tl.load(at, mask=here, other=0.0).to(tl.float32)
        tl.store(at, acc.to(out.dtype.element_ty), mask=here)
