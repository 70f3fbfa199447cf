"""Every kernel, dtype and strategy, executed from the plans that the backend itself makes.

The sizes cross tile edges: 32 and 128 rows, 128 columns, 32 steps, 16 ranks; odd ones force the
strided kernels. Pairs of factors are covered here, triples on sm_80, and more with `--strength` and
`--exhaustive`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from alora_kernels.activation import Activation
from alora_kernels.backends.cuda import CudaBackend
from alora_kernels.backends.cuda.steps import Launch
from alora_kernels.contract import Call, Projection

from ..ptx import PtxError
from .cases import Case, run
from .covering import Row, chosen
from .ptx_sender import PtxSender

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("poisoned")]

FACTORS: dict[str, list[Any]] = {
    "arch": ["sm_80", "sm_90a"],
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
    "r": [1, 8, 16, 24, 32, 64, 72, 128, 256],
    "active": ["none", "one", "some", "half_tile", "all"],
    "layout": ["plain", "weight_t"],
    "dropout": [0.0, 0.3],
    "prefix_grad": [True, False],
    "bias": ["none", "base", "both"],
    "reverse": [False, True],
    "count": [1, 2],
    "machine": [1, 3, 1000],
}

# onepass of Hopper: each R16 has a kernel with tiles of its own width.
ONEPASS_SM90_FACTORS: dict[str, list[Any]] = {
    "dtype": [torch.bfloat16, torch.float16],
    "adapter": ["same", "fp32"],
    "m": [65, 130],
    "k": [8, 264],  # the ring goes round
    "n": [16, 200, 264],
    "r": [1, 8, 16, 24, 32, 48, 64],
    "active": ["none", "one", "some", "half_tile", "all"],
    "layout": ["plain", "weight_t"],
    "prefix_grad": [True, False],
    "bias": ["none", "base", "both"],
    "reverse": [False, True],
    "count": [1, 2],
    "machine": [1, 3],
}

DECODE_FACTORS: dict[str, list[Any]] = {
    "arch": ["sm_80", "sm_90a"],
    "dtype": [torch.bfloat16, torch.float16],
    "adapter": ["same", "fp32"],
    "m": [1, 9, 16],
    "k": [8, 520, 2056],
    "n": [1, 64, 136],
    "r": [1, 8, 16, 24, 32, 64],
    "active": ["none", "one", "some", "all"],
    "bias": ["none", "base", "both"],
    "reverse": [False, True],
    "machine": [1, 3, 1000],
}


ROWS = {
    "row": FACTORS,
    "sm90_row": SM90_FACTORS,
    "onepass_sm90_row": ONEPASS_SM90_FACTORS,
    "decode_row": DECODE_FACTORS,
}
# Which kernel of sm_80 runs follows from dtype, rows, multiprocessors and alignment together: pairs
# of the factors miss some.
STRENGTH = {"row": 3}


def allowed(row: Row) -> bool:
    onepass = row.get("strategy") == "onepass"
    return not (onepass and (row["dropout"] > 0 or row["r"] > 64))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, factors in ROWS.items():
        if name in metafunc.fixturenames:
            rows = chosen(metafunc.config, factors, allowed, STRENGTH.get(name, 2))
            ids = ["-".join(str(v).removeprefix("torch.") for v in row.values()) for row in rows]
            metafunc.parametrize(name, rows, ids=ids)


def test_matches_reference(row: Row, seed: int) -> None:
    run(Case(**row), seed)


def test_hopper_matches_reference(sm90_row: Row, seed: int) -> None:
    sender = run(Case("tail", arch="sm_90a", **sm90_row), seed)
    gemms = {k for k in sender.kernels if "gemm" in k or "fused" in k}
    assert gemms and all("sm90" in k for k in gemms)


def test_onepass_of_hopper_matches_reference(onepass_sm90_row: Row, seed: int) -> None:
    sender = run(Case("onepass", arch="sm_90a", **onepass_sm90_row), seed)
    columns = 256 - -(-onepass_sm90_row["r"] // 16) * 16
    wide = {k for k in sender.kernels if k.endswith(f"_sm90_{columns}_kernel")}
    assert wide and not [k for k in sender.kernels if "gemm" in k or "shrink" in k]


@pytest.mark.parametrize("strategy, dropout", [("tail", 0.3), ("tail", 0.0), ("onepass", 0.0)])
def test_hopper_reads_half_a_chunk_of_float_adapters(
    strategy: str, dropout: float, seed: int
) -> None:
    """Rows of 20 floats allow 16-byte loads, but their last chunk of eight is not whole."""
    sizes = {"m": 130, "k": 72, "n": 264, "r": 20, "machine": 1}
    case = Case(strategy, adapter="fp32", arch="sm_90a", dropout=dropout, **sizes)
    sender = run(case, seed)
    assert sum("sm90" in k for k in sender.kernels) == 2


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_onepass_selects_low_of_active_rows(arch: str, seed: int) -> None:
    """An inactive row whose x · lora_aᵀ overflows keeps the base's finite result."""
    m, n, k, r = 130, 264, 72, 24
    mask = torch.arange(m) % 3 == 0
    x = torch.randn(m, k).bfloat16()
    x[~mask] = 1e38
    weight = (torch.randn(n, k) * 1e-3).bfloat16()
    lora_a, lora_b = torch.full((r, k), 8.0).bfloat16(), torch.randn(n, r).bfloat16()
    act = Activation.from_mask(mask)
    backend = CudaBackend(PtxSender(arch), (1, int(arch[3:5])))
    projection = Projection(weight, None, lora_a, lora_b, None)
    (y,), _ = backend.forward(Call(act, (1.0,)), "onepass", x, [projection], None, True)
    base = x.double() @ weight.double().t()
    assert ((y - base)[~mask].abs() <= 0.01 * base[~mask].abs() + 1e34).all()
    low = (x.double() @ lora_a.double().t())[mask].bfloat16().double()
    exact = base[mask] + low @ lora_b.double().t()
    assert (y[mask] - exact).norm() <= 0.01 * exact.norm()


