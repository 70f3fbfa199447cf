"""Bad input: refused before any work, naming the argument, what came and what was expected."""

from __future__ import annotations

import math

import pytest
import torch

from alora_kernels import Activation, alora_add, alora_linear, alora_linear_group


def good() -> dict:
    """Arguments that work: M=6, K=8, N=5, R=3."""
    return {
        "x": torch.randn(2, 3, 8),
        "weight": torch.randn(5, 8),
        "bias": torch.randn(5),
        "lora_a": torch.randn(3, 8),
        "lora_b": torch.randn(5, 3),
        "activation": Activation.all(6),
        "scaling": 1.0,
    }


BAD = [
    (
        {"x": torch.randn(2, 3, 8).long()},
        TypeError,
        "x must have a floating dtype, got torch.int64",
    ),
    ({"x": torch.randn(1, 1, 1, 2, 3, 8)}, ValueError, "1 to 4 dimensions, got 6"),
    ({"x": torch.randn(2, 3, 7)}, ValueError, "lora_a has K=8 but x has K=7"),
    ({"weight": None}, ValueError, r"weight must have shape \[N, K\], got None"),
    ({"weight": torch.randn(5, 9)}, ValueError, r"weight must have shape \[5, 8\], got \[5, 9\]"),
    ({"weight": torch.randn(5, 8).half()}, TypeError, "weight must be torch.float32"),
    ({"weight": torch.randn(5, 8, device="meta")}, ValueError, "weight is on meta but x is on cpu"),
    ({"weight": torch.randn(5, 8).requires_grad_()}, ValueError, "weight.requires_grad is True"),
    ({"bias": torch.randn(5).requires_grad_()}, ValueError, "bias.requires_grad is True"),
    ({"bias": torch.randn(4)}, ValueError, r"bias must have shape \[5\], got \[4\]"),
    ({"lora_a": torch.randn(8)}, ValueError, r"got \(8,\) and \(5, 3\)"),
    ({"lora_a": torch.randn(0, 8), "lora_b": torch.randn(5, 0)}, ValueError, "R=0"),
    ({"lora_b": torch.randn(5, 4)}, ValueError, "lora_b has R=4 but lora_a has R=3"),
    ({"lora_a": torch.randn(3, 8).half()}, TypeError, "lora_a must be torch.float32"),
    ({"lora_b": torch.randn(5, 3).double()}, TypeError, "lora_b must be torch.float32"),
    ({"lora_bias": torch.randn(3)}, ValueError, r"lora_bias must have shape \[5\]"),
    ({"activation": torch.ones(6)}, TypeError, "got Tensor; Activation.from_mask"),
    ({"activation": Activation.all(7)}, ValueError, "describes 7 rows but x has 6"),
    ({"activation": Activation.from_offsets([6], 8)}, ValueError, "describes 8 rows but x has 6"),
    ({"activation": Activation.all(6).to("meta")}, ValueError, "activation is on meta"),
    ({"scaling": math.nan}, ValueError, "scaling must be finite, got nan"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ({"dropout_p": 0.5, "seed": torch.ones(1)}, ValueError, "seed must be an int64 tensor"),
    ({"backend": "cudnn"}, ValueError, "unknown backend 'cudnn'; the backends are auto, "),
    ({"strategy": "twopass"}, ValueError, "unknown strategy 'twopass'"),
    ({"adapter_precision": "fp64"}, ValueError, "one of compute, fp32, got 'fp64'"),
    ({"backend": "cpu", "strategy": "tail"}, RuntimeError, "cpu/tail: the CPU backend has"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD, ids=[words for *_, words in BAD])
def test_alora_linear_refuses(change, error, words) -> None:
    """Whatever was called before: what is known of good calls excuses no bad one."""
    for _ in range(2):
        with pytest.raises(error, match=words):
            alora_linear(**{**good(), **change})
        alora_linear(**good())


def test_alora_add_refuses_another_base_output() -> None:
    args = good()
    rest = [args[n] for n in ("x", "lora_a", "lora_b", "activation", "scaling")]
    for _ in range(2):
        alora_add(torch.randn(2, 3, 5), *rest)
        with pytest.raises(ValueError, match=r"base_out must have shape \[2, 3, 5\]"):
            alora_add(torch.randn(2, 3, 4), *rest)
        with pytest.raises(TypeError, match=r"base_out must be torch\.float32"):
            alora_add(torch.randn(2, 3, 5).half(), *rest)


def test_what_has_no_hash_is_refused_too() -> None:
    with pytest.raises(ValueError, match=r"unknown strategy \['tail'\]"):
        alora_linear(**{**good(), "strategy": ["tail"]})


def test_errors_name_the_function_that_was_called() -> None:
    args = good()
    layer = (args["weight"], args["bias"], args["lora_a"], args["lora_b"], math.inf)
    with pytest.raises(ValueError, match=r"^alora_linear_group: scaling"):
        alora_linear_group(args["x"], [layer], args["activation"])
    with pytest.raises(ValueError, match=r"^alora_add: base_out must have shape"):
        alora_add(
            torch.randn(2, 3, 4), args["x"], args["lora_a"], args["lora_b"], Activation.all(6), 1.0
        )


def test_group_refuses_malformed_projections() -> None:
    args = good()
    with pytest.raises(ValueError, match="projection 0 has 2 items"):
        alora_linear_group(args["x"], [(args["weight"], args["bias"])], args["activation"])
    with pytest.raises(ValueError, match="empty"):
        alora_linear_group(args["x"], [], args["activation"])


def test_a_refused_call_in_place_changes_nothing() -> None:
    args = good()
    base = torch.randn(2, 3, 5)
    before = base.clone()
    with pytest.raises(ValueError):
        alora_add(
            base,
            args["x"],
            args["lora_a"],
            args["lora_b"],
            Activation.all(6),
            math.inf,
            inplace=True,
        )
    assert torch.equal(base, before)


def test_a_weight_subclass_is_pointed_to_alora_add() -> None:
    class Quantised(torch.Tensor):
        pass

    for _ in range(2):
        alora_linear(**good())
        with pytest.raises(TypeError, match=r"weight is a Quantised.*alora_add"):
            alora_linear(**{**good(), "weight": torch.randn(5, 8).as_subclass(Quantised)})


def test_a_frozen_weight_in_no_grad_may_require_grad() -> None:
    with torch.no_grad():
        y = alora_linear(**{**good(), "weight": torch.randn(5, 8).requires_grad_()})
    assert y.isfinite().all()
