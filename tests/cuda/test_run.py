"""A program that is ready to run launches what its steps say, with the addresses of each call."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from alora_kernels.activation import Activation
from alora_kernels.backends import programs
from alora_kernels.backends.cuda import CudaBackend
from alora_kernels.backends.cuda.program import program_of
from alora_kernels.backends.cuda.run import _scratch, ready
from alora_kernels.backends.cuda.steps import packed
from alora_kernels.backends.programs import Make, Program, Run, Torch, View, fresh
from alora_kernels.contract import DEFAULTS, Call, Needs, Problem, Projection

from .ptx_sender import step_by_step
from .stub import COUNTERS, STREAM, Extension, Launched, filled, symbolic

Launches = list[Launched]


class Case:
    """One problem; `tensors()` makes fresh operands of it."""

    def __init__(self, rows: int = 128, *, k: int = 64, widths: Sequence[int] = (128,),
                 rank: int = 16, active: int = 40, adapter: torch.dtype = torch.bfloat16,
                 bias: bool = False, lora_bias: bool = False, dropout_p: float = 0.0,
                 prefix_grad: bool = True, scaling: float = 1.5, base_given: bool = False,
                 shift: int = 0, transposed: bool = False, unknown: bool = False,
                 needs: tuple[bool, bool, bool] = (True, True, True), dbias: bool = False,
                 every: int = 1) -> None:  # fmt: skip
        self.__dict__.update({n: v for n, v in locals().items() if n != "self"})

    def tensors(self) -> dict[str, Any]:
        dtype, adapter = torch.bfloat16, self.adapter
        count = len(self.widths)
        flat = torch.randn(self.rows * self.k + self.shift).to(dtype)
        projections = []
        for n in self.widths:
            a = torch.randn(self.k, self.rank).to(adapter).t() if self.transposed else None
            projections.append(Projection(
                None if self.base_given else torch.randn(n, self.k).to(dtype),
                torch.randn(n * self.every).to(dtype)[:: self.every] if self.bias else None,
                torch.randn(self.rank, self.k).to(adapter) if a is None else a,
                torch.randn(n, self.rank).to(adapter),
                torch.randn(n * self.every).to(adapter)[:: self.every] if self.lora_bias else None,
            ))  # fmt: skip
        activation = Activation.from_offsets([self.active], self.rows)
        if self.unknown:  # to the host
            tensors = (activation.row_adapter, activation.active_rows, activation.active_count)
            activation = Activation(*tensors)
        seed = torch.tensor([7]) if self.dropout_p else None
        return {
            "call": Call(
                activation, (self.scaling,) * count,
                DEFAULTS._replace(dropout_p=self.dropout_p, prefix_grad=self.prefix_grad), seed,
            ),
            "x": flat[self.shift :].view(self.rows, self.k),
            "projections": projections,
            "base_outs": [torch.randn(self.rows, n).to(dtype) for n in self.widths]
            if self.base_given else None,
            "dys": [torch.randn(self.rows, n).to(dtype) for n in self.widths],
        }  # fmt: skip


def named(given: dict[str, Any], *more: tuple[str, Tensor | None]) -> dict[str, Tensor]:
    act = given["call"].activation
    pairs = [
        ("x", given["x"]), ("row_adapter", act.row_adapter), ("active_rows", act.active_rows),
        ("active_count", act.active_count), ("seed", given["call"].seed), *more,
    ]  # fmt: skip
    for i, p in enumerate(given["projections"]):
        pairs += [(f"{name}{i}", t) for name, t in p._asdict().items()]
        pairs.append((f"dy{i}", given["dys"][i]))
        if given["base_outs"] is not None:
            pairs.append((f"base{i}", given["base_outs"][i]))
    return {name: t for name, t in pairs if t is not None}


def run(
    served: CudaBackend, extension: Extension, strategy: str, case: Case, given: dict[str, Any]
) -> tuple[Launches, dict[str, Tensor]]:
    """Forward and backward: the launches, and the tensors by name."""
    extension.launches = []
    call, x, projections = given["call"], given["x"], given["projections"]
    count = len(projections)
    outs, xa = served.forward(call, strategy, x, projections, given["base_outs"], True)
    wants = [(flag,) * count for flag in (*case.needs[1:], case.dbias)]
    needs = Needs(case.needs[0], *wants)
    grads = served.backward(call, strategy, x, projections, xa, given["dys"], needs)
    results = [("xa", xa), ("dx", grads.x)]
    results += [(f"y{i}", y) for i, y in enumerate(outs) if given["base_outs"] is None]
    results += [(f"da{i}", t) for i, t in enumerate(grads.lora_a)]
    results += [(f"db{i}", t) for i, t in enumerate(grads.lora_b)]
    return extension.launches, named(given, *results)


class Defined:
    """Makes programs ready by the definition of their steps; keeps all memory apart."""

    def __init__(self, extension: Extension) -> None:
        self.extension, self.kept = extension, []

    def __call__(self, program: Program) -> Run:
        def send(launch: Any, tensors: dict[str, Tensor | None]) -> None:
            self.kept.append(tensors)
            told = packed(launch, {name: (i, 0) for i, name in enumerate(tensors)})
            addresses = [0 if t is None else t.data_ptr() for t in tensors.values()]
            done = Launched(told, filled(told, addresses), -1, STREAM)
            self.extension.launches.append(done)

        return lambda inputs: step_by_step(program, inputs, send)


CASES = {
    "plain": Case(),
    "one row": Case(1, active=1),
    "slices of K": Case(2, k=4096, active=1),
    "bias": Case(bias=True),
    "lora_bias, frozen adapter": Case(lora_bias=True, needs=(True, False, False)),
    "biases that are not dense": Case(bias=True, lora_bias=True, every=2),
    "biases alone want a gradient": Case(lora_bias=True, needs=(False, False, False), dbias=True),
    "every gradient": Case(lora_bias=True, dbias=True, widths=(128, 64)),
    "group": Case(widths=(128, 64, 64), rank=24),
    "float adapters": Case(adapter=torch.float32),
    "unaligned x": Case(shift=3),
    "transposed lora_a": Case(transposed=True),
    "dropout": Case(dropout_p=0.25),
    "no prefix gradient": Case(prefix_grad=False),
    "no dx": Case(needs=(False, True, True)),
    "dx alone": Case(needs=(True, False, False)),
    "nothing active": Case(active=0),
    "an unknown number active": Case(unknown=True),
    "ragged": Case(77, k=88, widths=(56,), rank=5),
    "base given": Case(base_given=True),
    "base given, group": Case(base_given=True, widths=(64, 128)),
}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("strategy", ["delta", "tail", "onepass"])
@pytest.mark.parametrize("name", list(CASES))
def test_every_call_launches_what_the_steps_say(
    name: str,
    strategy: str,
    arch: int,
    extension: Extension,
) -> None:
    case = CASES[name]
    if (strategy == "onepass" and case.dropout_p) or (strategy != "delta" and case.base_given):
        return  # refused by why_not
    machine = (132, arch)
    first = case.tensors()
    by_definition = CudaBackend(Defined(extension), machine)
    want = symbolic(*run(by_definition, extension, strategy, case, first))
    served = CudaBackend(machine=machine)
    keep: list[Any] = []
    for _ in range(3):
        keep.append(case.tensors())  # so that every turn has memory of its own
        got = run(served, extension, strategy, case, keep[-1])
        assert symbolic(*got) == want
        keep.append(got)
        if len(keep) == 2:
            made = extension.made
    assert extension.made == made, "nothing is planned anew"


def test_results_of_vendor_products_are_right_in_every_call(extension: Extension) -> None:
    served, case = CudaBackend(machine=(132, 80)), Case(widths=(64, 32), bias=True)
    for _ in range(4):
        given = case.tensors()
        x, projections = given["x"], given["projections"]
        outs, xa = served.forward(given["call"], "delta", x, projections, None, True)
        for y, p in zip(outs, projections):
            torch.testing.assert_close(y, torch.nn.functional.linear(x, p.weight, p.bias))
        needs = Needs(True, (False,) * 2, (False,) * 2, (False,) * 2)
        grads = served.backward(given["call"], "delta", x, projections, xa, given["dys"], needs)
        dx = given["dys"][0] @ projections[0].weight
        torch.testing.assert_close(grads.x, dx.addmm_(given["dys"][1], projections[1].weight))


# Pairs of problems that differ in one thing that launches depend on.
OTHERS = {
    "rows": Case(64), "active": Case(active=41), "scaling": Case(scaling=2.0),
    "prefix_grad": Case(prefix_grad=False), "rank": Case(rank=8), "shift": Case(shift=1),
    "adapter": Case(adapter=torch.float32), "layout": Case(rank=64, transposed=True),
    "unknown": Case(unknown=True), "bias": Case(bias=True),
    "needs": Case(needs=(True, False, True)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OTHERS))
def test_problems_are_told_apart(name: str, extension: Extension) -> None:
    served, first = CudaBackend(machine=(132, 80)), Case(rank=64) if name == "layout" else Case()
    shown = []
    for case in (first, OTHERS[name], first):
        for _ in range(2):
            given = case.tensors()
            got = symbolic(*run(served, extension, "tail", case, given))
        other = case.tensors()
        by_definition = CudaBackend(Defined(extension), (132, 80))
        assert got == symbolic(*run(by_definition, extension, "tail", case, other))
        shown.append(got)
    assert shown[0] == shown[2]


def test_the_gradient_of_lora_bias_is_right_in_every_call(extension: Extension) -> None:
    """A sum by PyTorch, which is a step like others."""
    case = Case(lora_bias=True)
    served = CudaBackend(machine=(132, 80))
    for _ in range(3):
        given = case.tensors()
        x, projections, call = given["x"], given["projections"], given["call"]
        _, xa = served.forward(call, "tail", x, projections, None, True)
        needs = Needs(True, (True,), (True,), (True,))
        grads = served.backward(call, "tail", x, projections, xa, given["dys"], needs)
        mask = call.activation.mask.unsqueeze(1)
        want = torch.where(mask, given["dys"][0].float(), 0).sum(0) * case.scaling
        torch.testing.assert_close(grads.lora_bias[0].float(), want, rtol=1e-2, atol=1e-2)


def test_two_operands_in_one_memory_are_two_the_next_time(extension: Extension) -> None:
    case = Case(128, k=128)
    served = CudaBackend(machine=(132, 80))
    for shared in (True, True, False, True):
        given = case.tensors()
        (p,) = given["projections"]
        if shared:
            p = p._replace(weight=given["x"])
        extension.launches = []
        served.forward(given["call"], "tail", given["x"], [p], None, True)
        fields = extension.launches[-1].fields
        assert (fields["left"], fields["right"]) == (given["x"].data_ptr(), p.weight.data_ptr())
    assert extension.made == 1


def test_counters_are_no_part_of_a_program(extension: Extension) -> None:
    """C++ finds them for each call: every stream and every graph has its own."""
    case, served = CASES["slices of K"], CudaBackend(machine=(132, 80))
    given = case.tensors()
    served.forward(given["call"], "onepass", given["x"], given["projections"], None, False)
    (launched,) = extension.launches
    assert launched.fields["arrived"] == COUNTERS
    ((_, words),) = launched.packed.counters
    assert words == launched.packed.grid[0]


def test_a_program_holds_no_tensor(extension: Extension) -> None:
    """Nothing of a call lives on in what is kept of it."""
    served, freed = CudaBackend(machine=(132, 90)), []
    for strategy in ("delta", "tail", "onepass"):
        case = Case()
        given = case.tensors()
        for t in (given["x"], *given["dys"], *given["projections"][0]):
            if t is not None:
                weakref.finalize(t, freed.append, t.shape)
        run(served, extension, strategy, case, given)
        del given, t
    gc.collect()
    assert len(freed) == 3 * 5


def test_nothing_is_kept_without_bound(
    extension: Extension,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(programs, "KEPT", 3)
    served = CudaBackend(machine=(132, 90))
    for rows in range(100, 110):
        for _ in range(2):
            given = Case(rows).tensors()
            served.forward(given["call"], "tail", given["x"], given["projections"], None, True)
            assert len(served._programs) <= 4
    assert extension.made == 10


class Steps:
    """Steps to be told to `ready`."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def __call__(self, function: str, *operands: View, result: View | None) -> View | None:
        self.steps.append(Torch(function, operands, result))
        return result

    def program(self, *results: View) -> Program:
        names = tuple([v.tensor for v in results])
        return Program(("x",), torch.float32, (None,), tuple(self.steps), names)


