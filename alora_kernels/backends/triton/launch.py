"""Launchers: tensors in, kernels launched. Nothing here synchronises with the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...contract import Call
from ...reference import dropout_threshold
from . import configs, target, tune
from .configs import Config, rank_block
from .expand_add import masked_lora_expand_add_kernel
from .gemm import masked_lora_gemm_kernel
from .grad import masked_lora_grad_b_kernel, masked_lora_grad_kernel
from .reduce import masked_lora_reduce_kernel
from .shrink import masked_lora_shrink_kernel

TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
GROUP = 8  # row tiles that share a column tile of the weight in L2
SHRINK_GROUP = 4  # projections that one launch of shrink serves


@functools.cache
def _descriptor_type() -> Any:
    """Triton's host-side TensorDescriptor, or None before Triton had it."""
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:
        return None
    return TensorDescriptor


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _options(cfg: Config) -> dict[str, Any]:
    # Said outright because Triton 3.9 warns while the default is about to change.
    return {"num_warps": cfg.warps, "num_stages": cfg.stages, "enable_fp_fusion": True}


def _drop(call: Call, wanted: bool) -> tuple[bool, Tensor | None, int]:
    on = wanted and call.options.dropout_p > 0.0
    return on, call.seed if on else None, dropout_threshold(call.options.dropout_p) if on else 0


def _parts(steps: int, wanted: int) -> tuple[int, int]:
    """How many parts of how many steps: no part is empty."""
    each = _cdiv(steps, wanted)
    return _cdiv(steps, each), each


def shrink(
    call: Call, left: Tensor, rights: Sequence[Tensor], scales: Sequence[float],
    columns: Sequence[int], out: Tensor, *, dropout: bool, compact: bool = False,
) -> None:  # fmt: skip
    """out[active, column_i:] = scale_i · keep ⊙ left · right_iᵀ; left `[M, K]`, right_i `[R_i, K]`.

    out is `[M, ·]`, or `[active, ·]` with `compact`.
    """
    act, width = call.activation, left.shape[1]
    if act.max_active == 0:
        return
    like = (rights[0].stride(), rights[0].dtype)
    size = SHRINK_GROUP if all((r.stride(), r.dtype) == like for r in rights) else 1
    if len(rights) > size:
        for i in range(0, len(rights), size):
            j = i + size
            shrink(
                call, left, rights[i:j], scales[i:j], columns[i:j], out, dropout=dropout,
                compact=compact,
            )  # fmt: skip
        return
    cfg = configs.shrink_config(act.planned_active, out.dtype)
    count, ranks = len(rights), [r.shape[0] for r in rights]
    block_r = rank_block(max(ranks))
    tiles_r = _cdiv(max(ranks), block_r)
    tiles = _cdiv(act.max_active, cfg.block_m) * count * tiles_r
    steps = _cdiv(width, cfg.block_k)
    planned = _cdiv(max(act.planned_active, 1), cfg.block_m) * count * tiles_r
    wanted = configs.split_count(planned, steps, target.processors(left.device), least_steps=4)
    splits, each = _parts(steps, wanted)
    first, total = columns[0], columns[-1] - columns[0] + _cdiv(ranks[-1], 16) * 16
    to = out[:, first:]
    if splits > 1:
        to = torch.empty(splits, act.max_active, total, dtype=torch.float32, device=out.device)
    on, seed, threshold = _drop(call, dropout)
    pad = (None,) * (SHRINK_GROUP - count)
    zero = (0,) * (SHRINK_GROUP - count)
    masked_lora_shrink_kernel[(tiles, splits)](
        left, *rights, *pad, to, act.active_rows, act.active_count, seed,
        *map(float, scales), *map(float, zero), *(c - first for c in columns[1:]), *zero,
        *ranks, *zero, threshold, width, each * cfg.block_k, act.max_active,
        *left.stride(), *rights[0].stride(), to.stride(-2), COUNT=count, COMPACT=compact,
        SPLITS=splits, DROPOUT=on, DTYPE=TL[out.dtype], PRECISION=target.float32_precision(),
        BLOCK_M=cfg.block_m, BLOCK_R=block_r, BLOCK_K=cfg.block_k, R_TILES=tiles_r,
        **_options(cfg),
    )  # fmt: skip
    if splits > 1:
        reduce(to, out[:, first:], call, rows=not compact, active=True)


