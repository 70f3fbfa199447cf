"""A replayed call launches what the ordinary call does, with the addresses of its own tensors."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import alora_kernels
from alora_kernels.activation import Activation
from alora_kernels.backends.cuda import CudaBackend, launch, replay
from alora_kernels.backends.cuda.layouts import LAYOUTS
from alora_kernels.contract import Call, Needs, Projection

Launches = list[tuple[Any, ...]]


class Extension:
    """Stands for alora_kernels._cuda; a tensor map is its arguments."""

    def __init__(self) -> None:
        self.launches: Launches = []

    def launch(self, *args: Any) -> None:
        self.launches.append(args)

    def tensor_map(self, address: int, is_bf16: bool, *sizes: int) -> bytes:
        return struct.pack("=7Q", address, is_bf16, *sizes).ljust(128, b"\1")


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Extension:
    found = Extension()
    monkeypatch.setitem(sys.modules, "alora_kernels._cuda", found)  # type: ignore[arg-type]
    monkeypatch.setattr(alora_kernels, "_cuda", found, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
    monkeypatch.setattr(launch, "_arrived", {})
    return found


class Case:
    """One problem; `tensors()` makes fresh operands of it."""

    def __init__(self, rows: int = 128, *, k: int = 64, widths: Sequence[int] = (128,),
                 rank: int = 16, active: int = 40, adapter: torch.dtype = torch.bfloat16,
                 bias: bool = False, lora_bias: bool = False, dropout_p: float = 0.0,
                 prefix_grad: bool = True, scaling: float = 1.5, base_given: bool = False,
                 shift: int = 0, transposed: bool = False, unknown: bool = False,
                 needs: tuple[bool, bool, bool] = (True, True, True)) -> None:  # fmt: skip
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
                torch.randn(n).to(dtype) if self.bias else None,
                torch.randn(self.rank, self.k).to(adapter) if a is None else a,
                torch.randn(n, self.rank).to(adapter),
                torch.randn(n).to(adapter) if self.lora_bias else None,
            ))  # fmt: skip
        activation = Activation.from_offsets([self.active], self.rows)
        if self.unknown:  # to the host
            tensors = (activation.row_adapter, activation.active_rows, activation.active_count)
            activation = Activation(*tensors)
        seed = torch.tensor([7]) if self.dropout_p else None
        return {
            "call": Call(activation, (self.scaling,) * count, self.dropout_p, seed,
                         prefix_grad=self.prefix_grad),
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


def symbolic(launches: Launches, tensors: dict[str, Tensor], kind: dict[str, str]) -> list[Any]:
    """The launches with names for addresses; memory that nobody names is numbered as it appears."""
    spans = {n: (t.data_ptr(), t.numel() * t.element_size()) for n, t in tensors.items()}
    unnamed: dict[int, str] = {}

    def name(value: Any) -> Any:
        if not isinstance(value, int) or value < 1 << 32:
            return value
        for n, (begin, size) in spans.items():
            if begin <= value < begin + size:
                return f"{n}+{value - begin}"
        return unnamed.setdefault(value, f"memory {len(unnamed)}")

    out = []
    for args in launches:
        fields = LAYOUTS[kind[args[0]]].unpack(args[6])
        shown = []
        for field in fields:
            if isinstance(field, bytes):
                numbers = struct.unpack("=7Q", field[:56]) if any(field) else ()
                shown.append(tuple([name(v) for v in numbers]))
            else:
                shown.append(name(field))
        out.append((args[:6], shown, args[7:]))
    return out


def run(
    backend: CudaBackend, extension: Extension, strategy: str, case: Case, given: dict[str, Any]
) -> tuple[Launches, dict[str, Tensor]]:
    """Forward and backward: the launches, and the tensors by name."""
    extension.launches = []
    call, x, projections = given["call"], given["x"], given["projections"]
    count = len(projections)
    outs, xa = backend.forward(call, strategy, x, projections, given["base_outs"], True)
    wants = [(flag,) * count for flag in (*case.needs[1:], False)]
    needs = Needs(case.needs[0], *wants)
    grads = backend.backward(call, strategy, x, projections, xa, given["dys"], needs)
    results = [("xa", xa), ("dx", grads.x)]
    results += [(f"y{i}", y) for i, y in enumerate(outs) if given["base_outs"] is None]
    results += [(f"da{i}", t) for i, t in enumerate(grads.lora_a)]
    results += [(f"db{i}", t) for i, t in enumerate(grads.lora_b)]
    return extension.launches, named(given, *results)


def held() -> tuple[launch.Send, list[Any], dict[str, str]]:
    """A send that is no `send_to_gpu`, so nothing is replayed, and that keeps memory apart."""
    kept: list[Any] = []
    kind: dict[str, str] = {}

    def send(plan: Any, fields: Any) -> None:
        kept.append(fields)
        kind[plan.kernel] = plan.params
        launch.send_to_gpu(plan, fields)

    return send, kept, kind


CASES = {
    "plain": Case(),
    "one row": Case(1, active=1),
    "slices of K": Case(2, k=4096, active=1),
    "bias": Case(bias=True),
    "lora_bias, frozen adapter": Case(lora_bias=True, needs=(True, False, False)),
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
def test_a_replay_launches_what_the_call_launches(
    name: str, strategy: str, arch: int, extension: Extension, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    if (strategy == "onepass" and case.dropout_p) or (strategy != "delta" and case.base_given):
        return  # refused by why_not
    machine = (132, arch)
    send, _, kind = held()
    first = case.tensors()
    want = symbolic(*run(CudaBackend(send, machine), extension, strategy, case, first), kind)
    backend = CudaBackend(machine=machine)
    played: list[Any] = []
    play = replay.play
    monkeypatch.setattr(replay, "play", lambda *a: played.append(a) or play(*a))
    keep: list[Any] = []
    real = launch.send_to_gpu
    monkeypatch.setattr(launch, "send_to_gpu", lambda *a: keep.append(a) or real(*a))
    for turn in range(4):
        keep.append(case.tensors())  # so that every turn has memory of its own
        got = run(backend, extension, strategy, case, keep[-1])
        assert symbolic(*got, kind) == want
        keep.append(got)
        assert len(played) == (0 if turn < 2 else 2 * (turn - 1)), "both passes are replayed"


def test_results_of_vendor_products_are_right_when_replayed(extension: Extension) -> None:
    backend, case = CudaBackend(machine=(132, 80)), Case(widths=(64, 32), bias=True)
    for _ in range(4):
        given = case.tensors()
        x, projections = given["x"], given["projections"]
        outs, xa = backend.forward(given["call"], "delta", x, projections, None, True)
        for y, p in zip(outs, projections):
            torch.testing.assert_close(y, torch.nn.functional.linear(x, p.weight, p.bias))
        needs = Needs(True, (False,) * 2, (False,) * 2, (False,) * 2)
        grads = backend.backward(given["call"], "delta", x, projections, xa, given["dys"], needs)
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
    backend, first = CudaBackend(machine=(132, 80)), Case(rank=64) if name == "layout" else Case()
    for case in (first, OTHERS[name]):
        for _ in range(3):
            given = case.tensors()
            got = run(backend, extension, "tail", case, given)
        send, _, kind = held()
        other = case.tensors()
        want = run(CudaBackend(send, (132, 80)), extension, "tail", case, other)
        assert symbolic(*got, kind) == symbolic(*want, kind)


def test_what_torch_computes_is_never_replayed(extension: Extension) -> None:
    """The gradient of lora_bias is a sum by torch: the replay would leave it out."""
    case = Case(lora_bias=True)
    backend = CudaBackend(machine=(132, 80))
    for _ in range(4):
        given = case.tensors()
        x, projections, call = given["x"], given["projections"], given["call"]
        _, xa = backend.forward(call, "tail", x, projections, None, True)
        needs = Needs(True, (True,), (True,), (True,))
        grads = backend.backward(call, "tail", x, projections, xa, given["dys"], needs)
        mask = call.activation.mask.unsqueeze(1)
        want = torch.where(mask, given["dys"][0].float(), 0).sum(0) * case.scaling
        torch.testing.assert_close(grads.lora_bias[0].float(), want, rtol=1e-2, atol=1e-2)
    assert sorted(str(type(v).__name__) for v in backend._replays._seen.values()) == ["Tape", "str"]


def test_shared_memory_is_never_replayed(extension: Extension) -> None:
    """Two operands in one memory: next time they may be two."""
    case = Case(128, k=128)
    backend = CudaBackend(machine=(132, 80))
    for _ in range(3):
        given = case.tensors()
        p = given["projections"][0]._replace(weight=given["x"])
        backend.forward(given["call"], "tail", given["x"], [p], None, True)
    assert list(backend._replays._seen.values()) == ["never"]
    for _ in range(2):
        given = case.tensors()
        extension.launches = []
        backend.forward(given["call"], "tail", given["x"], given["projections"], None, True)
        fields = LAYOUTS["GemmParams"].unpack(extension.launches[-1][6])
        assert fields[:2] == (given["x"].data_ptr(), given["projections"][0].weight.data_ptr())


def test_counters_are_asked_for_in_every_call(extension: Extension) -> None:
    """Each stream has its own."""
    case, backend = CASES["slices of K"], CudaBackend(machine=(132, 80))
    for turn in range(5):
        if turn >= 2:  # recorded
            launch._arrived.clear()
        given = case.tensors()
        extension.launches = []
        backend.forward(given["call"], "onepass", given["x"], given["projections"], None, False)
        (found,) = launch._arrived.values()
        assert LAYOUTS["DecodeParams"].unpack(extension.launches[0][6])[8] == found.data_ptr(), turn


def test_nothing_is_kept_without_bound(
    extension: Extension, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "KEPT", 3)
    monkeypatch.setattr(replay, "MAPS_KEPT", 2)
    backend = CudaBackend(machine=(132, 90))
    for rows in range(100, 110):
        for _ in range(4):
            given = Case(rows).tensors()
            backend.forward(given["call"], "tail", given["x"], given["projections"], None, True)
            assert len(backend._replays._seen) <= 3
    tape = next(t for t in backend._replays._seen.values() if isinstance(t, replay.Tape))
    maps = [m[2] for step in tape.steps if isinstance(step, replay.Launch) for m in step.maps]
    assert maps and all(0 < len(m) <= 2 for m in maps)


def repeat(function: Any, turns: int = 4) -> tuple[list[list[Tensor]], list[Any]]:
    """`function(send, x)` by a `Replays` with a new x each time: the results, and what is kept."""
    replays, results = replay.Replays(), []
    for turn in range(turns):
        x = torch.full((2, 3), float(turn))
        results.append(list(replays.run("key", [x], lambda send, x=x: function(send, x))))
    return results, list(replays._seen.values())


def vendor(send: Any, function: Any, *operands: Tensor) -> Tensor:
    watched = getattr(send, "vendor", None)
    return function(*operands) if watched is None else watched(function, *operands)


def test_zeros_are_made_anew(extension: Extension, poisoned: None) -> None:
    results, kept = repeat(lambda send, x: [x.new_zeros(4), torch.zeros(5, dtype=torch.int32)])
    assert isinstance(kept[0], replay.Tape)
    for a, b in results:
        assert torch.equal(a, torch.zeros(4)) and torch.equal(b, torch.zeros(5, dtype=torch.int32))


def test_products_in_place_and_new_ones_keep_their_order(extension: Extension) -> None:
    def function(send: Any, x: Tensor) -> list[Tensor]:
        first = vendor(send, torch.neg, x)
        vendor(send, Tensor.add_, first, x)
        second = vendor(send, torch.exp, x)
        return [first, second, x]

    results, kept = repeat(function)
    assert isinstance(kept[0], replay.Tape)
    for turn, (first, second, x) in enumerate(results):
        assert torch.equal(x, torch.full((2, 3), float(turn)))
        assert torch.equal(first, torch.zeros(2, 3)) and torch.equal(second, x.exp())


@pytest.mark.parametrize(
    "touch",
    [
        lambda y, x: y.zero_(),
        lambda y, x: y.copy_(x),
        lambda y, x: torch.add(x, 1, out=y),
        lambda y, x: y.fill_(float(x[0, 0])),
    ],
)
def test_memory_that_torch_writes_is_never_replayed(touch: Any, extension: Extension) -> None:
    def function(send: Any, x: Tensor) -> list[Tensor]:
        y = torch.empty(2, 3)
        touch(y, x)
        return [y]

    results, kept = repeat(function)
    assert kept == ["never"]
    want = torch.empty(2, 3)
    for turn, (y,) in enumerate(results):
        touch(want, torch.full((2, 3), float(turn)))
        assert torch.equal(y, want)
