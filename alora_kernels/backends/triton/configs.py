"""Launch configs: a frozen table, chosen by a pure function of the problem.

The figures are planned from tile sizes and shared memory, not tuned on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """Tile of one launch. `block_k` is the reduction's step."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


FLOAT32 = Config(64, 64, 16, 4, 2)
FEW_ROWS = Config(16, 64, 64, 4, 4)
SOME_ROWS = Config(64, 128, 64, 4, 3)
ACTIVE_ROWS = Config(32, 64, 64, 4, 3)  # shrink, expand_add and grad: tile of active rows
ACTIVE_FLOAT32 = Config(32, 64, 32, 4, 2)
GENERIC = Config(128, 128, 32, 8, 3)
GEMM = {
    80: Config(128, 128, 64, 8, 3),
    86: Config(128, 128, 32, 8, 3),
    89: Config(128, 128, 32, 8, 3),
    90: Config(128, 256, 64, 8, 3),
    100: Config(128, 256, 64, 8, 3),
    120: Config(128, 128, 32, 8, 3),
}


def gemm_config(arch: int, rows: int, dtype: torch.dtype) -> Config:
    """Config of the GEMM with M = `rows`."""
    if dtype == torch.float32:
        return FLOAT32
    if rows <= 16:
        return FEW_ROWS
    return SOME_ROWS if rows <= 256 else GEMM.get(arch, GENERIC)


def active_config(dtype: torch.dtype) -> Config:
    """Config of the kernels that visit active rows alone."""
    return ACTIVE_FLOAT32 if dtype == torch.float32 else ACTIVE_ROWS
