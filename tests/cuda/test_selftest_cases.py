"""The self-test's cases reach every kernel that a strategy can launch, on GPUs of every size.

What can be launched is found by planning problems at random; what the cases launch by planning
them. Plans are pure functions, so no GPU is needed. A few cases run as compiled code, to show that
their check accepts the kernels as they are.
"""

from __future__ import annotations

import dataclasses
import random

import pytest

from alora_kernels.backends.cuda import CudaBackend
from alora_kernels.selftest.cases import DTYPES, Case, cases_of
from alora_kernels.selftest.check import check
from alora_kernels.selftest.planned import Machine, kernels_of

from .ptx_sender import PtxSender

MACHINES = [
    Machine(132, 90),
    Machine(114, 90),
    Machine(108, 80),
    Machine(24, 86),
    Machine(170, 120),
]


def drawn(strategy: str, machine: Machine, draw: random.Random) -> Case:
    """A problem as a user may have it."""
    rows = draw.choice((1, 9, 33, 65, 130, 700, 64 * machine.multiprocessors + 3))
    dropout = draw.choice((0.0, 0.0, 0.3)) if strategy != "onepass" else 0.0
    return Case(
        "drawn", strategy, draw.choice(DTYPES["cuda"]), rows,
        depth=draw.choice((8, 33, 264, 520, 2056)), width=draw.choice((16, 35, 136, 264, 1032)),
        rank=draw.choice((1, 8, 16, 24, 32, 48, 64)),
        active=draw.choice(("none", "one", "some", "half", "all")),
        adapter=draw.choice(("", "float32")), count=draw.choice((1, 1, 3)),
        backward=draw.choice((True, True, False)), x_grad=draw.choice((True, True, False)),
        dropout_p=dropout, prefix_grad=draw.choice((True, False)), known=draw.choice((True, False)),
        base_given=strategy == "delta" and draw.random() < 0.3, biases=draw.choice((True, False)),
        repeated_dy=draw.random() < 0.1,
    )  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_every_kernel_that_a_strategy_can_launch_is_tested(machine: Machine, seed: int) -> None:
    draw = random.Random(seed)
    cases = cases_of("cuda", machine.multiprocessors)
    reached: dict[tuple[str, str], set[str]] = {}
    for case, kernels in zip(cases, kernels_of(cases, machine)):
        reached.setdefault(case.pair, set()).update(kernels)
    missing: dict[tuple[str, str, str], Case] = {}
    problems = [drawn(s, machine, draw) for s in ("delta", "tail", "onepass") for _ in range(40)]
    for case, kernels in zip(problems, kernels_of(problems, machine)):
        for kernel in kernels - reached[case.pair]:
            missing.setdefault((*case.pair, kernel), case)
    assert not missing


def test_a_kernel_that_no_case_reaches_is_noticed() -> None:
    """Without its cases of one rank, `onepass` of Hopper has a kernel that nothing tests."""
    cases = [c for c in cases_of("cuda", 132) if c.rank != 48]
    reached = set().union(*kernels_of(cases))
    assert "masked_lora_onepass_bf16_sm90_208_kernel" not in reached
    assert "masked_lora_onepass_bf16_sm90_224_kernel" in reached


RISKY = [
    dataclasses.replace(c, depth=264, width=264)
    for c in cases_of("cuda", 1)
    if c.what.startswith("right with N inside")
]


@pytest.mark.ptx
@pytest.mark.parametrize("case", RISKY[:3], ids=str)
def test_the_riskiest_cases_pass_as_compiled_code(case: Case) -> None:
    sender = PtxSender("sm_90a", multiprocessors=1)
    check(CudaBackend(sender, (1, 90)), case, "cpu")
    assert any("onepass" in kernel for kernel in sender.kernels)
