"""The package's Triton kernels do the work that the formula says, and no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from alora_kernels.activation import Activation
from alora_kernels.functional import alora_linear

from .report import Row, row
from .triton_driver import on_cpu

pytestmark = pytest.mark.ptx
M, K, N, R = 256, 128, 256, 32  # whole tiles of every config
ARCHS = ["sm_80", "sm_90"]


def moved(arch: str, strategy: str, active: int, rng: np.random.Generator) -> list[Row]:
    """One forward with the last `active` rows on: the counts of its launches."""
    shapes = ((M, K), (N, K), (N,), (R, K), (N, R))
    x, weight, bias, lora_a, lora_b = (
        torch.from_numpy(rng.standard_normal(s, np.float32) / s[-1] ** 0.5).bfloat16()
        for s in shapes
    )
    activation = Activation.from_mask(torch.arange(M) >= M - active)
    with torch.no_grad(), on_cpu(arch) as driver:
        y = alora_linear(
            x, weight, bias, lora_a, lora_b, activation, 0.5, backend="triton", strategy=strategy
        )
    exact = x.double() @ weight.double().T + bias.double()
    adapter = 0.5 * (x.double() @ lora_a.double().T) @ lora_b.double().T
    exact[M - active :] += adapter[M - active :]
    assert (y.double() - exact).norm() <= 0.01 * exact.norm()
    return [row(machine) for machine in driver.launches]


@pytest.mark.parametrize("strategy", ["delta", "tail", "onepass"])
@pytest.mark.parametrize("arch", ARCHS)
def test_an_inactive_adapter_costs_no_tensor_work(
    arch: str, strategy: str, rng: np.random.Generator
) -> None:
    base = 0 if strategy == "delta" else 2 * M * N * K  # delta's base is the vendor's GEMM
    assert sum(r["mma_flops"] for r in moved(arch, strategy, 0, rng)) == base


@pytest.mark.parametrize("strategy", ["delta", "tail", "onepass"])
@pytest.mark.parametrize("arch", ARCHS)
def test_tensor_work_is_the_formula_and_memory_is_used_whole(
    arch: str, strategy: str, rng: np.random.Generator
) -> None:
    active = M // 2
    rows = moved(arch, strategy, active, rng)
    base = 0 if strategy == "delta" else 2 * M * N * K
    adapter = sum(r["mma_flops"] for r in rows) - base
    if strategy == "onepass":  # x · lora_aᵀ once for each column of tiles
        columns, rest = divmod(adapter - 2 * active * R * N, 2 * active * R * K)
        assert rest == 0 and 1 <= columns <= N // 64
    else:
        assert adapter == 2 * active * R * (K + N)
    for r in rows:
        assert r["conflicts"] == 0, r
        # The few that fill no sector read one index or counter a warp.
        assert r["load_efficiency"] >= (1.0 if "gemm" in r["kernel"] else 0.97), r
        assert r["store_efficiency"] == 1.0, r