X = fresh("x", (2, 3), torch.float32)


def test_zeros_are_made_anew(extension: Extension, poisoned: None) -> None:
    a, b = fresh("a", (4,), torch.float32), fresh("b", (5,), torch.int32)
    run = ready(Program(("x",), X.dtype, (0,), (Make(a, True), Make(b, True)), ("a", "b")))
    for _ in range(2):
        results = run([torch.ones(2, 3)])
        assert torch.equal(results[0], torch.zeros(4))
        assert torch.equal(results[1], torch.zeros(5, dtype=torch.int32))
        results[0].fill_(7)
        results[1].fill_(7)


def test_products_in_place_and_new_ones_keep_their_order(
    extension: Extension,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    functions = {"neg": torch.neg, "add_": Tensor.add_, "exp": torch.exp}
    monkeypatch.setattr("alora_kernels.backends.cuda.run.FUNCTIONS", functions)
    steps = Steps()
    first = steps("neg", X, result=X._replace(tensor="first"))
    steps("add_", first, X, result=None)
    second = steps("exp", X, result=X._replace(tensor="second"))
    run = ready(steps.program(first, second, X))
    for turn in range(3):
        one, two, x = run([torch.full((2, 3), float(turn))])
        assert torch.equal(x, torch.full((2, 3), float(turn)))
        assert torch.equal(one, torch.zeros(2, 3)) and torch.equal(two, x.exp())


def test_what_only_kernels_see_lies_in_one_tensor_side_by_side() -> None:
    shared = 0
    for strategy in ("delta", "tail", "onepass"):
        for arch, backward, count in itertools.product((80, 90), (False, True), (1, 2)):
            problem = Problem(
                rows=130, in_features=72, out_features=(136,) * count, ranks=(24,) * count,
                active=65, dtype=torch.bfloat16, adapter_dtype=torch.float32, device="cuda",
                arch=arch, backward=backward,
            )  # fmt: skip
            program = program_of(problem, strategy, (8, arch))
            begins, elements = _scratch(program)
            makes = {s.view.tensor: s for s in program.steps if isinstance(s, Make)}
            operands = [v for s in program.steps if isinstance(s, Torch) for v in s.operands]
            assert not begins.keys() & {*program.results, *[v.tensor for v in operands if v]}
            end = 0
            for name, begin in sorted(begins.items(), key=lambda item: item[1]):
                view = makes[name].view
                assert not makes[name].zero and begin % 256 == 0 and begin >= end
                end = begin + math.prod(view.shape) * view.dtype.itemsize
            assert elements * 2 >= end
            shared += len(begins) > 1
    assert shared


def test_torch_that_gives_unaligned_memory_is_told_of(
    extension: Extension, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unaligned(x: Tensor, *shape: int) -> Tensor:
        return x.new_zeros(math.prod(shape) + 1)[1:].view(shape)

    monkeypatch.setattr(Tensor, "new_empty", unaligned)
    given = Case().tensors()
    with pytest.raises(RuntimeError, match="not a multiple of 16"):
        CudaBackend(machine=(132, 80)).forward(
            given["call"], "onepass", given["x"], given["projections"], None, False
        )
    assert extension.launches == []
