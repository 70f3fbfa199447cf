"""Launch configs: a frozen table and the pure functions that choose from it.

The figures are planned from tile sizes, registers and shared memory, not tuned on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

# Shared memory that one block may ask for, in bytes; GENERIC_LIMIT where the GPU is unknown.
# An arch is 80, 90, ... for sm_80, sm_90, ..., and 942, ... for gfx942, ...
SHARED_LIMIT = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
    942: 65536,
    950: 163840,
}
GENERIC_LIMIT = 101376
AMD = 900  # archs from here on are of AMD
MAX_RANK = 256
MAX_ONEPASS_RANK = 64  # padded: a second accumulator of this many columns still fits registers


@dataclass(frozen=True)
class Config:
    """Tile of one launch. `block_k` is the reduction's step.

    Constraints: blocks are powers of two of at least 16, what tensor cores multiply; 4 or 8 warps;
    1 to 6 stages.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for block in (self.block_m, self.block_n, self.block_k):
            if block < 16 or block & (block - 1):
                raise ValueError(f"{self}: blocks must be powers of two of at least 16")
        if self.warps not in (4, 8) or not 1 <= self.stages <= 6:
            raise ValueError(f"{self}: 4 or 8 warps and 1 to 6 stages are expected")

    def shared_bytes(self, itemsize: int, block_r: int = 0) -> int:
        """Shared memory that the pipelined tiles of both operands and `lora_a` take."""
        return self.stages * (self.block_m + self.block_n + block_r) * self.block_k * itemsize


# For each arch the configs by rows: the first whose bound is at least M serves.
Row = tuple[int | None, Config]
_SMALL = (Config(16, 64, 64, 4, 4), Config(64, 128, 32, 4, 4), Config(128, 128, 32, 8, 3))
_ADA = (*_SMALL[:2], Config(128, 128, 32, 8, 5))
_LARGE = (Config(16, 64, 128, 4, 4), Config(64, 128, 64, 4, 3), Config(128, 128, 64, 8, 4))
_HOPPER = (*_LARGE[:2], Config(128, 256, 64, 8, 4))
# AMD's pipeline holds the tiles of the next step in registers: two stages, one in shared memory.
_CDNA = (Config(16, 64, 128, 4, 2), Config(64, 128, 64, 4, 2), Config(128, 128, 64, 8, 2))
_BLACKWELL = (*_LARGE[:2], Config(128, 256, 64, 8, 3))


def _rows(configs: Sequence[Config]) -> tuple[Row, ...]:
    return tuple(zip((16, 256, None), configs))


GENERIC = _rows(_SMALL)
GEMM: dict[int, tuple[Row, ...]] = {
    80: _rows(_LARGE),
    86: _rows(_SMALL),
    89: _rows(_ADA),
    90: _rows(_HOPPER),
    100: _rows(_BLACKWELL),
    120: _rows(_SMALL),
    942: _rows(_CDNA),
    950: _rows(_CDNA),
}
# FMA holds a whole K step of both operands in registers; tf32 fragments are twice as large.
GEMM_IEEE = ((16, Config(16, 64, 16, 4, 2)), (None, Config(64, 64, 16, 4, 2)))
GEMM_TF32 = ((16, Config(16, 32, 32, 4, 4)), (None, Config(64, 64, 32, 4, 3)))
# Rows that are no multiple of 16 bytes: every element has its own pointer, so tiles are small.
GEMM_UNALIGNED = ((16, Config(16, 64, 32, 4, 4)), (None, Config(64, 64, 32, 4, 3)))

SHRINK = Config(32, 64, 64, 4, 4)
SHRINK_FLOAT32 = Config(32, 64, 32, 4, 2)
EXPAND = Config(32, 128, 64, 4, 2)
EXPAND_FLOAT32 = Config(32, 32, 16, 8, 2)
GRAD = Config(32, 64, 64, 4, 3)
GRAD_FLOAT32 = Config(32, 64, 32, 8, 2)
GRAD_BOTH = Config(32, 256, 64, 8, 3)
REDUCE = Config(16, 16, 16, 4, 1)  # four warps; its tile is of REDUCE_ELEMENTS
REDUCE_ELEMENTS = 1024  # that one program of `reduce` writes
REDUCE_UNROLL = 8  # parts whose loads are in flight together


