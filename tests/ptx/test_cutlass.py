"""Foreign kernels by expert authors run right and without a report: CUTLASS GEMMs."""

from __future__ import annotations

import numpy as np
import pytest

from .cutlass import WHY_NOT, build, gemm
from .formats import bf16_to_f32, f32_to_bf16

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.slow,
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]
SHAPES = [(100, 72, 136), (64, 128, 264), (130, 200, 64)]


def check(
    built: object, shape: tuple[int, int, int], rng: np.random.Generator, **options: object
) -> None:
    m, n, k = shape
    a, b = (f32_to_bf16(rng.standard_normal(s).astype(np.float32)) for s in ((m, k), (n, k)))
    got, gpu = gemm(built, a, b, np.uint16, **options)  # type: ignore[arg-type]
    exact = bf16_to_f32(a).astype(np.float64) @ bf16_to_f32(b).astype(np.float64).T
    best = bf16_to_f32(f32_to_bf16(exact.astype(np.float32)))
    assert np.linalg.norm(bf16_to_f32(got) - exact) <= 1.5 * np.linalg.norm(best - exact)
    assert gpu.count["mma_flops"] >= 2 * m * n * k


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sm80_multistage(shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    # Rows beyond M are never copied: they are multiplied as they lie, and not stored.
    check(build("cutlass_sm80", "compute_80"), shape, rng, shared_init=False)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sm90_ping_pong(
    shape: tuple[int, int, int], cluster: int, rng: np.random.Generator
) -> None:
    flags = (f"-DCLUSTER={cluster}", "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL=1")
    check(build("cutlass_sm90", "compute_90a", flags), shape, rng, processors=2 * cluster)


@pytest.mark.parametrize("order", ["round_robin", "reverse", "random"])
def test_no_order_of_warps_matters(order: str, rng: np.random.Generator) -> None:
    flags = ("-DCLUSTER=2", "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL=1")
    built = build("cutlass_sm90", "compute_90a", flags)
    seed = int(rng.integers(1 << 30))
    check(built, SHAPES[0], rng, processors=4, order=order, seed=seed)
