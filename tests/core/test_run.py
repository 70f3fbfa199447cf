"""What is remembered of a call is asked for by its signature, bounded, and forgotten when told."""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

import pytest
import torch

from alora_kernels import (
    Activation,
    alora_add,
    alora_linear,
    alora_linear_reference,
    dispatch,
    run,
)


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    run.forget()


def arguments(rows: int = 6, **change: Any) -> dict[str, Any]:
    return {
        "x": torch.randn(rows, 8, dtype=torch.float64),
        "weight": torch.randn(5, 8, dtype=torch.float64),
        "bias": None,
        "lora_a": torch.randn(3, 8, dtype=torch.float64),
        "lora_b": torch.randn(5, 3, dtype=torch.float64),
        "activation": Activation.from_offsets([rows // 2], rows),
        "scaling": 1.5,
        **change,
    }


def agrees(given: dict[str, Any]) -> None:
    mask = given["activation"].mask
    tensors = [given[name] for name in ("x", "weight", "bias", "lora_a", "lora_b")]
    want = alora_linear_reference(*tensors, mask, float(given["scaling"]))
    torch.testing.assert_close(alora_linear(**given), want)


def test_calls_that_differ_in_values_alone_share_what_is_known() -> None:
    for _ in range(3):
        agrees(arguments())
    (found,) = run._memory.values()
    assert found.checked and found.forward is not None


def test_what_the_host_expects_of_an_activation_tells_calls_apart() -> None:
    act = Activation.from_offsets([3], 6)
    tensors = (act.row_adapter, act.active_rows, act.active_count)
    for count, activation in enumerate(
        [
            Activation(*tensors),
            Activation(*tensors, max_active=3),
            Activation(*tensors).expecting(0.5),
        ]
    ):
        agrees(arguments(activation=activation))
        assert len(run._memory) == count + 1


def test_nothing_is_kept_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "KEPT", 3)
    for rows in range(2, 12):
        agrees(arguments(rows))
        assert 0 < len(run._memory) <= 3


def test_a_refused_call_is_not_known_as_good() -> None:
    for _ in range(3):
        with pytest.raises(ValueError, match="finite"):
            alora_linear(**arguments(scaling=float("inf")))


def test_another_base_out_is_checked() -> None:
    given = {n: v for n, v in arguments().items() if n not in ("weight", "bias")}
    right = torch.randn(6, 5, dtype=torch.float64)
    before = alora_add(right, **given)
    for wrong in (right[:, :4], right[:5], right.float()):
        with pytest.raises((ValueError, TypeError), match="base_out"):
            alora_add(wrong, **given)
    turned = right.t().contiguous().t()
    torch.testing.assert_close(alora_add(turned, **given), before)


def test_a_scaling_that_changes_in_place() -> None:
    scaling = torch.tensor(1.5)
    given = arguments(scaling=scaling)
    agrees(given)
    scaling.fill_(4.0)
    agrees(given)
    scaling.fill_(torch.inf)
    with pytest.raises(ValueError, match="scaling must be finite"):
        alora_linear(**given)


def test_subclasses_are_checked_in_every_call() -> None:
    class Sub(torch.Tensor):
        pass

    for _ in range(2):
        agrees(arguments(lora_a=torch.randn(3, 8, dtype=torch.float64).as_subclass(Sub)))
    assert not run._memory


def test_the_choice_is_made_anew_when_told() -> None:
    given = arguments()
    alora_linear(**given)
    alone = {"reference": dispatch.BACKENDS["reference"]}
    with mock.patch.dict(dispatch.BACKENDS, alone, clear=True):
        run.forget()
        alora_linear(**given)
        (found,) = run._memory.values()
        assert found.forward is not None and found.forward[0].name == "reference"
    run.forget()


def test_the_environment_is_asked_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments()
    alora_linear(**given)
    monkeypatch.setenv("ALORA_STRATEGY", "tail")
    monkeypatch.setenv("ALORA_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="cpu/tail"):
        alora_linear(**given)
    monkeypatch.undo()
    agrees(given)


def test_grad_mode_and_requires_grad_come_and_go() -> None:
    given = arguments()
    for _ in range(2):
        assert not alora_linear(**given).requires_grad
        given["lora_b"].requires_grad_()
        assert alora_linear(**given).requires_grad
        with torch.no_grad():
            assert not alora_linear(**given).requires_grad
        given["lora_b"].requires_grad_(False)


def test_threads_find_what_is_theirs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "KEPT", 4)
    failures: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for turn in range(40):
                agrees(arguments(2 + (offset + turn) % 7))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures[0]
