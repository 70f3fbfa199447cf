"""The same cases on the GPU of this machine, launched as users launch them."""

from __future__ import annotations

import pytest
import torch

from alora_kernels.backends.cuda import CudaBackend

from .cases import Case, run
from .covering import pairwise
from .test_kernels import DECODE_FACTORS, FACTORS, SM90_FACTORS, allowed

WHY_NOT = CudaBackend().why_not_here()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.usefixtures("poisoned"),
]


def test_every_pair_of_factors(seed: int) -> None:
    with torch.device("cuda"):
        for row in pairwise(FACTORS, allowed):
            run(Case(**row), seed, gpu=True)


def test_hopper_factors(seed: int) -> None:
    with torch.device("cuda"):
        for row in pairwise(SM90_FACTORS, allowed):
            run(Case("tail", **row), seed, gpu=True)


def test_decode_factors(seed: int) -> None:
    with torch.device("cuda"):
        for row in pairwise(DECODE_FACTORS, allowed):
            run(Case("onepass", **row), seed, backward=False, gpu=True)


def test_real_sizes(seed: int) -> None:
    big = {"m": 4096, "k": 4096, "n": 4096, "r": 32, "active": "half_tile"}
    with torch.device("cuda"):
        for strategy in ("delta", "tail", "onepass"):
            run(Case(strategy, **big), seed, gpu=True)