def test_decode_matches_reference(decode_row: Row, seed: int) -> None:
    sender = run(Case("onepass", **decode_row), seed, backward=False)
    assert [k for k in sender.kernels if "decode" not in k] == []
    sender.assert_counters_are_zero()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shrink_of_many_active_rows(arch: str, dtype: torch.dtype, seed: int) -> None:
    sizes = {"m": 70, "k": 72, "n": 16, "r": 24, "active": "all", "machine": 1}
    sender = run(Case("delta", arch=arch, dtype=dtype, **sizes), seed)
    assert sum("vector_32" in k for k in sender.kernels) == 2


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
    sender = run(Case("tail", count=3, r=33), seed)
    shrinks = [k for k in sender.kernels if "shrink" in k]
    assert len(shrinks) == 1 + 3  # xa of the group; dya has its own left operand each


@pytest.mark.parametrize("arch, strategy", [("sm_80", "tail"), ("sm_90a", "delta")])
@pytest.mark.parametrize(
    "options",
    [
        {
            "m": 40,
            "n": 528,
            "r": 24,
            "machine": 4,
        },  # a slice of columns of its own for the last sixteen
        {"m": 130, "n": 264, "r": 1, "active": "all", "machine": 3, "reverse": True},
        {"m": 150, "n": 1024, "r": 32, "active": "all", "machine": 6, "adapter": "fp32"},
        {"m": 65, "n": 200, "r": 16, "active": "one", "machine": 2, "dropout": 0.3, "bias": "both"},
        {"m": 90, "n": 264, "r": 8, "known": False, "machine": 2},  # fewer rows than planned for
        {
            "m": 70,
            "n": 264,
            "r": 32,
            "active": "half_tile",
            "machine": 2,
            "count": 2,
            "prefix_grad": False,
        },
        {"m": 66, "n": 264, "r": 9, "machine": 3, "dtype": torch.float16, "layout": "weight_t"},
    ],
    ids=str,
)
def test_one_pass_over_dy(arch: str, strategy: str, options: dict[str, Any], seed: int) -> None:
    case = dataclasses.replace(Case(strategy, k=16, active="some", arch=arch), **options)
    sender = run(case, seed)
    assert sum("grad_b_" in k for k in sender.kernels) == case.count
    assert sum("shrink" in k for k in sender.kernels) == 1


