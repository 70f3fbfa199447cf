"""Planning is data: which kernel, which grid, how much shared memory. Pure functions.

A plan says all of a launch but its addresses. The same plan drives the launch on a GPU and the
execution of the kernel's PTX in the tests.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .layouts import (
    ACTIVE_ONLY,
    ADAPTER_FLOAT,
    ADD,
    DROPOUT,
    FLOAT_OUT,
    MAX_COLUMN_BLOCKS,
    VECTOR_ADAPTER,
    VECTOR_OUT,
)

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_RANK = 256
MAX_ONEPASS_RANK = 64
GEMM_COLUMNS, GEMM_STEP, GEMM_STAGES = 128, 32, 4
GEMM_ROWS = (128, 32)  # row tiles, the larger first
GRAD_P, GRAD_R, GRAD_SHARED = 128, 64, 4 * (32 * 128 + 32 * 64) * 2
GRAD_ROWS = 128  # least rows of one split
EXPAND_ROWS, EXPAND_COLUMNS = 64, 128
SHRINK_COLUMN_BLOCKS = 4  # of one block of threads
THREADS = 256


@dataclass(frozen=True)
class Plan:
    """One launch without its addresses."""

    kernel: str
    params: str  # name of the parameter struct
    grid: tuple[int, int, int]
    shared: int  # bytes of dynamic shared memory
    flags: int
    block: int = THREADS
    split_rows: int = 0  # grad and reduce: rows that one part adds up
    workspace: tuple[int, ...] = ()  # shape of a float32 workspace


class Operand(NamedTuple):
    """Layout of a matrix: strides in elements, and whether its address is a multiple of 16."""

    stride0: int
    stride1: int
    aligned: bool

    def vector(self, itemsize: int = 2) -> bool:
        """Whether rows along dimension 1 allow 16-byte accesses."""
        return self.aligned and self.stride1 == 1 and self.stride0 * itemsize % 16 == 0


def operand(tensor: torch.Tensor) -> Operand:
    stride0, stride1 = tensor.stride()
    return Operand(stride0, stride1, tensor.data_ptr() % 16 == 0)


@functools.lru_cache(maxsize=4096)
def gemm(
    dtype: torch.dtype, m: int, n: int, k: int, left: Operand, right: Operand, out: Operand,
    down: Operand | None, adapter_float: bool, dropout: bool, add: bool, active_only: bool,
    multiprocessors: int,
) -> Plan:  # fmt: skip
    """left `[M, K]`, right `[K, N]`, out `[M, N]`; `down` `[R, K]` makes it `onepass`."""
    layout = "strided"
    if left.vector() and k % 8 == 0:
        across = Operand(right.stride1, right.stride0, right.aligned)
        if across.vector():
            layout = "nk"
        elif right.vector() and n % 8 == 0:
            layout = "kn"
    columns = -(-n // GEMM_COLUMNS)
    large, small = GEMM_ROWS
    rows = large if m > small and -(-m // large) * columns >= multiprocessors // 2 else small
    stage = (rows + GEMM_COLUMNS + (0 if down is None else MAX_ONEPASS_RANK)) * GEMM_STEP * 2
    flags = ADAPTER_FLOAT * adapter_float | DROPOUT * dropout | ADD * add
    flags |= ACTIVE_ONLY * active_only | VECTOR_OUT * out.vector()
    if down is not None and k % 8 == 0 and down.vector(4 if adapter_float else 2):
        flags |= VECTOR_ADAPTER
    kind = "tail" if down is None else "onepass"
    return Plan(
        f"masked_lora_gemm_{NAMES[dtype]}_{layout}_{rows}_{kind}_kernel",
        "GemmParams",
        (-(-m // rows) * columns, 1, 1),
        GEMM_STAGES * stage + 16,
        flags,
    )


@functools.lru_cache(maxsize=4096)
def shrink(
    dtype: torch.dtype, active: int, k: int, left: Operand, right: Operand, blocks: int,
    adapter_float: bool, dropout: bool, multiprocessors: int,
) -> Plan:  # fmt: skip
    """left `[M, K]`, right `[R, K]`, `blocks` blocks of sixteen columns, `active` rows at most."""
    assert blocks <= MAX_COLUMN_BLOCKS
    path = "vector" if left.vector() and k % 8 == 0 else "strided"
    rows = 32 if path == "vector" and active >= 32 * 2 * multiprocessors else 16
    flags = ADAPTER_FLOAT * adapter_float | DROPOUT * dropout
    if k % 8 == 0 and right.vector(4 if adapter_float else 2):
        flags |= VECTOR_ADAPTER
    return Plan(
        f"masked_lora_shrink_{NAMES[dtype]}_{path}_{rows}_kernel",
        "ShrinkParams",
        (-(-active // rows), -(-blocks // SHRINK_COLUMN_BLOCKS), 1),
        8 * rows * 72 * 4,
        flags,
    )


@functools.lru_cache(maxsize=4096)
def expand_add(
    dtype: torch.dtype, active: int, n: int, out: Operand, adapter_float: bool, dropout: bool
) -> Plan:
    """out `[M, N]`, `active` rows at most."""
    pairs = out.stride1 == 1 and out.stride0 % 2 == 0 and out.aligned
    return Plan(
        f"masked_lora_expand_add_{NAMES[dtype]}_kernel",
        "ExpandParams",
        (-(-n // EXPAND_COLUMNS), -(-active // EXPAND_ROWS), 1),
        0,
        ADAPTER_FLOAT * adapter_float | DROPOUT * dropout | VECTOR_OUT * pairs,
    )


@functools.lru_cache(maxsize=4096)
def grad(
    dtype: torch.dtype, active: int, p: int, rank: int, wide: Operand, dropout: bool,
    float_out: bool, multiprocessors: int,
) -> tuple[Plan, Plan]:  # fmt: skip
    """The plans of grad and of reduce: wide `[M, P]`, low `[M, R]`, `active` rows at most."""
    r16 = -(-rank // 16) * 16
    path = "vector" if wide.vector() and p % 8 == 0 else "strided"
    tiles = -(-p // GRAD_P) * -(-rank // GRAD_R)
    # Enough splits to fill the machine twice, each long enough to be worth its part.
    splits = max(1, min(-(-active // GRAD_ROWS), -(-2 * multiprocessors // tiles)))
    split_rows = max(GRAD_ROWS, -(-active // splits))
    splits = max(1, -(-active // split_rows))
    part = Plan(
        f"masked_lora_grad_{NAMES[dtype]}_{path}_kernel",
        "GradParams",
        (-(-p // GRAD_P), -(-rank // GRAD_R), splits),
        GRAD_SHARED,
        DROPOUT * dropout,
        split_rows=split_rows,
        workspace=(splits, p, r16),
    )
    total = Plan(
        f"masked_lora_reduce_{NAMES[dtype]}_kernel",
        "ReduceParams",
        (min(-(-p * rank // THREADS), 8 * multiprocessors), 1, 1),
        0,
        FLOAT_OUT * float_out,
        split_rows=split_rows,
    )
    return part, total
