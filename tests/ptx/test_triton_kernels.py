"""Triton's own compiler calibrates the interpreter: tutorial-style kernels on every arch."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from .triton_kernels import CASES

pytestmark = pytest.mark.ptx
ARCHS = ["sm_80", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", CASES)
def test_kernel(kernel: str, arch: str, rng: np.random.Generator) -> None:
    CASES[kernel](arch, rng)


@pytest.mark.parametrize("order", ["round_robin", "reverse", "random"])
@pytest.mark.parametrize("kernel, arch", [("descriptor", "sm_90"), ("split_sum", "sm_80")])
def test_no_order_of_warps_and_blocks_matters(
    kernel: str, arch: str, order: str, rng: np.random.Generator
) -> None:
    CASES[kernel](arch, rng, order=order, seed=int(rng.integers(1 << 30)))
