"""Tutorial-style Triton kernels, each with inputs and the result that it must give.

`CASES[name](arch, rng, mutate)` runs one for an arch; `options` go to `on_cpu`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton_driver import CpuPtxDriver, on_cpu


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(a + rows[:, None] * K + ks, mask=(rows[:, None] < M) & (ks < K), other=0.0)
        y = tl.load(b + ks[:, None] * N + cols, mask=(ks[:, None] < K) & (cols < N), other=0.0)
        acc = tl.dot(x, y, acc)
    inside = (rows[:, None] < M) & (cols < N)
    tl.store(c + rows[:, None] * N + cols, acc.to(c.dtype.element_ty), mask=inside)


@triton.jit
def descriptor_matmul_kernel(
    a, b, c, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a.load([row, k]), b.load([col, k]).T, acc)
    c.store([row, col], acc.to(tl.bfloat16))


@triton.jit
def softmax_kernel(x, y, stride, N, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * stride + cols, mask=cols < N, other=float("-inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(y + row * stride + cols, e / tl.sum(e, 0), mask=cols < N)


@triton.jit
def dropout_kernel(x, y, seed, p, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < N)
    keep = tl.rand(seed, i) > p
    tl.store(y + i, tl.where(keep, v / (1 - p), 0.0), mask=i < N)


@triton.jit
def grouped_gemm_kernel(
    a, b, c, starts, N, K, groups, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    # Persistent: the tiles of all groups are dealt out to the programs in turn.
    tiles_n = tl.cdiv(N, BLOCK_N)
    before = 0
    tile = tl.program_id(0)
    for g in range(groups):
        first, end = tl.load(starts + g), tl.load(starts + g + 1)
        tiles = tl.cdiv(end - first, BLOCK_M) * tiles_n
        while tile < before + tiles:
            at = tile - before
            rows = first + at // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
            cols = at % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k0 in range(0, K, BLOCK_K):
                ks = k0 + tl.arange(0, BLOCK_K)
                x = tl.load(
                    a + rows[:, None] * K + ks, mask=(rows[:, None] < end) & (ks < K), other=0.0
                )
                y = tl.load(
                    b + g * K * N + ks[:, None] * N + cols,
                    mask=(ks[:, None] < K) & (cols < N), other=0.0,
                )  # fmt: skip
                acc = tl.dot(x, y, acc)
            inside = (rows[:, None] < end) & (cols < N)
            tl.store(c + rows[:, None] * N + cols, acc.to(c.dtype.element_ty), mask=inside)
            tile += PROGRAMS
        before += tiles


@triton.jit
def split_sum_kernel(x, part, count, out, splits, N, BLOCK: tl.constexpr):
    # Every program writes its part; the last to arrive adds them in order.
    i = tl.arange(0, BLOCK)
    me = tl.program_id(0)
    tl.store(part + me * BLOCK + i, tl.load(x + me * N + i, mask=i < N, other=0.0) * 2)
    if tl.atomic_add(count, 1) == splits - 1:
        total = tl.zeros((BLOCK,), tl.float32)
        for s in range(splits):
            total += tl.load(part + s * BLOCK + (BLOCK - 1 - i))
        tl.store(out + i, total)


def bf16(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).bfloat16()


def assert_close_as_torch(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`out` is at most twice as far from a @ b in float64 as torch's result in the same dtype."""
    exact = a.double() @ b.double()
    bound = 2 * (torch.mm(a, b).double() - exact).norm()
    assert (out.double() - exact).norm() <= bound


def matmul(arch: str, rng: np.random.Generator, mutate: Any = None, **options: Any) -> CpuPtxDriver:
    return _matmul(arch, rng, 150, 88, 200, mutate, options)  # no size is a multiple of its tile


def aligned(
    arch: str, rng: np.random.Generator, mutate: Any = None, **options: Any
) -> CpuPtxDriver:
    return _matmul(arch, rng, 150, 96, 208, mutate, options)  # rows can be copied by 16 bytes


def _matmul(
    arch: str, rng: np.random.Generator, M: int, N: int, K: int, mutate: Any, options: Any
) -> CpuPtxDriver:
    a, b, c = bf16(rng, M, K), bf16(rng, K, N), torch.full((M, N), torch.nan).bfloat16()
    with on_cpu(arch, mutate, **options) as driver:
        matmul_kernel[(3, 2)](a, b, c, M, N, K, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4)
    assert_close_as_torch(c, a, b)
    # Every tile multiplies whole fragments: sizes rounded up to 64.
    assert driver.machine is not None
    assert driver.machine.count["mma_flops"] == 2 * 192 * 128 * 256
    return driver


