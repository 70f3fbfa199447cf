"""The CUDA and the Triton kernels on the same inputs, both executed from their PTX on the CPU.

Each is held against the reference first. Between themselves they may differ by what the reference
allows one of them: twice PyTorch's own error.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from alora_kernels.backends.triton import TritonBackend

from ..oracle import assert_error
from ..ptx.triton_driver import on_cpu
from .cases import Case, run

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize(
    "strategy, options",
    [
        ("delta", {}),
        ("delta", {"dropout": 0.3, "adapter": "fp32", "bias": "both", "r": 40}),
        ("tail", {"dtype": torch.float16, "layout": "weight_t"}),
        ("tail", {"dropout": 0.3, "adapter": "fp32", "bias": "both"}),
        ("tail", {"m": 130, "n": 264, "r": 8, "active": "half_tile", "arch": "sm_90a"}),
        ("tail", {"count": 2, "prefix_grad": False, "layout": "strided", "k": 33}),
        ("onepass", {"adapter": "fp32", "bias": "both"}),
        ("onepass", {"dtype": torch.float16, "m": 9, "r": 64, "active": "all"}),
    ],
    ids=str,
)
def test_cuda_and_triton_agree(strategy: str, options: dict[str, Any], seed: int) -> None:
    case = dataclasses.replace(Case(strategy), **options)
    cuda = run(case, seed)
    torch.manual_seed(seed)
    with on_cpu(case.arch.removesuffix("a")) as driver:
        triton = run(case, seed, other=TritonBackend())
    assert cuda.kernels and driver.launches
    assert cuda.results.keys() == triton.results.keys()
    for name, value in cuda.results.items():
        twin = triton.results[name]
        assert value.dtype == twin.dtype
        assert_error(name, value, twin.double(), cuda.errors[name], case.dtype)
    assert cuda.errors == triton.errors, "the inputs were not the same"