def test_gradients_do_not_depend_on_the_order_of_blocks(seed: int) -> None:
    """Bit for bit, of dya too, which dx and dA show."""
    results = []
    for reverse in (False, True):
        torch.manual_seed(seed)
        case = Case("tail", m=130, k=16, n=1032, r=9, active="all", machine=9, reverse=reverse)
        results.append(run(case, seed).results)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_a_group_of_hopper_overlaps_its_shrink_with_the_gemms(seed: int) -> None:
    """One shrink for all; each gemm is a programmatic dependent of the kernel before it."""
    case = Case("tail", m=130, count=3, r=32, arch="sm_90a")
    sent = run(case, seed, backward=False).sent
    plans = [(s.packed.kernel.split("_")[2], s.packed.dependent) for s in sent]
    assert plans == [("shrink", False), ("gemm", True), ("gemm", True), ("gemm", True)]


def test_add_reads_active_rows_alone(seed: int) -> None:
    run(Case("delta", add=True, dropout=0.3, bias="both"), seed)


class Swapping(PtxSender):
    """Sends two fields in each other's place."""

    def __init__(self, pair: tuple[str, str], *args: Any) -> None:
        super().__init__(*args)
        self.pair, self.swapped = pair, 0

    def _send(self, launch: Launch, tensors: dict[str, Tensor | None]) -> None:
        a, b = self.pair
        fields = dict(launch.fields)
        if a in fields and b in fields:
            fields[a], fields[b] = fields[b], fields[a]
            self.swapped += 1
        super()._send(launch._replace(fields=fields), tensors)


DECODE = Case("onepass", m=4, k=1032, n=72, r=16, active="all", bias="both", machine=4)
TAIL = Case("tail", m=40, k=72, n=136, r=24, active="half_tile", bias="both")
ONE_PASS_OVER_DY = Case("delta", m=70, k=16, n=264, r=24, active="all", machine=2)
FUSED = Case("tail", m=130, k=72, n=264, r=24, active="all", arch="sm_90a", machine=2, bias="both")


@pytest.mark.parametrize(
    "case, pair",
    [
        (DECODE, ("up", "down")),
        (DECODE, ("bias", "lora_bias")),
        (DECODE, ("left", "weight")),
        (DECODE, ("up_r", "up_n")),
        (DECODE, ("n", "r")),
        (TAIL, ("low", "out")),
        (TAIL, ("left_m", "out_m")),
        (TAIL, ("columns[0].right", "columns[1].right")),
        (TAIL, ("active_rows", "active_count")),
        (ONE_PASS_OVER_DY, ("part", "low_part")),
        (ONE_PASS_OVER_DY, ("up_n", "up_r")),
        (ONE_PASS_OVER_DY, ("split_rows", "splits")),
        (FUSED, ("gemm.low", "gemm.up")),
        (FUSED, ("gemm.bias", "gemm.lora_bias")),
        (FUSED, ("low_out", "active_rows")),
    ],
    ids=str,
)
def test_fields_that_change_places_are_found(case: Case, pair: tuple[str, str], seed: int) -> None:
    senders: list[Swapping] = []

    def make_sender(*args: Any) -> PtxSender:
        senders.append(Swapping(pair, *args))
        return senders[-1]

    with pytest.raises((PtxError, AssertionError)):
        run(case, seed, backward=case is ONE_PASS_OVER_DY, make_sender=make_sender)
    assert senders[0].swapped