def descriptor(
    arch: str, rng: np.random.Generator, mutate: Any = None, **options: Any
) -> CpuPtxDriver:
    M, N, K = 136, 72, 136
    a, bt, c = bf16(rng, M, K), bf16(rng, N, K), torch.full((M, N), torch.nan).bfloat16()
    block = 64
    descriptors = [TensorDescriptor.from_tensor(t, [block, block]) for t in (a, bt, c)]
    with on_cpu(arch, mutate, **options) as driver:
        descriptor_matmul_kernel[(3, 2)](
            *descriptors, K, BLOCK_M=block, BLOCK_N=block, BLOCK_K=block, num_warps=4
        )
    assert_close_as_torch(c, a, bt.T)
    return driver


def softmax(
    arch: str, rng: np.random.Generator, mutate: Any = None, **options: Any
) -> CpuPtxDriver:
    x = torch.from_numpy(rng.standard_normal((3, 301), np.float32))
    y = torch.full_like(x, torch.nan)
    with on_cpu(arch, mutate, **options) as driver:
        softmax_kernel[(3,)](x, y, x.stride(0), 301, BLOCK=512, num_warps=4)
    torch.testing.assert_close(y, torch.softmax(x, 1), rtol=1e-5, atol=1e-7)
    return driver


def dropout(
    arch: str, rng: np.random.Generator, mutate: Any = None, **options: Any
) -> CpuPtxDriver:
    n, p = 4001, 0.3
    x = torch.from_numpy(rng.standard_normal(n, np.float32))
    y, first = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    seed = int(rng.integers(1 << 30))
    with on_cpu(arch, mutate, **options) as driver:
        dropout_kernel[(4,)](x, y, seed, p, n, BLOCK=1024)
    with on_cpu("sm_80"):
        dropout_kernel[(4,)](x, first, seed, p, n, BLOCK=1024)
    kept = y != 0
    assert torch.equal(y, first)
    torch.testing.assert_close(y[kept], x[kept] / (1 - p), rtol=1e-6, atol=0)
    # Six standard deviations of a binomial count.
    assert abs(int(kept.sum()) - (1 - p) * n) < 6 * (n * p * (1 - p)) ** 0.5
    return driver


def grouped(
    arch: str, rng: np.random.Generator, mutate: Any = None, **options: Any
) -> CpuPtxDriver:
    sizes, N, K = [70, 0, 33, 64], 72, 100
    starts = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)
    a, b = bf16(rng, sum(sizes), K), bf16(rng, len(sizes), K, N)
    c = torch.full((sum(sizes), N), torch.nan).bfloat16()
    with on_cpu(arch, mutate, **options) as driver:
        grouped_gemm_kernel[(3,)](
            a, b, c, starts, N, K, len(sizes), BLOCK_M=32, BLOCK_N=64, BLOCK_K=64, PROGRAMS=3,
            num_warps=4,
        )  # fmt: skip
    for g, (first, end) in enumerate(itertools.pairwise(starts.tolist())):
        if end > first:
            assert_close_as_torch(c[first:end], a[first:end], b[g])
    return driver


def split_sum(
    arch: str, rng: np.random.Generator, mutate: Any = None, **options: Any
) -> CpuPtxDriver:
    x = torch.from_numpy(rng.standard_normal((5, 200), np.float32))
    part = torch.full((5, 256), torch.nan)
    count, out = torch.zeros(1, dtype=torch.int32), torch.full((256,), torch.nan)
    with on_cpu(arch, mutate, **options) as driver:
        split_sum_kernel[(5,)](x, part, count, out, 5, 200, BLOCK=256, num_warps=2)
    torch.testing.assert_close(out.flip(0)[:200], 2 * x.sum(0))
    return driver


Case = Callable[..., CpuPtxDriver]
CASES: dict[str, Case] = {
    "matmul": matmul,
    "aligned": aligned,
    "descriptor": descriptor,
    "softmax": softmax,
    "dropout": dropout,
    "grouped": grouped,
    "split_sum": split_sum,
}
