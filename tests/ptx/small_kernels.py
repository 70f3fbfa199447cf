"""The kernels of kernels/*.cu with inputs and expected results, for tests and their mutants."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .formats import bf16_to_f32, f32_to_bf16
from .machine import Machine
from .parser import Module

Rng = np.random.Generator
Case = Callable[[Module, Rng, str], None]
ORDERS = ["lockstep", "round_robin", "reverse", "random"]


def launch(
    mod: Module, name: str, grid: tuple[int, ...], block: int | tuple[int, ...], args: list,  # type: ignore[type-arg]
    rng: Rng, order: str, gpu: Machine, **more: object,
) -> None:  # fmt: skip
    gpu.launch(
        mod, name, grid, block, args, order=order, seed=int(rng.integers(1 << 30)),
        reverse=order == "reverse", **more,  # type: ignore[arg-type]
    )  # fmt: skip


def result(gpu: Machine, address: int) -> np.ndarray:
    """The output, all of it written."""
    assert gpu.unwritten(address) == 0
    return gpu.get(address)


def integers(rng: Rng, *shape: int) -> np.ndarray:
    return rng.integers(-1000, 1000, shape, np.int32)


def axpy(mod: Module, rng: Rng, order: str) -> None:
    gpu, n = Machine(1 << 22), 150
    x, y = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
    out = gpu.empty((n,), np.float32)
    launch(mod, "axpy", (3,), 64, [gpu.put(x), gpu.put(y), out, 2.5, n], rng, order, gpu)
    exact = (2.5 * x.astype(np.float64) + y).astype(np.float32)
    np.testing.assert_allclose(result(gpu, out), exact, rtol=1e-6)


def block_sum(mod: Module, rng: Rng, order: str) -> None:
    gpu, x = Machine(1 << 22), rng.integers(-50, 50, (3, 256)).astype(np.float32)
    out = gpu.empty((3,), np.float32)
    launch(mod, "block_sum", (3,), 256, [gpu.put(x), out], rng, order, gpu)
    np.testing.assert_array_equal(result(gpu, out), x.sum(1))


def transpose(mod: Module, rng: Rng, order: str) -> None:
    gpu, x = Machine(1 << 22), rng.standard_normal((50, 70)).astype(np.float32)
    out = gpu.empty((70, 50), np.float32)
    launch(mod, "transpose", (3, 2), (32, 8), [gpu.put(x), out, 50, 70], rng, order, gpu)
    np.testing.assert_array_equal(result(gpu, out), x.T)
    assert gpu.count["smem_wavefronts"] == gpu.count["smem_ideal"]


def warp_rotate(mod: Module, rng: Rng, order: str) -> None:
    gpu, x = Machine(1 << 22), integers(rng, 64)
    out = gpu.empty((64,), np.int32)
    launch(mod, "warp_rotate", (1,), 64, [gpu.put(x), out], rng, order, gpu)
    np.testing.assert_array_equal(result(gpu, out), np.roll(x.reshape(2, 32), -1, 1).reshape(-1))


def ring_sum(mod: Module, rng: Rng, order: str) -> None:
    gpu, x = Machine(1 << 22), integers(rng, 7, 128, 4)
    out = gpu.empty((128, 4), np.int32)
    launch(mod, "ring_sum", (1,), 128, [gpu.put(x), out, 7], rng, order, gpu)
    np.testing.assert_array_equal(result(gpu, out), x.sum(0)[::-1])


def named_barriers(mod: Module, rng: Rng, order: str) -> None:
    gpu, x = Machine(1 << 22), integers(rng, 5, 32)
    out = gpu.empty((5, 32), np.int32)
    launch(mod, "named_barriers", (1,), 64, [gpu.put(x), out, 5], rng, order, gpu)
    np.testing.assert_array_equal(result(gpu, out), x[:, ::-1] + 1)


def last_block_sum(mod: Module, rng: Rng, order: str) -> None:
    gpu, x = Machine(1 << 22), integers(rng, 5, 64)
    part, count = gpu.empty((5, 64), np.int32), gpu.put(np.zeros(1, np.uint32))
    out = gpu.empty((64,), np.int32)
    launch(mod, "last_block_sum", (5,), 64, [gpu.put(x), part, count, out], rng, order, gpu)
    np.testing.assert_array_equal(result(gpu, out), 3 * x.sum(0)[::-1])


def chained_sum(mod: Module, rng: Rng, order: str) -> None:
    gpu, x = Machine(1 << 22), integers(rng, 6, 64)
    prefix, flag = gpu.empty((6, 64), np.int32), gpu.put(np.zeros(6, np.int32))
    launch(mod, "chained_sum", (6,), 64, [gpu.put(x), prefix, flag], rng, order, gpu)
    np.testing.assert_array_equal(result(gpu, prefix), x.cumsum(0))


def bulk_pipeline(mod: Module, rng: Rng, order: str) -> None:
    gpu, x = Machine(1 << 22), integers(rng, 5, 512)
    out = gpu.empty((5, 512), np.int32)
    launch(mod, "bulk_pipeline", (1,), 160, [gpu.put(x), out, 5], rng, order, gpu)
    np.testing.assert_array_equal(result(gpu, out), x + 1)


def wgmma_tile(mod: Module, rng: Rng, order: str) -> None:
    gpu = Machine(1 << 22)
    a, b = (f32_to_bf16(rng.standard_normal(s).astype(np.float32)) for s in ((64, 32), (8, 32)))
    d = gpu.empty((64, 8), np.float32)
    launch(mod, "wgmma_tile", (1,), 128, [gpu.put(a), gpu.put(b), d], rng, order, gpu)
    exact = bf16_to_f32(a).astype(np.float64) @ bf16_to_f32(b).astype(np.float64).T
    np.testing.assert_allclose(result(gpu, d), exact, rtol=1e-5, atol=1e-5)
    assert gpu.count["mma_flops"] == 2 * 64 * 8 * 32


def cluster_swap(mod: Module, rng: Rng, order: str) -> None:
    gpu, x = Machine(1 << 22), integers(rng, 4, 64)
    out = gpu.empty((4, 64), np.int32)
    args = [gpu.put(x), out]
    launch(mod, "cluster_swap", (4,), 64, args, rng, order, gpu, cluster=(2, 1, 1))
    np.testing.assert_array_equal(result(gpu, out), x[[1, 0, 3, 2], ::-1])


AMPERE: dict[str, Case] = {
    f.__name__: f
    for f in (axpy, block_sum, transpose, warp_rotate, ring_sum, named_barriers, last_block_sum,
              chained_sum)
}  # fmt: skip
HOPPER: dict[str, Case] = {f.__name__: f for f in (bulk_pipeline, wgmma_tile, cluster_swap)}
CASES = {**{k: ("ampere", "sm_80", f) for k, f in AMPERE.items()},
         **{k: ("hopper", "sm_90a", f) for k, f in HOPPER.items()}}  # fmt: skip
