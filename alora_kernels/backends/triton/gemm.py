"""gemm: out = left · right + bias + mask ⊙ (keep ⊙ (low · tail) + scaling · lora_bias).

`tail` of the design, forward (left x, low xa) and backward (left dy, low dya). The R steps run
first, so that the keep mask of dx acts on them alone. Reads M·K + K·N + R·(f·M + N) elements,
writes M·N; 2·M·N·(K + f·R) FLOPs: tiles without an active row skip the R steps.
"""

import triton
import triton.language as tl

from .dot import dot
from .philox import keep_tile


@triton.jit
def gemm_kernel(
    left, right, bias, low, tail, lora_bias, out, row_adapter, seed, scaling, threshold,
    M, N, K, R, stride_lm, stride_lk, stride_rk, stride_rn, stride_wm, stride_tr, stride_tn,
    stride_om,
    HAS_BIAS: tl.constexpr, HAS_LORA: tl.constexpr, HAS_LORA_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, ADD: tl.constexpr, ACTIVE_ONLY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_n)
    size = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + pid % (GROUP * tiles_n) % size
    tile_n = pid % (GROUP * tiles_n) // size
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    active = tl.load(row_adapter + m, mask=m < M, other=-1) >= 0
    any_active = tl.max(active.to(tl.int32), 0) > 0
    dtype: tl.constexpr = left.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_LORA:  # noqa: SIM102 (the outer test is the compiler's)
        if any_active:
            for start in range(0, R, BLOCK_R):
                r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
                at = low + m[:, None] * stride_wm + r[None, :]
                a = tl.load(at, mask=active[:, None] & (r[None, :] < R), other=0.0)
                at = tail + r[:, None] * stride_tr + n[None, :] * stride_tn
                b = tl.load(at, mask=(r[:, None] < R) & (n[None, :] < N), other=0.0).to(dtype)
                acc = dot(a, b, acc, PRECISION)
            if DROPOUT:
                acc = tl.where(keep_tile(seed, threshold, m, tile_n * BLOCK_N, BLOCK_N), acc, 0.0)
    steps = K
    if ACTIVE_ONLY:
        steps = tl.where(any_active, K, 0)
    for start in range(0, steps, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        at = left + m[:, None] * stride_lm + k[None, :] * stride_lk
        a = tl.load(at, mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        at = right + k[:, None] * stride_rk + n[None, :] * stride_rn
        b = tl.load(at, mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
        acc = dot(a, b, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_LORA_BIAS:
        part = scaling * tl.load(lora_bias + n, mask=n < N, other=0.0).to(tl.float32)
        acc = tl.where(active[:, None], acc + part[None, :], acc)
    if ACTIVE_ONLY:
        acc = tl.where(active[:, None], acc, 0.0)
    at = out + m[:, None] * stride_om + n[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    if ADD:
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, acc.to(out.dtype.element_ty), mask=mask)
