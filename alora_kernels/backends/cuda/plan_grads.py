"""Plans the kernels for dA and dB, and for dya if one pass over dy computes both dB and dya."""

from __future__ import annotations

import functools

import torch

from .params import ADAPTER_FLOAT, DROPOUT, FLOAT_OUT, STRIDED
from .plan import NAMES, THREADS, Operand, Plan

GRAD_P, GRAD_R, GRAD_SHARED = 128, 64, 4 * (32 * 128 + 32 * 64) * 2
GRAD_ROWS = 128  # a split has at least so many rows
BOTH_N, BOTH_R = 512, 32  # columns of dy and ranks that a block of grad_b keeps in registers
BOTH_SHARED = 3 * (16 * 512 + 16 * 32) * 2 + 2 * 8 * 16 * 32 * 4


def _rank16(rank: int) -> int:
    return -(-rank // 16) * 16


def _grad_splits(active: int, p: int, rank: int, multiprocessors: int) -> tuple[int, int]:
    """(splits, rows of a split): enough blocks to fill the GPU twice, but no split too short."""
    tiles = -(-p // GRAD_P) * -(-rank // GRAD_R)
    splits = max(1, min(-(-active // GRAD_ROWS), -(-2 * multiprocessors // tiles)))
    rows = max(GRAD_ROWS, -(-active // splits))
    return max(1, -(-active // rows)), rows


def _both_splits(active: int, n: int, rank: int, multiprocessors: int) -> tuple[int, int]:
    """(G, rows of a split) of grad_b: one wave, with one block on each multiprocessor.

    A split has at least 4·R rows. With fewer, it would move more bytes for its part of dB than it
    reads from dy.
    """
    splits = max(1, multiprocessors // -(-n // BOTH_N))
    rows = max(4 * _rank16(rank), -(-active // splits))
    return max(1, -(-active // rows)), rows


def two_pass_bytes(active: int, n: int, rank: int, multiprocessors: int) -> int:
    """Bytes moved if shrink computes dya and grad dB: dy twice, dB's parts written and read."""
    splits, _ = _grad_splits(active, n, rank, multiprocessors)
    return 2 * 2 * active * n + 8 * _rank16(rank) * splits * n


def one_pass_bytes(active: int, n: int, rank: int, multiprocessors: int) -> int:
    """Bytes moved if grad_b computes both: dy once, and 8·R·(G·N + H·active) for their parts.

    H = N/512 is the smallest number of column parts that the registers allow. G is the smallest
    number of splits that gives every multiprocessor a block (see `_both_splits`).
    """
    splits, _ = _both_splits(active, n, rank, multiprocessors)
    parts = splits * n + -(-n // BOTH_N) * active
    return 2 * active * n + 8 * _rank16(rank) * parts


def both_in_one_pass(active: int, n: int, rank: int, dy: Operand, multiprocessors: int) -> bool:
    """Whether grad_b fits the problem and moves fewer bytes than shrink and grad."""
    fits = rank <= BOTH_R and dy.vector() and n % 8 == 0 and active > 0
    sizes = active, n, rank, multiprocessors
    return fits and one_pass_bytes(*sizes) < two_pass_bytes(*sizes)


def _reduce(
    dtype: torch.dtype, elements: int, float_out: bool, split_rows: int, multiprocessors: int
) -> Plan:
    """Adds the parts of `elements` sums in order. A part covers `split_rows` active rows."""
    return Plan(
        f"masked_lora_reduce_{NAMES[dtype]}_kernel",
        "ReduceParams",
        (max(1, min(-(-elements // THREADS), 8 * multiprocessors)), 1, 1),
        0,
        FLOAT_OUT * float_out,
        split=split_rows,
    )


@functools.lru_cache(maxsize=4096)
def grad(
    dtype: torch.dtype, active: int, p: int, rank: int, wide: Operand, dropout: bool,
    float_out: bool, multiprocessors: int,
) -> tuple[Plan, Plan]:  # fmt: skip
    """The plans of grad and of reduce. wide `[M, P]`, low `[M, R]`, at most `active` rows."""
    splits, rows = _grad_splits(active, p, rank, multiprocessors)
    part = Plan(
        f"masked_lora_grad_{NAMES[dtype]}_kernel",
        "GradParams",
        (-(-p // GRAD_P), -(-rank // GRAD_R), splits),
        GRAD_SHARED,
        DROPOUT * dropout | STRIDED * (not wide.vector() or p % 8 > 0),
        split=rows,
        workspace=(splits, p, _rank16(rank)),
    )
    return part, _reduce(dtype, p * rank, float_out, rows, multiprocessors)


@functools.lru_cache(maxsize=4096)
def grad_b(
    dtype: torch.dtype, active: int, n: int, rank: int, dy: Operand, adapter_float: bool,
    multiprocessors: int,
) -> tuple[Plan, Plan, Plan] | None:  # fmt: skip
    """The plans of grad_b, of dB's reduce and of dya's; None if two passes move fewer bytes.

    dy `[M, N]`, at most `active` rows. dB has the adapter's dtype, dya has dy's.
    """
    if not both_in_one_pass(active, n, rank, dy, multiprocessors):
        return None
    splits, rows = _both_splits(active, n, rank, multiprocessors)
    parts, rank16 = -(-n // BOTH_N), _rank16(rank)
    both = Plan(
        f"masked_lora_grad_b_{NAMES[dtype]}_kernel",
        "GradBParams",
        (parts, splits, 1),
        BOTH_SHARED,
        ADAPTER_FLOAT * adapter_float,
        split=rows,
        workspace=(splits * n + parts * active, rank16),
    )
    return (
        both,
        _reduce(dtype, n * rank, adapter_float, rows, multiprocessors),
        _reduce(dtype, active * rank16, False, 0, multiprocessors),
    )