def reduce(
    part: Tensor, out: Tensor, call: Call, *, rows: bool = False, active: bool = False,
    bias: Tensor | None = None, lora_bias: Tensor | None = None, scaling: float = 1.0,
    add: bool = False,
) -> None:  # fmt: skip
    """out = [out +] Σ_s part[s] [+ bias] [+ scaling · mask ⊙ lora_bias]; part `[S, H, W]`.

    `active`: only the first active_count of the H rows exist; `rows`: row i goes to active_rows[i].
    """
    splits, height, width = part.shape
    act = call.activation
    block_j = rank_block(width, 256)
    block_i = configs.REDUCE_ELEMENTS // block_j
    masked_lora_reduce_kernel[(_cdiv(height, block_i), _cdiv(width, block_j))](
        part, out, bias, lora_bias, act.active_rows, act.active_count, act.row_adapter, scaling,
        splits, height, width, *out.stride(), ACTIVE=active, ROWS=rows, HAS_BIAS=bias is not None,
        HAS_LORA_BIAS=lora_bias is not None, ADD=add, BLOCK_I=block_i, BLOCK_J=block_j,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def expand_add(
    call: Call, low: Tensor, right: Tensor, out: Tensor, bias: Tensor | None, scaling: float,
    *, dropout: bool = False, compact: bool = False,
) -> None:  # fmt: skip
    """out[active] += low · right + scaling · bias; low `[M or active, R]`, right `[R, N]`."""
    act, (rank, width) = call.activation, right.shape
    if act.max_active == 0 or width == 0:
        return
    cfg = configs.EXPAND_FLOAT32 if low.dtype == torch.float32 else configs.EXPAND
    grid = (_cdiv(width, cfg.block_n) * _cdiv(act.max_active, cfg.block_m),)
    on, seed, threshold = _drop(call, dropout)
    masked_lora_expand_add_kernel[grid](
        low, right, bias, out, act.active_rows, act.active_count, seed, scaling, threshold, width,
        rank, low.stride(0), *right.stride(), *out.stride(), COMPACT=compact,
        HAS_BIAS=bias is not None, DROPOUT=on, DTYPE=TL[low.dtype],
        PRECISION=target.float32_precision(), BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n,
        BLOCK_R=rank_block(rank, cfg.block_k), **_options(cfg),
    )  # fmt: skip


def gemm(
    call: Call, left: Tensor, right: Tensor, out: Tensor, *, bias: Tensor | None = None,
    down: Tensor | None = None, low: Tensor | None = None, up: Tensor | None = None,
    lora_bias: Tensor | None = None, scaling: float = 1.0, dropout: bool = False,
    add: bool = False, active_only: bool = False,
) -> None:  # fmt: skip
    """out = [out +] left · right + bias + mask ⊙ (keep ⊙ (low · up) + scaling · lora_bias).

    left `[M, K]`, right `[K, N]`, out `[M, N]` contiguous. Without `up` there is no adapter. With
    `down` `[K, R]` low is formed here (`onepass`) and stored to `low` if that is given; without it
    `low` `[M, R]` is read (`tail`).
    """
    (rows, depth), width = left.shape, right.shape[1]
    if rows == 0 or width == 0:
        return
    arch, precision = target.arch(), target.float32_precision()
    lora = "none" if up is None else "tail" if down is None else "onepass"
    rank = 0 if up is None else up.shape[0]
    dropout = dropout and call.options.dropout_p > 0.0 and up is not None

    def run(cfg: Config) -> None:
        _gemm(
            call, cfg, arch, precision, lora, left, right, out, bias, down, low, up, lora_bias,
            scaling, dropout, add, active_only,
        )  # fmt: skip

    cfg = configs.gemm_config(
        arch, rows, left.dtype, precision, aligned=_aligned(left) and _aligned(right), lora=lora,
        rank=rank, dropout=dropout,
    )  # fmt: skip
    if tune.enabled() and not (add or target.interpreting()):
        key = (
            arch, lora, dropout, active_only, str(left.dtype), precision, tune.bucket(rows), width,
            depth, rank_block(rank or 1, configs.MAX_RANK), right.stride(0) == 1,
        )  # fmt: skip
        cfg = tune.best("gemm", key, configs.gemm_candidates(cfg, arch, left.dtype), cfg, run)
    run(cfg)


def _gemm(
    call: Call, cfg: Config, arch: int, precision: str, lora: str, left: Tensor, right: Tensor,
    out: Tensor, bias: Tensor | None, down: Tensor | None, low: Tensor | None, up: Tensor | None,
    lora_bias: Tensor | None, scaling: float, dropout: bool, add: bool, active_only: bool,
) -> None:  # fmt: skip
    (rows, depth), width = left.shape, right.shape[1]
    rank = 0 if up is None else up.shape[0]
    wanted = configs.gemm_splits(rows, width, depth, cfg, target.processors(left.device))
    splits, each = _parts(_cdiv(depth, cfg.block_k), wanted)
    # A split writes float32 parts; what is added once waits for `reduce`.
    whole = splits == 1
    to, to_low, store = out, low, lora == "onepass" and low is not None
    if not whole:
        to = torch.empty(splits, rows, width, dtype=torch.float32, device=out.device)
        if store:
            to_low = torch.empty(splits, rows, rank, dtype=torch.float32, device=out.device)
    left_tma, right_tma, out_tma = False, "", False
    a: Any = left
    b: Any = right
    c: Any = to
    if arch >= 90 and left.dtype != torch.float32:
        describe = _descriptor_type()
        if describe is not None:
            if _describable(arch, left):
                a, left_tma = _describe(describe, left, [cfg.block_m, cfg.block_k]), True
            if _describable(arch, right):
                b, right_tma = _describe(describe, right, [cfg.block_k, cfg.block_n]), "rows"
            elif _describable(arch, right.t()):
                b = _describe(describe, right.t(), [cfg.block_n, cfg.block_k])
                right_tma = "columns"
            if whole and not add and _describable(arch, out):
                c, out_tma = _describe(describe, out, [cfg.block_m, cfg.block_n]), True
    on, seed, threshold = _drop(call, dropout)
    tiles = _cdiv(rows, cfg.block_m) * _cdiv(width, cfg.block_n)
    masked_lora_gemm_kernel[(tiles, splits)](
        a, b, bias if whole else None, down, to_low, up, lora_bias if whole else None, c,
        call.activation.row_adapter, seed, scaling, threshold, rows, width, depth, rank,
        each * cfg.block_k, *left.stride(), *right.stride(),
        *((0, 0) if down is None else down.stride()), 0 if to_low is None else to_low.stride(-2),
        *((0, 0) if up is None else up.stride()), to.stride(-2),
        LORA=lora, STORE_LOW=store, HAS_BIAS=whole and bias is not None,
        HAS_LORA_BIAS=whole and lora_bias is not None, DROPOUT=on,
        ADD=whole and add, ACTIVE_ONLY=active_only, SPLITS=splits, LEFT_TMA=left_tma,
        RIGHT_TMA=right_tma, OUT_TMA=out_tma, DTYPE=TL[left.dtype], PRECISION=precision,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        BLOCK_R=configs.gemm_rank_block(rank, cfg, lora), GROUP=GROUP,
        **_options(cfg),
    )  # fmt: skip
    if not whole:
        reduce(to, out, call, bias=bias, lora_bias=lora_bias, scaling=scaling, add=add)
        if store:
            assert to_low is not None and low is not None
            reduce(to_low, low, call)


def _aligned(t: Tensor) -> bool:
    return configs.is_aligned(t.stride(), t.data_ptr(), t.element_size())


def _describable(arch: int, t: Tensor) -> bool:
    return configs.can_describe(arch, t.shape, t.stride(), t.data_ptr(), t.element_size())


def _describe(describe: Any, t: Tensor, block: list[int]) -> Any:
    return describe(t, list(t.shape), list(t.stride()), block)


def grad(
    call: Call, wide: Tensor, low: Tensor, out: Tensor, *, transposed: bool = False,
    dropout: bool = False, sums: Tensor | None = None, scaling: float = 1.0,
) -> None:  # fmt: skip
    """out `[P, R]` (`[R, P]` with `transposed`) = Σ_active wideᵀ · low; sums `[P]` gets
    scaling · Σ_active wide. low `[M, R]`.
    """
    act, width, rank = call.activation, wide.shape[1], low.shape[1]
    cfg, block_r = configs.grad_config(target.arch(), low.dtype, rank)
    tiles = (_cdiv(width, cfg.block_n), _cdiv(rank, block_r))
    splits, each = _grad_splits(call, wide.device, tiles[0] * tiles[1], cfg)
    part, part_sums = _grad_parts(splits, out, sums)
    on, seed, threshold = _drop(call, dropout)
    masked_lora_grad_kernel[(tiles[0], tiles[1], splits)](
        wide, low, part, part_sums, act.active_rows, act.active_count, seed, scaling, threshold,
        width, rank, each * cfg.block_m, *wide.stride(), low.stride(0), out.numel(),
        *((1, width) if transposed else (rank, 1)), DROPOUT=on, SUMS=sums is not None,
        DTYPE=TL[low.dtype], PRECISION=target.float32_precision(), BLOCK_M=cfg.block_m,
        BLOCK_P=cfg.block_n, BLOCK_R=block_r, **_options(cfg),
    )  # fmt: skip
    _grad_reduce(call, splits, part, out, part_sums, sums)


def grad_b(
    call: Call, dy: Tensor, xa: Tensor, lora_b: Tensor, dya: Tensor, out: Tensor, *, scale: float,
    sums: Tensor | None = None, scaling: float = 1.0,
) -> None:  # fmt: skip
    """out `[N, R]` = Σ_active dyᵀ · xa and dya[active] = scale · dy · lora_b, dy read once."""
    act, (width, rank), cfg = call.activation, lora_b.shape, configs.GRAD_BOTH
    if act.max_active == 0:
        out.zero_()
        if sums is not None:
            sums.zero_()
        return
    blocks = _cdiv(width, cfg.block_n)
    splits, each = _grad_splits(call, dy.device, blocks, cfg)
    part, part_sums = _grad_parts(splits, out, sums)
    low = torch.empty(blocks, act.max_active, rank, dtype=torch.float32, device=dy.device)
    masked_lora_grad_b_kernel[(blocks, splits)](
        dy, xa, lora_b, part, low, part_sums, act.active_rows, act.active_count, scale, scaling,
        width, rank, each * cfg.block_m, act.max_active, *dy.stride(), xa.stride(0),
        *lora_b.stride(), out.numel(), rank, 1, SUMS=sums is not None, DTYPE=TL[xa.dtype],
        PRECISION=target.float32_precision(), BLOCK_M=cfg.block_m, BLOCK_P=cfg.block_n,
        BLOCK_R=rank_block(rank), **_options(cfg),
    )  # fmt: skip
    reduce(low, dya, call, rows=True, active=True)
    _grad_reduce(call, splits, part, out, part_sums, sums)


def _grad_splits(call: Call, device: torch.device, tiles: int, cfg: Config) -> tuple[int, int]:
    steps = max(1, _cdiv(call.activation.max_active, cfg.block_m))
    return _parts(steps, configs.split_count(tiles, steps, target.processors(device), 4))


def _grad_parts(splits: int, out: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if splits == 1:
        return out, sums
    part = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
    return part, None if sums is None else part.new_empty(splits, 1, sums.shape[0])


def _grad_reduce(
    call: Call, splits: int, part: Tensor, out: Tensor, part_sums: Tensor | None,
    sums: Tensor | None,
) -> None:  # fmt: skip
    if splits == 1:
        return
    reduce(part, out, call)
    if sums is not None:
        assert part_sums is not None
        reduce(part_sums, sums.unsqueeze(0), call)
