"""The persistent kernel of Hopper: blocks that wait for each other, in several orders."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from alora_kernels.backends.cuda import plan as planning

from ..ptx import PtxError
from .cases import Case, run
from .covering import Row, chosen

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("poisoned")]

# Four tiles or more, so that even three multiprocessors take the persistent kernel forward.
FUSED_FACTORS: dict[str, list[Any]] = {
    "dtype": [torch.bfloat16, torch.float16],
    "adapter": ["same", "fp32"],
    "m": [130, 258],
    "k": [8, 136],
    "r": [1, 8, 16, 24, 32, 64, 72, 128, 256],
    "active": ["one", "some", "half_tile", "all"],
    "layout": ["plain", "weight_t"],
    "prefix_grad": [True, False],
    "bias": ["none", "both"],
    "reverse": [False, True],
    "machine": [1, 3],
    "order": ["lockstep", "round_robin", "reverse", "random"],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fused_row" in metafunc.fixturenames:
        rows = chosen(metafunc.config, FUSED_FACTORS, lambda row: True)
        ids = ["-".join(str(v).removeprefix("torch.") for v in row.values()) for row in rows]
        metafunc.parametrize("fused_row", rows, ids=ids)


def fused(kernels: list[str]) -> list[str]:
    return [k for k in kernels if "_fused_" in k]


def test_matches_reference(fused_row: Row, seed: int) -> None:
    sender = run(Case("tail", n=264, arch="sm_90a", **fused_row), seed)
    assert fused(sender.kernels)[0] == sender.kernels[0]  # y, xa: one launch
    sender.assert_counters_are_zero()


@pytest.mark.parametrize("order", ["round_robin", "reverse", "random"])
def test_warps_run_in_any_order(order: str, seed: int) -> None:
    case = Case("tail", m=130, k=72, n=264, r=16, active="all", arch="sm_90a", machine=3)
    sender = run(dataclasses.replace(case, order=order), seed, backward=False)
    assert fused(sender.kernels) == sender.kernels
    sender.assert_counters_are_zero()


@pytest.mark.parametrize(
    "options",
    [
        {"count": 2, "r": 16},  # dx is added to; forward shares one shrink
        {"known": False},
        {"r": 256},
        {"active": "none", "known": False},  # no narrow tile, which the device alone finds out
        {"m": 1300, "n": 16, "k": 8, "r": 8},  # row groups; more narrow tiles
    ],
    ids=str,
)
def test_options(options: dict[str, Any], seed: int) -> None:
    case = Case("tail", m=130, k=72, n=264, arch="sm_90a", machine=2)
    sender = run(dataclasses.replace(case, **options), seed)
    assert fused(sender.kernels)
    sender.assert_counters_are_zero()


def test_a_grid_larger_than_the_machine_never_ends(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("tail", m=300, k=72, n=520, r=16, active="half_tile", arch="sm_90a", machine=3)
    case = dataclasses.replace(case, reverse=True)  # the last blocks are on the machine first
    run(case, seed, backward=False)
    right = planning.fused_sm90

    def too_large(*args: Any) -> Any:
        plan = right(*args)
        assert plan is not None and plan.cooperative and plan.grid == (3, 1, 1)
        return dataclasses.replace(plan, grid=(9, 1, 1))

    monkeypatch.setattr(planning, "fused_sm90", too_large)
    with pytest.raises(PtxError, match="deadlock"):
        run(case, seed, backward=False)
