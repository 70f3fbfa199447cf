"""An option that is added and then forgotten somewhere fails loudly, everywhere."""

from __future__ import annotations

import inspect

import pytest
import torch

import alora_kernels
from alora_kernels import (
    Activation,
    AloraLinear,
    alora_add,
    alora_linear,
    alora_linear_group,
    contract,
    functional,
    nn,
    run,
)

OTHER = {
    "dropout_p": 0.25,
    "prefix_grad": False,
    "adapter_precision": "fp32",
    "strict_inactive": True,
    "backend": "cpu",
    "strategy": "delta",
}


def test_every_option_is_one_of_the_public_functions():
    for function in (alora_linear, alora_linear_group, alora_add):
        parameters = inspect.signature(function).parameters
        for name, value in contract.DEFAULTS._asdict().items():
            assert parameters[name].default == value


def test_every_option_is_one_of_the_registered_ops():
    for op in (torch.ops.alora_kernels.linear, torch.ops.alora_kernels.linear_backward):
        names = [argument.name for argument in op.default._schema.arguments]
        begin = names.index("scalings") + 1
        assert (
            tuple(names[begin : begin + len(contract.Options._fields)]) == contract.Options._fields
        )


def test_every_option_tells_calls_apart():
    x, a, b = torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 2)
    projections = [contract.Projection(torch.randn(5, 4), None, a, b, None)]
    run.forget()
    before = run.entry_of(x, projections, None, Activation.all(3), (1.0,), contract.DEFAULTS)
    assert set(OTHER) == set(contract.Options._fields)
    for name, value in OTHER.items():
        options = contract.DEFAULTS._replace(**{name: value})
        assert run.entry_of(x, projections, None, Activation.all(3), (1.0,), options) is not before


def test_a_new_option_cannot_be_forgotten(monkeypatch):
    """One more option: whoever builds the options without it fails at once."""
    pytest.importorskip("peft")
    from alora_kernels.peft import model as peft_model

    fields = [(n, t) for n, t in contract.Options.__annotations__.items()]
    more = contract.NamedTuple("Options", [*fields, ("novelty", bool)])
    for module in (functional, nn, peft_model):
        monkeypatch.setattr(module, "Options", more)
    x, weight, a, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2)
    activation = Activation.all(3)
    from ..peft.models import adapted, base_model

    for call in (
        lambda: alora_linear(x, weight, None, a, b, activation, 1.0),
        lambda: alora_linear_group(x, [(weight, None, a, b, 1.0)], activation),
        lambda: alora_add(torch.zeros(3, 5), x, a, b, activation, 1.0),
        lambda: AloraLinear(4, 5, r=2, lora_alpha=2)(x, activation),
        lambda: alora_kernels.accelerate(adapted(base_model())),
    ):
        with pytest.raises(TypeError, match="novelty"):
            call()
