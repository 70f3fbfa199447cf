"""Forward and all gradients of the public functions with backend="triton", against float64.

The sizes: (1, 1, 1, 1) the smallest; odd ones, none a multiple of a tile; one with aligned rows,
which takes tensor descriptors on sm_90+ and whose R is no power of two; M above 256 for the widest
tiles. Small enough for the interpreters: a tile's edges matter, not its repetition.
"""

from __future__ import annotations

import pytest
import torch

from .conftest import Place
from .problems import Case, Problem

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STRATEGIES = ("delta", "tail", "onepass")
SIZES = [(1, 1, 1, 1), (5, 33, 17, 3), (70, 64, 128, 48)]

EVERYWHERE = [
    Case(strategy=s, dtype=d, size=size, active=f)
    for s in STRATEGIES
    for d in (F32, BF16, F16)
    for size in SIZES
    for f in (0.0, 0.1, 1.0)
]
for s in STRATEGIES:
    EVERYWHERE += [
        Case(strategy=s, dtype=BF16, adapter=F32),
        Case(strategy=s, dtype=F16, adapter=F32, strided=False),
        Case(strategy=s, prefix=False),
        Case(strategy=s, prefix=False, dtype=BF16, scattered=False),
        Case(strategy=s, known=False),
        Case(strategy=s, known=False, active=0.0),
        Case(strategy=s, count=3, dtype=BF16),
        Case(strategy=s, count=2, lora_bias=False),
        Case(strategy=s, scattered=False, size=(300, 40, 33, 8), dtype=BF16),
        Case(strategy=s, wants="ab"),
        Case(strategy=s, wants="x"),
        Case(strategy=s, wants="a", dtype=BF16),
        Case(strategy=s, wants="xb", count=2, dtype=BF16),
        Case(strategy=s, size=(9, 600, 70, 20), dtype=BF16, strided=False),  # split K
        Case(strategy=s, size=(9, 600, 70, 20), prefix=False, active=0.2),
        Case(strategy=s, size=(40, 64, 520, 12), dtype=BF16),  # dya and dB in one pass
    ]
for s in ("delta", "tail"):
    EVERYWHERE += [
        Case(strategy=s, p=0.3),
        Case(strategy=s, p=0.3, prefix=False, dtype=BF16),
        Case(strategy=s, p=0.6, count=2, dtype=F16),
        Case(strategy=s, p=0.3, size=(9, 600, 70, 20), dtype=BF16),
        Case(strategy=s, size=(20, 40, 50, 130)),
        Case(strategy=s, size=(20, 40, 50, 256), dtype=BF16),
        Case(strategy=s, count=5, size=(20, 40, 50, 7)),
    ]
EVERYWHERE += [
    Case("delta", dtype=BF16, adapter=F32, precision="fp32"),
    Case("delta", dtype=F16, adapter=F32, precision="fp32", prefix=False),
    Case("delta", dtype=BF16, adapter=F32, precision="fp32", p=0.3, count=2),
    Case("delta", add=True),
    Case("delta", add=True, dtype=BF16, p=0.3, adapter=F32),
    Case("delta", add=True, dtype=BF16, known=False, adapter=F32, precision="fp32"),
]

# Through compiled PTX: a smaller set that reaches every kernel and every compile-time switch.
COVERING = [
    Case("tail", dtype=BF16, size=(70, 72, 136, 24), strided=False),
    Case("tail", dtype=F16, size=(20, 33, 40, 3), adapter=F32, p=0.3, prefix=False),
    Case("onepass", dtype=BF16, size=(70, 72, 136, 24), strided=False, scattered=False, active=0.1),
    Case("onepass", dtype=BF16, size=(9, 600, 40, 20), strided=False, adapter=F32),
    Case("onepass", size=(20, 33, 40, 3), prefix=False, count=2),
    Case("delta", dtype=BF16, size=(20, 72, 264, 12), count=2, p=0.3),
    Case("delta", dtype=BF16, size=(20, 72, 40, 12), adapter=F32, precision="fp32", known=False),
    Case("tail", dtype=BF16, size=(300, 40, 24, 8), active=0.1, scattered=False, lora_bias=False),
]


def check(case: Case, place: Place, seed: int) -> None:
    problem = Problem(case, place.device, seed)
    got = problem.run()
    problem.check(got)
    if not case.prefix and got[case.count] is not None:
        assert (got[case.count][~problem.mask] == 0).all()


@pytest.mark.parametrize("case", EVERYWHERE, ids=str)
def test_matches_reference(case: Case, place: Place, seed: int) -> None:
    check(case, place, seed)


@pytest.mark.ptx
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_covering_case_matches_reference(case: Case, place: Place, seed: int) -> None:
    check(case, place, seed)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_gradients(strategy: str, place: Place, seed: int) -> None:
    problem = Problem(Case(strategy, dtype=BF16, size=(37, 70, 90, 24)), place.device, seed)
    (got,) = problem.run(grad=False)
    (with_grad, *_) = problem.run()
    assert torch.equal(got, with_grad)
