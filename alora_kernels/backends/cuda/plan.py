"""Plans kernel launches by pure functions: which kernel, which grid, how much shared memory.

A plan describes a launch completely, except for addresses. The same plan drives the launch on a GPU
and the execution of the kernel's PTX in the tests.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .params import (
    ACTIVE_ONLY,
    ADAPTER_FLOAT,
    ADD,
    ALONG_N,
    CONVERT_DOWN,
    CONVERT_UP,
    DROPOUT,
    MAX_COLUMN_BLOCKS,
    ONEPASS,
    PAIRS_ADAPTER,
    STRIDED,
    VECTOR_ADAPTER,
    VECTOR_OUT,
    VECTOR_UP,
)

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_RANK = 256
MAX_ONEPASS_RANK = 64
GEMM_COLUMNS, GEMM_STEP, GEMM_STAGES = 128, 32, 4
GEMM_ROWS = (128, 32)  # row tiles, the larger first
SM90_ROWS, SM90_STEP = 128, 64
SM90_STAGES = {256: 4, 128: 6}  # columns of the tile: stages of the ring buffer
FUSED_ROW_BLOCKS = 4096  # the most blocks of 128 rows: bits in the kernel's map of active blocks
FUSED_READERS = 0xFFFF  # the most column tiles: the kernel counts them in half a word
DECODE_ROWS, DECODE_COLUMNS, DECODE_STEP = 16, 64, 512  # DECODE_STEP: K per step of all eight warps
EXPAND_ROWS, EXPAND_COLUMNS = 64, 128
SHRINK_COLUMN_BLOCKS = 4  # column blocks of one thread block
THREADS = 256


class TensorMap(NamedTuple):
    """A matrix for bulk tensor copies. The innermost dimension is first; 128-byte swizzle."""

    dims: tuple[int, int]
    stride: int  # bytes from row to row
    box: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """One kernel launch, without addresses."""

    kernel: str
    params: str  # name of the parameter struct
    grid: tuple[int, int, int]
    shared: int  # bytes of dynamic shared memory
    flags: int
    block: int = THREADS
    dependent: bool = False  # may start before the previous kernel has ended
    cooperative: bool = False  # blocks wait for each other, so all must run at the same time
    split: int = 0  # grad and reduce: rows of one part; decode: the K of a slice
    workspace: tuple[int, ...] = ()  # shape of a float32 workspace
    counters: int = 0  # number of 32-bit counters, which are zero before and after the kernel
    maps: tuple[TensorMap | None, ...] = ()  # for the struct's map fields, in order
    tile: tuple[int, int] = (0, 0)  # rows and columns of the output that a block computes at a time


class Operand(NamedTuple):
    """The layout of a matrix: strides in elements, and whether its address is a multiple of 16."""

    stride0: int
    stride1: int
    aligned: bool

    def vector(self, itemsize: int = 2) -> bool:
        """Whether rows along dimension 1 allow 16-byte accesses."""
        return self.aligned and self.stride1 == 1 and self.stride0 * itemsize % 16 == 0

    @property
    def turned(self) -> Operand:
        """The transposed matrix."""
        return Operand(self.stride1, self.stride0, self.aligned)


def operand(tensor: torch.Tensor) -> Operand:
    stride0, stride1 = tensor.stride()
    return Operand(stride0, stride1, tensor.data_ptr() % 16 == 0)


@functools.lru_cache(maxsize=4096)
def gemm(
    dtype: torch.dtype, m: int, n: int, k: int, left: Operand, right: Operand, out: Operand,
    up: Operand | None, down: Operand | None, rank: int, adapter_float: bool, dropout: bool,
    add: bool, active_only: bool, multiprocessors: int,
) -> Plan:  # fmt: skip
    """The GEMM for all GPUs. left `[M, K]`, right `[K, N]`, out `[M, N]`, up `[R, N]`.

    With `down` `[R, K]` it is `onepass`.
    """
    vector = left.vector() and k % 8 == 0
    along_k = vector and right.turned.vector()
    along_n = vector and not along_k and right.vector() and n % 8 == 0
    strided = not along_k and not along_n
    columns = -(-n // GEMM_COLUMNS)
    large, small = GEMM_ROWS
    rows = large if m > small and -(-m // large) * columns >= multiprocessors // 2 else small
    stage = (rows + GEMM_COLUMNS + (0 if down is None else MAX_ONEPASS_RANK)) * GEMM_STEP * 2
    flags = ADAPTER_FLOAT * adapter_float | DROPOUT * dropout | ADD * add
    flags |= ACTIVE_ONLY * active_only | VECTOR_OUT * out.vector()
    if down is not None and k % 8 == 0 and down.vector(4 if adapter_float else 2):
        flags |= VECTOR_ADAPTER
    flags |= VECTOR_UP * _vector_up(up, n, rank, along_n, adapter_float)
    flags |= ALONG_N * along_n | STRIDED * strided | ONEPASS * (down is not None)
    return Plan(
        f"masked_lora_gemm_{NAMES[dtype]}_{rows}_kernel",
        "GemmParams",
        (-(-m // rows) * columns, 1, 1),
        GEMM_STAGES * stage + 16,
        flags,
        tile=(rows, GEMM_COLUMNS),
    )


def _vector_up(up: Operand | None, n: int, rank: int, along_n: bool, adapter_float: bool) -> bool:
    """Whether up `[R, N]` can be read in 16-byte pieces: along N if `along_n`, else along R."""
    if up is None or (n if along_n else rank) % 8:
        return False
    return (up if along_n else up.turned).vector(4 if adapter_float else 2)


def _converted(inner: Operand, adapter_float: bool) -> tuple[bool, bool]:
    """How Hopper's kernels load an adapter operand.

    First: whether the producer warps load and convert it, because a tensor map cannot. Second:
    whether they may read it in 16-byte pieces along its dimension 1.
    """
    return adapter_float or not inner.vector(), inner.vector(4 if adapter_float else 2)


def _right_map(depth: int, n: int, o: Operand, along_n: bool, columns: int) -> TensorMap:
    """The tensor map of a right operand `[depth, N]`.

    Its boxes have 64 rows of depth, and 64 columns (if `along_n`) or all `columns` of a tile.
    """
    if along_n:
        return TensorMap((n, depth), 2 * o.stride0, (64, SM90_STEP))
    return TensorMap((depth, n), 2 * o.stride1, (SM90_STEP, columns))


@functools.lru_cache(maxsize=4096)
def onepass_sm90(
    dtype: torch.dtype, m: int, n: int, k: int, rank: int, left: Operand, right: Operand,
    up: Operand, down: Operand, out: Operand, adapter_float: bool, add: bool, active_only: bool,
    multiprocessors: int,
) -> Plan | None:  # fmt: skip
    """`onepass` by Hopper's kernel; None if only the sm_80 kernel fits, or if it is better."""
    along_n = not right.turned.vector()
    if not (left.vector() and out.vector() and (right.vector() if along_n else True)) or k == 0:
        return None
    r16 = -(-rank // 16) * 16
    columns = 256 - r16
    tiles = -(-m // SM90_ROWS) * -(-n // columns)
    if m <= 64 or rank > MAX_ONEPASS_RANK or tiles < multiprocessors // 2:
        return None  # idle rows, no room for down, or too few of these large tiles to fill the GPU
    convert_up, vector_up = _converted(up if along_n else up.turned, adapter_float)
    convert_down, vector_down = _converted(down.turned if along_n else down, adapter_float)
    # With `along_n`, right comes in boxes of 64 columns. They overwrite columns of down, so the
    # producer must write down after them.
    convert_down = convert_down or along_n
    flags = ADAPTER_FLOAT * adapter_float | ADD * add | ACTIVE_ONLY * active_only
    flags |= CONVERT_UP * convert_up | VECTOR_UP * vector_up
    flags |= CONVERT_DOWN * convert_down | VECTOR_ADAPTER * vector_down
    stages = SM90_STAGES[256]
    return Plan(
        f"masked_lora_onepass_{NAMES[dtype]}_sm90_{columns}_kernel",
        "OnePassSm90Params",
        (min(tiles, multiprocessors), 1, 1),
        stages * (SM90_ROWS + 256) * 128 + 4 * 64 * 128 + stages * 24,
        flags | ALONG_N * along_n,
        block=384,
        maps=(
            None if convert_down else TensorMap((k, rank), 2 * down.stride0, (SM90_STEP, r16)),
            TensorMap((k, m), 2 * left.stride0, (SM90_STEP, SM90_ROWS)),
            _right_map(k, n, right, along_n, columns),
            None,
            None if convert_up else _right_map(rank, n, up, along_n, columns),
            TensorMap((n, m), 2 * out.stride0, (64, 64)),
        ),
        tile=(SM90_ROWS, columns),
    )


@functools.lru_cache(maxsize=4096)
def gemm_sm90(
    dtype: torch.dtype, m: int, n: int, k: int, rank: int, left: Operand, right: Operand,
    low: Operand | None, up: Operand | None, out: Operand, adapter_float: bool, dropout: bool,
    add: bool, active_only: bool, multiprocessors: int,
) -> Plan | None:  # fmt: skip
    """`tail` by Hopper's kernel; None if its tensor maps or its tiles do not fit the problem."""
    along_n = not right.turned.vector()
    if not (left.vector() and out.vector() and (right.vector() if along_n else True)) or k == 0:
        return None
    if m <= 64:
        return None  # at least half of a tile's 128 rows would be idle
    rows = -(-m // SM90_ROWS)
    columns = 256 if rows * -(-n // 256) >= multiprocessors else 128
    tiles = rows * -(-n // columns)
    convert = vector_up = False
    if up is not None:
        convert, vector_up = _converted(up if along_n else up.turned, adapter_float)
    maps = (
        TensorMap((k, m), 2 * left.stride0, (SM90_STEP, SM90_ROWS)),
        _right_map(k, n, right, along_n, columns),
        None
        if low is None
        else TensorMap((-(-rank // 16) * 16, m), 2 * low.stride0, (SM90_STEP, SM90_ROWS)),
        None if up is None or convert else _right_map(rank, n, up, along_n, columns),
        TensorMap((n, m), 2 * out.stride0, (64, 64)),
    )
    flags = ADAPTER_FLOAT * adapter_float | DROPOUT * dropout | ADD * add
    flags |= ACTIVE_ONLY * active_only | CONVERT_UP * convert | VECTOR_UP * vector_up
    stages = SM90_STAGES[columns]
    return Plan(
        f"masked_lora_gemm_{NAMES[dtype]}_sm90{'kn' if along_n else 'nk'}_{columns}_tail_kernel",
        "GemmSm90Params",
        (min(tiles, multiprocessors), 1, 1),
        stages * (SM90_ROWS + columns) * 128 + 4 * 64 * 128 + stages * 16,
        flags,
        block=384,
        dependent=True,
        maps=maps,
        tile=(SM90_ROWS, columns),
    )


@functools.lru_cache(maxsize=4096)
def fused_sm90(
    dtype: torch.dtype, m: int, n: int, k: int, rank: int, left: Operand, right: Operand,
    low: Operand, up: Operand, down: Operand, out: Operand, adapter_float: bool, add: bool,
    active_only: bool, multiprocessors: int,
) -> Plan | None:  # fmt: skip
    """`tail` in one launch of Hopper's persistent kernel, which also computes `low`.

    `down` `[R, K]`. None if its large tiles do not fill the GPU (then a separate shrink and smaller
    tiles are faster), or if the problem exceeds its counters.
    """
    gemm = gemm_sm90(
        dtype, m, n, k, rank, left, right, low, up, out, adapter_float, False, add, active_only,
        multiprocessors,
    )  # fmt: skip
    if gemm is None or "_256_" not in gemm.kernel:
        return None
    row_blocks = -(-m // SM90_ROWS)
    if row_blocks > FUSED_ROW_BLOCKS or -(-n // 256) > FUSED_READERS:
        return None
    along_n = "sm90kn" in gemm.kernel
    convert, vector_down = _converted(down.turned if along_n else down, adapter_float)
    down_map = None
    if not convert and along_n:
        down_map = TensorMap((rank, k), 2 * down.stride1, (64, SM90_STEP))
    elif not convert:
        down_map = TensorMap((k, rank), 2 * down.stride0, (SM90_STEP, 64))
    flags = gemm.flags | CONVERT_DOWN * convert | VECTOR_ADAPTER * vector_down
    return dataclasses.replace(
        gemm,
        kernel=f"masked_lora_fused_{NAMES[dtype]}_sm90{'kn' if along_n else 'nk'}_kernel",
        params="FusedSm90Params",
        shared=gemm.shared + FUSED_ROW_BLOCKS // 8 + 16,
        flags=flags,
        dependent=False,
        cooperative=True,
        counters=row_blocks,
        maps=(down_map, *gemm.maps),
    )


@functools.lru_cache(maxsize=4096)
def decode(
    dtype: torch.dtype, m: int, n: int, k: int, rank: int, left: Operand, weight: Operand,
    down: Operand, adapter_float: bool, multiprocessors: int,
) -> Plan | None:  # fmt: skip
    """`onepass` for few rows, split along K; None if it does not fit the problem.

    left `[M, K]`, weight `[N, K]`, down `[R, K]`.
    """
    if m > DECODE_ROWS or rank > MAX_ONEPASS_RANK or k % 8 or k == 0:
        return None
    if not (left.vector() and weight.vector()):
        return None
    tiles = -(-n // DECODE_COLUMNS)
    steps = -(-k // DECODE_STEP)
    slices = max(1, min(steps, -(-2 * multiprocessors // tiles)))
    k_slice = -(-steps // slices) * DECODE_STEP
    slices = -(-k // k_slice)
    flags = ADAPTER_FLOAT * adapter_float
    flags |= VECTOR_ADAPTER * down.vector(4 if adapter_float else 2)
    return Plan(
        f"masked_lora_decode_{NAMES[dtype]}_kernel",
        "DecodeParams",
        (tiles, slices, 1),
        0,
        flags,
        split=k_slice,
        workspace=(slices, tiles, DECODE_ROWS, DECODE_COLUMNS) if slices > 1 else (),
        tile=(DECODE_ROWS, DECODE_COLUMNS),
    )


@functools.lru_cache(maxsize=4096)
def shrink(
    dtype: torch.dtype, active: int, k: int, left: Operand, right: Operand, blocks: int,
    even: bool, adapter_float: bool, dropout: bool, multiprocessors: int,
) -> Plan:  # fmt: skip
    """The narrow product of active rows. left `[M, K]`, right `[R, K]`.

    It has `blocks` blocks of sixteen columns, and at most `active` rows. `even`: every R is even,
    so columns can be read in pairs.
    """
    assert blocks <= MAX_COLUMN_BLOCKS
    path = "vector" if left.vector() and k % 8 == 0 else "strided"
    rows = 32 if path == "vector" and active >= 32 * 2 * multiprocessors else 16
    flags = ADAPTER_FLOAT * adapter_float | DROPOUT * dropout
    if k % 8 == 0 and right.vector(4 if adapter_float else 2):
        flags |= VECTOR_ADAPTER
    elif k % 8 == 0 and even and right.aligned and right.stride0 == 1 and right.stride1 % 2 == 0:
        flags |= PAIRS_ADAPTER
    return Plan(
        f"masked_lora_shrink_{NAMES[dtype]}_{path}_{rows}_kernel",
        "ShrinkParams",
        (-(-active // rows), -(-blocks // SHRINK_COLUMN_BLOCKS), 1),
        8 * rows * 72 * 4,
        flags,
    )


@functools.lru_cache(maxsize=4096)
def expand_add(
    dtype: torch.dtype, active: int, n: int, rank: int, up: Operand, out: Operand,
    adapter_float: bool, dropout: bool,
) -> Plan:  # fmt: skip
    """Adds the adapter's part to active rows. up `[R, N]`, out `[M, N]`, at most `active` rows."""
    pairs = out.stride1 == 1 and out.stride0 % 2 == 0 and out.aligned
    vector = _vector_up(up, n, rank, up.stride1 == 1, adapter_float)
    return Plan(
        f"masked_lora_expand_add_{NAMES[dtype]}_kernel",
        "ExpandParams",
        (-(-active // EXPAND_ROWS), -(-n // EXPAND_COLUMNS), 1),
        0,
        ADAPTER_FLOAT * adapter_float | DROPOUT * dropout | VECTOR_OUT * pairs | VECTOR_UP * vector,
    )
