"""One row on a CPU takes a short way that remembers nothing and refuses what the usual one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alora_kernels import Activation, alora_linear, alora_linear_group, alora_linear_reference, run
from alora_kernels.backends.cpu import CpuBackend


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many projections each call of the short way computed."""
    calls: list[int] = []
    one_row = CpuBackend.one_row

    def counted(self: Any, row: Any, projections: Any, scalings: Any) -> Any:
        calls.append(len(projections))
        return one_row(self, row, projections, scalings)

    monkeypatch.setattr(CpuBackend, "one_row", counted)
    run.forget()
    return calls


def arguments(dtype: torch.dtype = torch.float64, **change: Any) -> dict[str, Any]:
    given = {
        "x": torch.randn(1, 1, 7),
        "weight": torch.randn(5, 7),
        "bias": torch.randn(5),
        "lora_a": torch.randn(3, 7),
        "lora_b": torch.randn(5, 3),
        "lora_bias": torch.randn(5),
    }
    given = {name: value.to(dtype) for name, value in given.items()}
    return {**given, "activation": Activation.all(1), "scaling": 1.5, **change}


def expected(given: dict[str, Any]) -> torch.Tensor:
    tensors = [given[name] for name in ("x", "weight", "bias", "lora_a", "lora_b")]
    mask = given["activation"].mask
    return alora_linear_reference(*tensors, mask, given["scaling"], lora_bias=given["lora_bias"])


def agrees(given: dict[str, Any]) -> None:
    torch.testing.assert_close(alora_linear(**given), expected(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (1, 1, 1)], ids=str)
@torch.no_grad()
def test_it_computes_the_same(short: list[int], dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    for change in ({}, {"bias": None}, {"lora_bias": None}):
        agrees(arguments(dtype, x=torch.randn(*lead, 7, dtype=dtype), **change))
    assert short == [1, 1, 1] and not run._memory  # nothing is remembered


@torch.no_grad()
def test_tensors_may_change_in_any_way(short: list[int]) -> None:
    given = arguments()
    agrees(given)
    given["weight"].data = torch.randn(5, 14, dtype=torch.float64)[:, ::2]  # other strides
    agrees(given)
    given["lora_a"].data, given["lora_b"].data = (
        torch.randn(4, 7, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64),
    )  # fmt: skip
    agrees(given)
    assert short == [1, 1, 1]


@torch.no_grad()
def test_a_group_is_one_call(short: list[int]) -> None:
    one, two = arguments(), arguments()
    layers = [
        (g["weight"], g["bias"], g["lora_a"], g["lora_b"], g["scaling"], g["lora_bias"])
        for g in (one, two)
    ]
    ys = alora_linear_group(one["x"], layers, one["activation"])
    for y, given in zip(ys, (one, {**two, "x": one["x"]})):
        torch.testing.assert_close(y, expected(given))
    assert short == [2]


@torch.no_grad()
def test_an_output_owns_its_memory() -> None:
    y = alora_linear(**arguments())
    assert not y._is_view()
    with torch.enable_grad():  # autograd refuses to change a view that was made without gradients
        y.mul_(torch.ones((), dtype=y.dtype, requires_grad=True))


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.randn(2, 7, dtype=torch.float64), "activation": Activation.all(2)},
        {"activation": Activation.none(1)},
        {"dropout_p": 0.5},
        {"backend": "reference"},
    ],
    ids=["two rows", "not active", "dropout", "the reference"],
)
@torch.no_grad()
def test_other_calls_take_the_usual_way(short: list[int], change: dict[str, Any]) -> None:
    alora_linear(**arguments(**change))
    assert not short


def test_gradients_take_the_usual_way(short: list[int]) -> None:
    given = arguments()
    given["x"].requires_grad_(True)
    alora_linear(**given).sum().backward()
    assert given["x"].grad is not None and not short


@torch.no_grad()
def test_other_dtypes_take_the_usual_way(short: list[int]) -> None:
    alora_linear(**arguments(torch.bfloat16))
    half = arguments(torch.float32)
    half["lora_a"], half["lora_b"] = half["lora_a"].double(), half["lora_b"].double()
    with pytest.raises(TypeError, match="lora_a must be"):
        alora_linear(**half)
    with torch.autocast("cpu", torch.bfloat16):
        assert alora_linear(**arguments(torch.float32)).dtype == torch.bfloat16
    assert not short


@torch.no_grad()
def test_the_environment_is_asked_in_every_call(
    short: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments()
    agrees(given)
    monkeypatch.setenv("ALORA_BACKEND", "reference")
    agrees(given)
    monkeypatch.setenv("ALORA_BACKEND", "cpu")
    monkeypatch.setenv("ALORA_STRATEGY", "tail")
    with pytest.raises(RuntimeError, match="cpu/tail"):
        alora_linear(**given)
    assert short == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(1, 6)}, "lora_a has K=7 but x has K=6"),
        ({"weight": torch.randn(4, 7)}, r"weight must have shape \[5, 7\], got \[4, 7\]"),
        ({"weight": torch.randn(5, 7, device="meta")}, "weight is on meta but x is on cpu"),
        ({"weight": torch.randn(5, 7, 1)}, r"weight must have shape \[N, K\]"),
        ({"bias": torch.randn(1)}, r"bias must have shape \[5\], got \[1\]"),
        ({"lora_bias": torch.randn(1)}, r"lora_bias must have shape \[5\], got \[1\]"),
        ({"lora_b": torch.randn(1, 3)}, "must have shape"),
        ({"lora_a": torch.randn(0, 7), "lora_b": torch.randn(5, 0)}, "rank must be at least 1"),
        ({"activation": Activation.all(3)}, "activation describes 3 rows but x has 1"),
        ({"x": torch.randn(1, 1, 1, 1, 7)}, "x must have 1 to 4 dimensions, got 5"),
        ({"scaling": float("inf")}, "scaling must be finite"),
        ({"adapter_precision": "half"}, "adapter_precision must be one of"),
        ({"strategy": "magic"}, "unknown strategy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.no_grad()
def test_it_refuses_as_the_usual_way_does(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alora_linear(**arguments(torch.float32, **change))
