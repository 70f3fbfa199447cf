"""gemm: out = left · right + bias + mask ⊙ (keep ⊙ (low · up) + scaling · lora_bias).

One kernel for the strategies `tail` and `onepass`, forward and dx, by compile-time switches:

| | left [M, K] | right [K, N] | down [K, R] | low [M, R16] | up [R, N] |
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
With SPLIT a program takes `split_steps` steps of K and stores float32 parts for `reduce`: low is
linear in the slices, so each adds its own part. (Steps, not columns: a multiple of BLOCK_K is what
keeps 16-byte copies.) With EVEN_K all steps are whole. Rows of `low` have zeros up to a multiple of
16 columns, and what lies past M or N is read from the beginning again: no load of the main loop
needs a mask.

Reads M·K + K·N + R·(f·M + N) elements (`onepass`: R·(K + N)), writes M·N (SPLIT: 4·S·M·N bytes);
2·M·N·(K + f·R) FLOPs, and 2·f·M·K·R for each column of tiles with `onepass`.
"""

import triton
import triton.language as tl

from .dot import dot
from .philox import keep_tile


@triton.jit
def _k_steps(
    acc, low_acc, left, right, down, m, n, r, first_m, first_n, begin, end, K,
    stride_lm, stride_lk, stride_rk, stride_rn, stride_dk, stride_dr,
    RANK: tl.constexpr, LOW: tl.constexpr, LEFT_TMA: tl.constexpr, RIGHT_TMA: tl.constexpr,
    EVEN_K: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds left · right (and with LOW left · down) over the steps of K in [begin, end)."""
    for step in range(begin, end):
        start = step * BLOCK_K
        k = start + tl.arange(0, BLOCK_K)
        if LEFT_TMA:
            a = left.load([first_m, start])  # [BLOCK_M, BLOCK_K]
        else:
            at = left + m[:, None] * stride_lm + k.to(tl.int64)[None, :] * stride_lk
            a = tl.load(at) if EVEN_K else tl.load(at, mask=k[None, :] < K, other=0.0)
        if RIGHT_TMA == "rows":
            b = right.load([start, first_n])  # [BLOCK_K, BLOCK_N]
        elif RIGHT_TMA == "columns":
            b = right.load([first_n, start]).T
        else:
            at = right + k.to(tl.int64)[:, None] * stride_rk + n[None, :] * stride_rn
            b = tl.load(at) if EVEN_K else tl.load(at, mask=k[:, None] < K, other=0.0)
        acc = dot(a, b, acc, PRECISION)
        if LOW:
            at = down + k.to(tl.int64)[:, None] * stride_dk + r[None, :] * stride_dr
            inside = r[None, :] < RANK if EVEN_K else (r[None, :] < RANK) & (k[:, None] < K)
            d = tl.load(at, mask=inside, other=0.0)
            low_acc = dot(a, d.to(DTYPE), low_acc, PRECISION)
    return acc, low_acc


@triton.jit
def _expand(
    acc, low, up, n, r, stride_ur, stride_un, RANK: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + low · up, low `[BLOCK_M, BLOCK_R]` rounded to DTYPE."""
    if (DTYPE == tl.float32) and (PRECISION == "ieee"):  # noqa: SIM300
        # FMA would hold both operands in registers: one column at a time instead.
        for j in range(0, RANK):
            column = tl.sum(tl.where(r[None, :] == j, low, 0.0), 1)  # [BLOCK_M]
            at = up + tl.full((), j, tl.int64) * stride_ur + n * stride_un
            row = tl.load(at).to(tl.float32)  # [BLOCK_N]
            acc += column[:, None] * row[None, :]
    else:
        at = up + r[:, None] * stride_ur + n[None, :] * stride_un
        b = tl.load(at, mask=r[:, None] < RANK, other=0.0)
        acc = dot(low.to(DTYPE), b.to(DTYPE), acc, PRECISION)
    return acc


@triton.jit(
    do_not_specialize=["M", "split_steps", "threshold"],
    do_not_specialize_on_alignment=["row_adapter", "seed"],
)
def masked_lora_gemm_kernel(
    left, right, bias, down, low, up, lora_bias, out, row_adapter, seed, scaling, threshold,
    M, N, K, split_steps,
    stride_lm, stride_lk, stride_rk, stride_rn, stride_dk, stride_dr, stride_wm, stride_ur,
    stride_un, stride_om,
    LORA: tl.constexpr, RANK: tl.constexpr, UP_ROWS: tl.constexpr, DOWN_ROWS: tl.constexpr,
    ADD: tl.constexpr, ACTIVE_ONLY: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
    LEFT_TMA: tl.constexpr, RIGHT_TMA: tl.constexpr, OUT_TMA: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Columns of low that may be read and are written: its rows are padded with zeros.
    PADDED: tl.constexpr = (RANK + 15) // 16 * 16
    if UP_ROWS:  # up lies along R: how far its rows are apart is known when this is compiled
        stride_ur, stride_un = 1, UP_ROWS
    if DOWN_ROWS:
        stride_dk, stride_dr = DOWN_ROWS, 1
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + pid % (GROUP * tiles_n) % group_rows
    tile_n = pid % (GROUP * tiles_n) // group_rows
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    own_m, own_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    here_m, here_n = own_m < M, own_n < N
    # What is past the end computes something else again, and is not stored.
    m, n = (own_m % M).to(tl.int64), (own_n % N).to(tl.int64)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    split = tl.program_id(1)
    begin, end = 0, tl.cdiv(K, BLOCK_K)
    if SPLIT:
        begin = split * split_steps
        end = tl.minimum(begin + split_steps, end)
    active = tl.load(row_adapter + own_m, mask=here_m, other=-1) >= 0
    any_active = tl.max(active.to(tl.int32), 0) > 0
    if ACTIVE_ONLY:
        end = tl.where(any_active, end, begin)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if LORA == "tail":  # noqa: SIM102 (the outer test is the compiler's)
        if any_active & (split == 0):
            for start in range(0, PADDED, BLOCK_R):
                rs = start + r
                at = low + m[:, None] * stride_wm + rs[None, :]
                a = tl.load(at, mask=active[:, None] & (rs[None, :] < PADDED), other=0.0)
                at = up + rs[:, None] * stride_ur + n[None, :] * stride_un
                b = tl.load(at, mask=rs[:, None] < RANK, other=0.0)
                acc = dot(a, b.to(DTYPE), acc, PRECISION)
            if seed is not None:
                acc = tl.where(keep_tile(seed, threshold, own_m, first_n, BLOCK_N), acc, 0.0)

    if LORA == "onepass":
        with_low = tl.where(any_active, end, begin)
        low_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        acc, low_acc = _k_steps(
            acc, low_acc, left, right, down, m, n, r, first_m, first_n, begin, with_low, K,
            stride_lm, stride_lk, stride_rk, stride_rn, stride_dk, stride_dr,
            RANK, True, LEFT_TMA, RIGHT_TMA, EVEN_K, DTYPE, PRECISION, BLOCK_K,
        )  # fmt: skip
        if any_active:
            # Select, do not multiply: NaN of an inactive row must not leak.
            low_acc = tl.where(active[:, None], low_acc * scaling, 0.0)
            if seed is not None:
                delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                delta = _expand(
                    delta, low_acc, up, n, r, stride_ur, stride_un, RANK, DTYPE, PRECISION
                )
                acc += tl.where(keep_tile(seed, threshold, own_m, first_n, BLOCK_N), delta, 0.0)
            else:
                acc = _expand(acc, low_acc, up, n, r, stride_ur, stride_un, RANK, DTYPE, PRECISION)
        if low is not None:  # noqa: SIM102
            if tile_n == 0:
                at = low + (split.to(tl.int64) * M + own_m[:, None]) * stride_wm + r[None, :]
                kept = here_m[:, None] & (r[None, :] < PADDED)
                tl.store(at, low_acc.to(low.dtype.element_ty), mask=kept)
        begin = with_low
    acc, _ = _k_steps(
        acc, acc, left, right, left, m, n, r, first_m, first_n, begin, end, K,
        stride_lm, stride_lk, stride_rk, stride_rn, 0, 0,
        0, False, LEFT_TMA, RIGHT_TMA, EVEN_K, DTYPE, PRECISION, BLOCK_K,
    )  # fmt: skip

    if bias is not None:
        acc += tl.load(bias + n).to(tl.float32)[None, :]
    if lora_bias is not None:
        shift = scaling * tl.load(lora_bias + n).to(tl.float32)
        acc = tl.where(active[:, None], acc + shift[None, :], acc)
    if ACTIVE_ONLY:
        acc = tl.where(active[:, None], acc, 0.0)
    if OUT_TMA:
        out.store([first_m, first_n], acc.to(DTYPE))
    else:
        at = out + (split.to(tl.int64) * M + own_m[:, None]) * stride_om + own_n[None, :]
        here = here_m[:, None] & here_n[None, :]
        if ADD:
            acc += tl.load(at, mask=here, other=0.0).to(tl.float32)
        tl.store(at, acc.to(out.dtype.element_ty), mask=here)
