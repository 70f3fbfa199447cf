"""Launchers: tensors in, kernels launched. Nothing here synchronises with the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import dropout_threshold
from .. import Call
from .configs import active_config, gemm_config
from .expand_add import expand_add_kernel
from .gemm import gemm_kernel
from .grad import grad_kernel
from .shrink import shrink_kernel

TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SPLIT_ROWS = 1024  # active rows that one program of `grad` adds up


def precision() -> str:
    """How float32 products are formed: torch's own setting."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _drop(call: Call, wanted: bool = True) -> tuple[bool, Tensor | None, int]:
    on = wanted and call.dropout_p > 0.0
    return on, call.seed if on else None, dropout_threshold(call.dropout_p)


def shrink(
    call: Call, left: Tensor, right: Tensor, out: Tensor, scale: float | Tensor, dropout: bool
) -> None:
    """out[active] = scale · left · rightᵀ; left `[M, K]`, right `[R, K]`, out `[M, R]`."""
    act, cfg, (rank, width) = call.activation, active_config(out.dtype), right.shape
    if act.max_active == 0:
        return
    block_r = min(max(16, triton.next_power_of_2(rank)), 64)
    grid = (triton.cdiv(act.max_active, cfg.block_m), triton.cdiv(rank, block_r))
    on, seed, threshold = _drop(call, dropout)
    vector = isinstance(scale, Tensor)
    shrink_kernel[grid](
        left, right, out, act.active_rows, act.active_count, scale if vector else None, seed,
        0.0 if vector else scale, threshold, width, rank, *left.stride(), *right.stride(),
        out.stride(0), DTYPE=TL[out.dtype], PER_COLUMN=vector, DROPOUT=on, PRECISION=precision(),
        BLOCK_M=cfg.block_m, BLOCK_R=block_r, BLOCK_K=cfg.block_k,
        num_warps=cfg.warps, num_stages=cfg.stages,
    )  # fmt: skip


def expand_add(
    call: Call, low: Tensor, right: Tensor, out: Tensor, bias: Tensor | None, scaling: float,
    dropout: bool = False,
) -> None:  # fmt: skip
    """out[active] += low · right + scaling · bias; low `[M, R]`, right `[R, N]`."""
    act, cfg, (rank, width) = call.activation, active_config(low.dtype), right.shape
    if act.max_active == 0:
        return
    grid = (triton.cdiv(act.max_active, cfg.block_m), triton.cdiv(width, cfg.block_n))
    on, seed, threshold = _drop(call, dropout)
    expand_add_kernel[grid](
        low, right, bias, out, act.active_rows, act.active_count, seed, scaling, threshold, width,
        rank, low.stride(0), *right.stride(), *out.stride(), DTYPE=TL[low.dtype],
        HAS_BIAS=bias is not None, DROPOUT=on, PRECISION=precision(), BLOCK_M=cfg.block_m,
        BLOCK_N=cfg.block_n, BLOCK_R=min(max(16, triton.next_power_of_2(rank)), 64),
        num_warps=cfg.warps, num_stages=cfg.stages,
    )  # fmt: skip


def gemm(
    call: Call, arch: int, left: Tensor, right: Tensor, out: Tensor, *, bias: Tensor | None = None,
    low: Tensor | None = None, tail: Tensor | None = None, lora_bias: Tensor | None = None,
    scaling: float = 1.0, dropout: bool = False, add: bool = False, active_only: bool = False,
) -> None:  # fmt: skip
    """out = left · right + bias, and on active rows + low · tail + scaling · lora_bias."""
    (rows, depth), width = left.shape, right.shape[1]
    if rows == 0 or width == 0:
        return
    cfg = gemm_config(arch, rows, left.dtype)
    rank = 0 if tail is None else tail.shape[0]
    on, seed, threshold = _drop(call, dropout)
    gemm_kernel[(triton.cdiv(rows, cfg.block_m) * triton.cdiv(width, cfg.block_n),)](
        left, right, bias, low, tail, lora_bias, out, call.activation.row_adapter, seed, scaling,
        threshold, rows, width, depth, rank, *left.stride(), *right.stride(),
        0 if low is None else low.stride(0), *((0, 0) if tail is None else tail.stride()),
        out.stride(0), HAS_BIAS=bias is not None, HAS_LORA=low is not None,
        HAS_LORA_BIAS=lora_bias is not None, DROPOUT=on, ADD=add, ACTIVE_ONLY=active_only,
        PRECISION=precision(), BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        BLOCK_R=min(max(16, triton.next_power_of_2(rank)), cfg.block_k), GROUP=8,
        num_warps=cfg.warps, num_stages=cfg.stages,
    )  # fmt: skip


def grad(
    call: Call, wide: Tensor, low: Tensor, rank: int, dropout: bool, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """float32 Σ_active wideᵀ · low `[P, R]`, and Σ_active wide `[P]` when asked for."""
    act, cfg, width = call.activation, active_config(low.dtype), wide.shape[1]
    splits = max(1, triton.cdiv(act.max_active, SPLIT_ROWS))
    part = torch.empty(splits, width, rank, dtype=torch.float32, device=wide.device)
    total = part.new_empty(splits, width) if sums else None
    block_r = min(max(16, triton.next_power_of_2(rank)), 64)
    on, seed, threshold = _drop(call, dropout)
    grad_kernel[(triton.cdiv(width, cfg.block_n), triton.cdiv(rank, block_r), splits)](
        wide, low, part, total, act.active_rows, act.active_count, seed, threshold, width, rank,
        SPLIT_ROWS, *wide.stride(), low.stride(0), DTYPE=TL[low.dtype], DROPOUT=on, SUMS=sums,
        PRECISION=precision(), BLOCK_M=cfg.block_m, BLOCK_P=cfg.block_n, BLOCK_R=block_r,
        num_warps=cfg.warps, num_stages=cfg.stages,
    )  # fmt: skip
    return part.sum(0), None if total is None else total.sum(0)
