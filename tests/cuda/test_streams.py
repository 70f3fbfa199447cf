"""Workspace that kernels share from launch to launch, as a graph replays them and streams mix them.

Counters and flags are set back by their last reader, partial sums are overwritten: a launch on
what an earlier one left behind gives what it gives on fresh memory. Launches of two streams,
taking turns on one machine, do not disturb each other as long as each has its own counters.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from alora_kernels.activation import Activation
from alora_kernels.backends.cuda import CudaBackend
from alora_kernels.contract import Call, Needs, Projection

from ..ptx import PtxError
from .ptx_sender import PtxSender

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("poisoned")]

NEEDS = Needs(True, (True,), (True,), (True,))


class Problem:
    """One layer's call whose launches are kept: `again` sends them once more, as a graph would."""

    def __init__(self, strategy: str, m: int, k: int, n: int, r: int, arch: str, machine: int):
        self.strategy, self.backward = strategy, strategy != "onepass"
        self.sender = PtxSender(arch, multiprocessors=machine)
        self.backend = CudaBackend(self.sender, (machine, int(arch[3:5])))
        self.act = Activation.from_mask(torch.arange(m) >= m // 2)
        self.x, self.dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
        weight = (torch.randn(n, k) / k**0.5).bfloat16()
        a, b = torch.randn(r, k).bfloat16() / k**0.5, torch.randn(n, r).bfloat16() / r**0.5
        self.layer = Projection(weight, None, a, b, None)

    def call(self, execute: bool = True) -> list[Tensor]:
        """Everything that the call returns; without `execute` yet to be computed."""
        self.sender.sent, self.sender.execute = [], execute
        call = Call(self.act, (1.5,))
        (y,), xa = self.backend.forward(
            call, self.strategy, self.x, [self.layer], None, self.backward
        )
        if not self.backward:
            return [y]
        grads = self.backend.backward(
            call, self.strategy, self.x, [self.layer], xa, [self.dy], NEEDS
        )
        return [y, grads.x, *grads.lora_a, *grads.lora_b]  # type: ignore[list-item]

    def other_inputs(self) -> None:
        self.x.copy_(torch.randn_like(self.x))
        self.dy.copy_(torch.randn_like(self.dy))


PROBLEMS = {
    "persistent": ("tail", 130, 72, 264, 16, "sm_90a", 2),
    "hopper": ("tail", 130, 72, 136, 16, "sm_90a", 1000),
    "ampere": ("tail", 40, 72, 136, 24, "sm_80", 8),
    "decode": ("onepass", 4, 1032, 72, 16, "sm_80", 4),
}


def assert_same(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for g, w in zip(got, wanted, strict=True):
        assert not g.isnan().any() and torch.equal(g, w)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_graph_replays_on_the_workspace_it_left(name: str, seed: int) -> None:
    problem = Problem(*PROBLEMS[name])
    outs, launches = problem.call(), problem.sender.sent
    counted = [sent for sent in launches if sent.packed.counters]
    assert bool(counted) == (name in ("persistent", "decode"))
    for _ in range(2):
        problem.other_inputs()
        for sent in launches:
            problem.sender.together([sent])
        problem.sender.assert_counters_are_zero()
    replayed = [t.clone() for t in outs]
    assert_same(replayed, problem.call())


def side_by_side(name: str, share: bool, seed: int) -> None:
    """The launches of two calls take turns, each with its own counters unless `share`."""
    pair = Problem(*PROBLEMS[name]), Problem(*PROBLEMS[name])
    if share:
        pair[1].sender.counters = pair[0].sender.counters
    outs = [problem.call(execute=False) for problem in pair]
    for both in zip(*(problem.sender.sent for problem in pair), strict=True):
        pair[0].sender.together(both, seed)
    for problem, got in zip(pair, outs):
        problem.sender.counters = torch.zeros_like(problem.sender.counters)
        assert_same(got, problem.call())


@pytest.mark.parametrize("name", PROBLEMS)
def test_two_streams_take_turns(name: str, seed: int) -> None:
    side_by_side(name, False, seed)


def test_two_streams_with_one_set_of_counters_fail() -> None:
    torch.manual_seed(0)
    with pytest.raises((PtxError, AssertionError)):
        side_by_side("persistent", True, 0)
