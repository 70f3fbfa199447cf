"""Triton's own compiler calibrates the interpreter: tutorial-style kernels on every arch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton_driver import on_cpu

ARCHS = ["sm_80", "sm_90", "sm_100", "sm_120"]


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


def bf16(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).bfloat16()


def assert_close_as_torch(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`out` is at most twice as far from a @ b in float64 as torch's result in the same dtype."""
    exact = a.double() @ b.double()
    bound = 2 * (torch.mm(a, b).double() - exact).norm()
    assert (out.double() - exact).norm() <= bound


@pytest.mark.parametrize("arch", ARCHS)
def test_matmul(arch: str, rng: np.random.Generator) -> None:
    M, N, K = 150, 88, 200  # no size is a multiple of its tile
    a, b, c = bf16(rng, M, K), bf16(rng, K, N), torch.full((M, N), torch.nan).bfloat16()
    with on_cpu(arch) as driver:
        matmul_kernel[(3, 2)](a, b, c, M, N, K, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4)
    assert_close_as_torch(c, a, b)
    # Every tile multiplies whole fragments: sizes rounded up to 64.
    assert driver.machine.count["mma_flops"] == 2 * 192 * 128 * 256


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_descriptor_matmul_loads_and_stores_by_tma(arch: str, rng: np.random.Generator) -> None:
    M, N, K = 136, 72, 136
    a, bt, c = bf16(rng, M, K), bf16(rng, N, K), torch.full((M, N), torch.nan).bfloat16()
    block = 64
    descriptors = [TensorDescriptor.from_tensor(t, [block, block]) for t in (a, bt, c)]
    with on_cpu(arch):
        descriptor_matmul_kernel[(3, 2)](
            *descriptors, K, BLOCK_M=block, BLOCK_N=block, BLOCK_K=block, num_warps=4
        )
    assert_close_as_torch(c, a, bt.T)


@pytest.mark.parametrize("arch", ARCHS)
def test_softmax(arch: str, rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.standard_normal((3, 301), np.float32))
    y = torch.full_like(x, torch.nan)
    with on_cpu(arch):
        softmax_kernel[(3,)](x, y, x.stride(0), 301, BLOCK=512, num_warps=4)
    torch.testing.assert_close(y, torch.softmax(x, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("arch", ARCHS)
def test_dropout_is_the_same_on_every_arch(arch: str, rng: np.random.Generator) -> None:
    n, p = 4001, 0.3
    x = torch.from_numpy(rng.standard_normal(n, np.float32))
    y, first = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    seed = int(rng.integers(1 << 30))
    with on_cpu(arch):
        dropout_kernel[(4,)](x, y, seed, p, n, BLOCK=1024)
    with on_cpu("sm_80"):
        dropout_kernel[(4,)](x, first, seed, p, n, BLOCK=1024)
    kept = y != 0
    assert torch.equal(y, first)
    torch.testing.assert_close(y[kept], x[kept] / (1 - p), rtol=1e-6, atol=0)
    # Six standard deviations of a binomial count.
    assert abs(int(kept.sum()) - (1 - p) * n) < 6 * (n * p * (1 - p)) ** 0.5
