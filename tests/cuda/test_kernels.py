"""Every kernel, dtype and strategy, executed from the plans that the backend itself makes.

The sizes cross tile edges: 32 and 128 rows, 128 columns, 32 steps, 16 ranks; odd ones force the
strided kernels. Pairs of factors are covered here, their whole product with `--exhaustive`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from alora_kernels.backends.cuda import launch

from .cases import Case, run
from .covering import Row, pairwise, product

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("poisoned")]

FACTORS: dict[str, list[Any]] = {
    "strategy": ["delta", "tail", "onepass"],
    "dtype": [torch.bfloat16, torch.float16],
    "adapter": ["same", "fp32"],
    "m": [1, 33, 130],
    "k": [8, 72, 33],
    "n": [16, 136, 35],
    "r": [1, 8, 16, 24, 32, 64, 128, 256],
    "active": ["none", "one", "some", "half_tile", "all"],
    "layout": ["plain", "strided", "offset", "weight_t"],
    "dropout": [0.0, 0.3],
    "prefix_grad": [True, False],
    "bias": ["none", "base", "both"],
    "reverse": [False, True],
    "machine": [1, 1000],
}


# Hopper's gemm: more than 64 rows, aligned operands; dx reads the weight the other way.
SM90_FACTORS: dict[str, list[Any]] = {
    "dtype": [torch.bfloat16, torch.float16],
    "adapter": ["same", "fp32"],
    "m": [65, 130],
    "k": [8, 264],  # the ring goes round
    "n": [16, 136, 264],
    "r": [1, 8, 24, 72, 256],
    "active": ["none", "one", "some", "half_tile", "all"],
    "layout": ["plain", "weight_t"],
    "dropout": [0.0, 0.3],
    "prefix_grad": [True, False],
    "bias": ["none", "base", "both"],
    "reverse": [False, True],
    "count": [1, 2],
    "machine": [1, 3, 1000],
}

DECODE_FACTORS: dict[str, list[Any]] = {
    "dtype": [torch.bfloat16, torch.float16],
    "adapter": ["same", "fp32"],
    "m": [1, 9, 16],
    "k": [8, 520, 2056],
    "n": [1, 64, 136],
    "r": [1, 16, 24, 64],
    "active": ["none", "one", "some", "all"],
    "bias": ["none", "base", "both"],
    "reverse": [False, True],
    "machine": [1, 3, 1000],
}


def allowed(row: Row) -> bool:
    onepass = row.get("strategy") == "onepass"
    return not (onepass and (row["dropout"] > 0 or row["r"] > 64))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    part = metafunc.config.getoption("--exhaustive")
    for name, factors in (
        ("row", FACTORS), ("sm90_row", SM90_FACTORS), ("decode_row", DECODE_FACTORS)
    ):  # fmt: skip
        if name in metafunc.fixturenames:
            rows = product(factors, allowed, part) if part else pairwise(factors, allowed)
            ids = ["-".join(str(v).removeprefix("torch.") for v in row.values()) for row in rows]
            metafunc.parametrize(name, rows, ids=ids)


def test_matches_reference(row: Row, seed: int) -> None:
    run(Case(**row), seed)


def test_hopper_matches_reference(sm90_row: Row, seed: int) -> None:
    sender = run(Case("tail", arch="sm_90a", **sm90_row), seed)
    gemms = {k for k in sender.kernels if "gemm" in k or "fused" in k}
    assert gemms and all("sm90" in k for k in gemms)


def test_decode_matches_reference(decode_row: Row, seed: int) -> None:
    sender = run(Case("onepass", **decode_row), seed, backward=False)
    assert [k for k in sender.kernels if "decode" not in k] == []
    assert all((t == 0).all() for t in launch._arrived.values())


@pytest.mark.parametrize("strategy", ["delta", "tail", "onepass"])
@pytest.mark.parametrize(
    "options",
    [
        {"count": 3},
        {"count": 2, "r": 16, "bias": "both", "prefix_grad": False},
        {"known": False},
        {"k": 200, "m": 17},  # the ring goes round
        {"m": 300, "n": 8, "k": 16, "r": 8, "machine": 1, "active": "half_tile"},  # row groups
    ],
    ids=str,
)
def test_options(strategy: str, options: dict[str, Any], seed: int) -> None:
    run(dataclasses.replace(Case(strategy), **options), seed)


def test_a_group_shares_one_shrink(seed: int) -> None:
    sender = run(Case("tail", count=3, r=32), seed)
    shrinks = [k for k in sender.kernels if "shrink" in k]
    assert len(shrinks) == 1 + 3  # xa of the group; dya has its own left operand each


def test_add_reads_active_rows_alone(seed: int) -> None:
    run(Case("delta", add=True, dropout=0.3, bias="both"), seed)
