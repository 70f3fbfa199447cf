"""The same cases on the GPU of this machine, launched as users launch them."""

from __future__ import annotations

import pytest
import torch

from alora_kernels.backends.cuda import CudaBackend

from .cases import Case, run
from .covering import Factors, Row, covering
from .test_kernels import DECODE_FACTORS, FACTORS, ONEPASS_SM90_FACTORS, SM90_FACTORS, allowed

WHY_NOT = CudaBackend().why_not_here()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.usefixtures("poisoned"),
]


def pairs(factors: Factors) -> list[Row]:
    """A row for every pair of levels; what the interpreter pretends to be, the GPU is."""
    pretended = ("arch", "machine", "reverse")
    real = {name: levels for name, levels in factors.items() if name not in pretended}
    return covering(real, allowed, 2)


def test_every_pair_of_factors(seed: int) -> None:
    with torch.device("cuda"):
        for row in pairs(FACTORS):
            run(Case(**row), seed, gpu=True)


def test_hopper_factors(seed: int) -> None:
    with torch.device("cuda"):
        for row in pairs(SM90_FACTORS):
            run(Case("tail", **row), seed, gpu=True)


def test_hopper_onepass_factors(seed: int) -> None:
    with torch.device("cuda"):
        for row in pairs(ONEPASS_SM90_FACTORS):
            run(Case("onepass", **row), seed, gpu=True)


def test_decode_factors(seed: int) -> None:
    with torch.device("cuda"):
        for row in pairs(DECODE_FACTORS):
            run(Case("onepass", **row), seed, backward=False, gpu=True)


def test_real_sizes(seed: int) -> None:
    big = {"m": 4096, "k": 4096, "n": 4096, "r": 32, "active": "half_tile"}
    with torch.device("cuda"):
        for strategy in ("delta", "tail", "onepass"):
            run(Case(strategy, **big), seed, gpu=True)
