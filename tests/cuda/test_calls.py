"""Public calls that differ in what a remembered program must notice, on a stubbed extension.

Each call is made twice, as it comes and planned anew, and launches the same.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from alora_kernels import Activation, alora_add, alora_linear, dispatch
from alora_kernels.backends.cuda import CudaBackend
from alora_kernels.backends.programs import signature_of
from alora_kernels.contract import Problem
from alora_kernels.run import forget

from .stub import Extension, Launched, symbolic

K, N, R, M = 64, 128, 16, 128


class Here(CudaBackend):
    """The cuda backend, told that it can run here."""

    def why_not_here(self) -> str | None:
        return None

    def why_not(self, problem: Problem, strategy: str) -> str | None:
        return super().why_not(problem._replace(device="cuda"), strategy)


class Twin:
    """Makes a call as it comes and planned anew."""

    def __init__(self, extension: Extension, backend: Here) -> None:
        self.extension, self.backend = extension, backend

    def __call__(self, call: Callable[[], Any], **tensors: Tensor) -> list[Any]:
        """The launches, with the names of `tensors` for their addresses."""
        shown, kept, remembered = [], [], self.backend._programs
        for programs in (remembered, {}):
            self.extension.launches = []
            with mock.patch.object(self.backend, "_programs", programs):
                kept.append(call())
            shown.append(self.extension.launches)
        got, want = [symbolic(launches, tensors) for launches in shown]
        assert got == want and got
        return got


@pytest.fixture
def twin(extension: Extension, monkeypatch: pytest.MonkeyPatch) -> Iterator[Twin]:
    found = Twin(extension, Here(machine=(132, 80)))
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", found.backend)
    forget()
    yield found
    forget()


def layer(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    return {
        "x": torch.randn(M, K).to(dtype),
        "weight": torch.randn(N, K).to(dtype),
        "bias": None,
        "lora_a": torch.randn(R, K).to(dtype),
        "lora_b": torch.randn(N, R).to(dtype),
        "activation": Activation.from_offsets([40], M),
        "scaling": 1.5,
        "backend": "cuda",
        "strategy": "tail",
    }


def operands(given: dict[str, Any]) -> dict[str, Tensor]:
    return {k: given[k] for k in ("x", "weight", "lora_a", "lora_b")}


def warm(twin: Twin, given: dict[str, Any]) -> list[Any]:
    """Call until the program is remembered."""
    for _ in range(3):
        made = twin.extension.made
        shown = twin(lambda: alora_linear(**given), **operands(given))
    assert twin.extension.made == made + 1, "only what is planned anew is made"
    return shown


CHANGES: dict[str, dict[str, Any]] = {
    "strict_inactive": {"strict_inactive": True, "strategy": "auto"},
    "strategy": {"strategy": "onepass"},
    "scaling": {"scaling": 2.5},
    "dropout": {"dropout_p": 0.25, "seed": torch.tensor([5])},
    "more rows active": {"activation": Activation.from_offsets([100], M)},
    "fewer rows": {"x": torch.randn(64, K).bfloat16(), "activation": Activation.all(64)},
    "strides of x": {"x": torch.randn(K, M).bfloat16().t()},
    "alignment of x": {"x": torch.randn(M * K + 1).bfloat16()[1:].view(M, K)},
    "strides of the weight": {"weight": torch.randn(K, N).bfloat16().t()},
    "a bias": {"bias": torch.randn(N).bfloat16()},
    "float adapters": {"lora_a": torch.randn(R, K), "lora_b": torch.randn(N, R)},
    "rank": {"lora_a": torch.randn(8, K).bfloat16(), "lora_b": torch.randn(N, 8).bfloat16()},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str, twin: Twin) -> None:
    given = layer()
    before = warm(twin, given)
    other = {**given, **CHANGES[name]}
    for _ in range(4):
        assert twin(lambda: alora_linear(**other), **operands(other)) != before
    assert twin(lambda: alora_linear(**given), **operands(given)) == before


def test_bounds_of_an_unknown_number_of_active_rows(twin: Twin) -> None:
    act, given = Activation.from_offsets([40], M), layer()
    tensors = (act.row_adapter, act.active_rows, act.active_count)
    given["activation"] = Activation(*tensors, max_active=40)
    before = warm(twin, given)
    given["activation"] = Activation(*tensors, max_active=100)
    for _ in range(4):
        assert twin(lambda: alora_linear(**given), **operands(given)) != before


def test_weights_changed_in_place_and_anew(twin: Twin) -> None:
    given = layer()
    before = warm(twin, given)
    given["weight"].mul_(2)
    assert twin(lambda: alora_linear(**given), **operands(given)) == before
    given["weight"].data = torch.randn(N, K).bfloat16()
    assert twin(lambda: alora_linear(**given), **operands(given)) == before
    given["lora_a"].data = given["lora_a"].data[:8]
    given["lora_b"].data = given["lora_b"].data[:, :8]
    assert twin(lambda: alora_linear(**given), **operands(given)) != before


def test_autocast_comes_and_goes(twin: Twin) -> None:
    given = {**layer(), "lora_a": torch.randn(R, K), "lora_b": torch.randn(N, R)}
    before = warm(twin, given)

    def cast() -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return alora_linear(**given)

    for _ in range(4):
        assert twin(cast)[0][0][0] != before[0][0][0]  # kernels of another dtype
        assert twin(lambda: alora_linear(**given), **operands(given)) == before


def test_gradients_come_and_go(twin: Twin) -> None:
    given = layer()
    plain = warm(twin, given)
    given["lora_a"].requires_grad_()
    for _ in range(4):
        for y in (alora_linear(**given), alora_linear(**given)):
            assert y.requires_grad
        with torch.no_grad():
            assert not alora_linear(**given).requires_grad
            assert twin(lambda: alora_linear(**given), **operands(given)) == plain
        with torch.inference_mode():
            assert alora_linear(**given).is_inference()
    weight = given["weight"].requires_grad_()
    with torch.no_grad():
        assert not alora_linear(**given).requires_grad
    with pytest.raises(ValueError, match=r"weight\.requires_grad is True"):
        alora_linear(**given)
    weight.requires_grad_(False)
    assert alora_linear(**given).requires_grad


def test_hooks_lay_saved_tensors_out_anew(twin: Twin) -> None:
    """Backward's tensors need not be laid out as forward's were."""
    given = layer()
    given["x"] = torch.randn(K, M).bfloat16().t().requires_grad_()
    given["lora_a"].requires_grad_()
    dy = torch.randn(M, N).bfloat16()

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(alora_linear(**given), given["x"], dy)

    for _ in range(4):
        plain = twin(both)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, Tensor.contiguous):
        for _ in range(4):
            hooked = twin(both)
    assert hooked != plain


def test_adding_in_place_and_not(twin: Twin) -> None:
    """One layout of the base output, two of what is added to."""
    given = layer()
    wide = torch.randn(M, 2 * N).bfloat16()
    names = ("x", "lora_a", "lora_b", "activation", "scaling")
    args = {"base_out": wide[:, :N], **{k: given[k] for k in names}, "backend": "cuda"}
    shown = []
    for inplace in (True, False, True, False, True, False, True):
        call = functools.partial(alora_add, **args, inplace=inplace)
        shown.append(twin(call, x=given["x"], base=wide))
    assert shown[0] == shown[2] == shown[6] and shown[1] == shown[3] == shown[5]
    assert shown[0] != shown[1]


def test_deterministic_algorithms_fill_what_is_made(twin: Twin) -> None:
    given = layer()
    before = warm(twin, given)
    torch.use_deterministic_algorithms(True)
    try:
        assert twin(lambda: alora_linear(**given), **operands(given)) == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_stream_is_that_of_the_call(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    given = layer()
    warm(twin, given)
    for stream in (7, 9):
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device, s=stream: s)
        twin.extension.launches = []
        alora_linear(**given)
        assert {done.stream for done in twin.extension.launches} == {stream}


def test_the_environment_is_asked_in_every_call(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**layer(), "strategy": "auto"}
    monkeypatch.setenv("ALORA_STRATEGY", "tail")
    before = warm(twin, given)
    monkeypatch.setenv("ALORA_STRATEGY", "onepass")
    assert twin(lambda: alora_linear(**given), **operands(given)) != before
    monkeypatch.setenv("ALORA_STRATEGY", "tail")
    assert twin(lambda: alora_linear(**given), **operands(given)) == before


def test_other_devices_are_other_problems() -> None:
    x = torch.randn(4, 8)
    assert signature_of([x]) == signature_of([x.clone()])
    assert signature_of([x]) != signature_of([x.to("meta")])


def test_threads_launch_with_their_own_tensors(twin: Twin) -> None:
    """Threads run one program and mix nothing up."""
    twin.backend._fixed_machine = (132, 90)  # whose kernels take tensor maps
    warm(twin, layer())
    mine: dict[int, list[Launched]] = {}

    class Kept(list):
        """Launches, each with the thread that made it."""

        def append(self, done: Launched) -> None:
            mine.setdefault(threading.get_ident(), []).append(done)

    twin.extension.launches = Kept()
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            torch.manual_seed(seed)
            for _ in range(50):
                given = layer()
                mine[threading.get_ident()] = []
                alora_linear(**given)
                fields = [done.fields for done in mine[threading.get_ident()]]
                numbers = {v for f in fields for v in f.values() if isinstance(v, int)}
                maps = {v[0] for f in fields for v in f.values() if isinstance(v, tuple) and v}
                for name, t in operands(given).items():
                    assert t.data_ptr() in numbers | maps, name
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures, failures[0]
    assert mine