def nearest(arch: int, known: Iterable[int]) -> int | None:
    """`arch`, or the nearest older one of its family (sm_103: sm_100; sm_121: sm_120), if known."""
    family = [k for k in known if k <= arch and k // 10 == arch // 10]
    return max(family, default=None)


def shared_limit(arch: int) -> int:
    """Shared memory that one block may ask for, in bytes."""
    found = nearest(arch, SHARED_LIMIT)
    return GENERIC_LIMIT if found is None else SHARED_LIMIT[found]


def rank_block(rank: int, limit: int = 64) -> int:
    """Columns of one tile of the rank: R rounded up to a power of two in [16, limit]."""
    return min(max(16, 1 << (rank - 1).bit_length()), limit)


def gemm_table(
    arch: int, dtype: torch.dtype, precision: str, aligned: bool = True
) -> tuple[Row, ...]:
    """The configs of `gemm` for one arch, by rows."""
    if dtype == torch.float32:
        return GEMM_IEEE if precision == "ieee" else GEMM_TF32
    if not aligned:
        return GEMM_UNALIGNED
    found = nearest(arch, GEMM)
    return GENERIC if found is None else GEMM[found]


def gemm_config(
    arch: int,
    rows: int,
    dtype: torch.dtype,
    precision: str,
    *,
    aligned: bool = True,
    lora: str = "none",
    rank: int = 0,
    dropout: bool = False,
    descriptors: bool = True,
) -> Config:
    """Config of `gemm` with M = `rows`, narrowed where registers would spill.

    Dropout's words live beside the accumulator, and in the dx of `onepass` so does a second tile
    of sums. On Blackwell the sums pass through registers on their way to and from tensor memory.
    Four warps hold low of at most 32 columns beside 128 of the output. For wider ranks `onepass`
    leaves one of more than three stages' shared memory to lora_a, and its steps of K are 64 deep at
    most; those of the widest tile of sm_80 and AMD 32. From Hopper on, steps for few rows are 64
    deep as well with dropout, and without `descriptors` (Triton 3.2 and 3.3): there drop words or
    pointers take the registers.
    """
    table = gemm_table(arch, dtype, precision, aligned)
    config = next(c for bound, c in table if bound is None or rows <= bound)
    widest, deepest, stages = config.block_n, config.block_k, config.stages
    warps = config.warps
    wide_low = lora == "onepass" and rank > 32
    if dtype == torch.float32 and precision == "ieee" and (dropout or lora == "onepass"):
        widest = 32
        if lora == "onepass" and config.block_m > 16:  # two accumulators of FMA
            warps = 8
    elif dropout:
        widest = 128 if lora == "tail" else max(64, config.block_n // 2)
    elif wide_low and config.warps == 4:
        widest = 64
    elif lora != "none" and arch // 10 == 10:
        widest = 128
    if wide_low:
        deepest = 64
        stages = min(stages, max(3, stages - 1))
        if config.warps == 8 and arch // 10 in (8, 94, 95):
            deepest = 32
    few = lora == "onepass" and config.block_m == 16 and 90 <= arch < AMD
    if few and (dropout or not descriptors):
        deepest = 64
    return dataclasses.replace(
        config, block_n=min(config.block_n, widest), block_k=min(config.block_k, deepest),
        warps=warps, stages=stages,
    )  # fmt: skip


def is_aligned(strides: Sequence[int], address: int, itemsize: int) -> bool:
    """Whether a matrix can be read 16 bytes at a time, along its rows or its columns."""
    return (
        1 in strides
        and address % 16 == 0
        and all(stride == 1 or stride * itemsize % 16 == 0 for stride in strides)
    )


def gemm_candidates(default: Config, arch: int, dtype: torch.dtype) -> list[Config]:
    """What opt-in tuning tries beside `default`: neighbours that fit the shared memory."""
    limit = shared_limit(arch)
    found = [default]
    for m, n in ((16, 64), (16, 128), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256)):
        for k, stages in ((32, 4), (64, 3), (64, 4), (128, 3)):
            config = Config(m, n, k, 8 if m * n >= 128 * 128 else 4, stages)
            fits = config.shared_bytes(dtype.itemsize, MAX_ONEPASS_RANK) <= limit
            small = (m == 16) == (default.block_m == 16)
            if fits and small and config != default:
                found.append(config)
    return found


def gemm_rank_block(rank: int, config: Config, lora: str) -> int:
    """Columns of low in one step: all of them with `onepass`, else at most a K step or 32."""
    limit = MAX_ONEPASS_RANK if lora == "onepass" else min(config.block_k, 32)
    return rank_block(max(rank, 1), limit)


def grad_config(dtype: torch.dtype, rank: int) -> tuple[Config, int]:
    """Config of `grad` and its columns of the rank; `dtype` of its products."""
    if dtype == torch.float32:
        return GRAD_FLOAT32, rank_block(rank, 32)
    return GRAD, rank_block(rank)


def shrink_config(dtype: torch.dtype) -> Config:
    """Config of `shrink`; `dtype` of its products. One for all lengths: few rows wait for memory,
    whatever the tile."""
    return SHRINK_FLOAT32 if dtype == torch.float32 else SHRINK


def split_count(tiles: int, steps: int, processors: int, least_steps: int) -> int:
    """In how many parts a reduction of `steps` is cut so that every processor has work.

    `tiles` programs without splitting; a part has at least `least_steps` steps. The sum of the
    parts is formed in a fixed order, so the result depends on sizes and GPU alone.
    """
    if tiles == 0:
        return 1
    return max(1, min(2 * processors // tiles, steps // least_steps))


def gemm_splits(rows: int, width: int, depth: int, config: Config, processors: int) -> int:
    """Split-K of `gemm`: for M ≤ 16 alone, where the weight's stream is the time."""
    if rows > 16:
        return 1
    return split_count(
        -(-width // config.block_n), -(-depth // config.block_k), processors, least_steps=4
    )


def both_in_one_pass(width: int, rank: int, dtype: torch.dtype) -> bool:
    """Whether one pass over dy for dya and dB moves fewer bytes than two.

    For each active row two passes read dy twice: 2·N·size bytes. One pass reads it once and writes
    and reads H = N/BLOCK_N float32 parts of dya: N·size + 8·R·H. In float32 arithmetic, not
    bytes, is the time, and two passes have the better tiles. A rank above 16 that leaves columns
    of its block empty takes too many registers.
    """
    if dtype == torch.float32 or rank > GRAD_BOTH.block_n:
        return False
    if rank > 16 and rank_block(rank, MAX_RANK) != rank:
        return False
    parts = -(-width // GRAD_BOTH.block_n)
    return 8 * rank_block(rank, MAX_RANK) * parts < width * dtype.itemsize


def can_describe(
    arch: int, shape: Sequence[int], strides: Sequence[int], address: int, itemsize: int
) -> bool:
    """Whether a tensor descriptor (TMA) can stand for a matrix: sm_90+, 16-byte base and rows."""
    return (
        90 <= arch < AMD
        and strides[1] == 1
        and strides[0] >= shape[1]
        and strides[0] * itemsize % 16 == 0
        and address % 16 == 0
        and min(shape) > 0
        and max(shape) < 2**31
    )
