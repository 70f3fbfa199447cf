"""Scalings that are tensors, change in place, or are symbols of a compiler."""

from __future__ import annotations

import pytest
import torch

from alora_kernels import alora_add, alora_linear, alora_linear_group

from ..oracle import assert_within_bound, make_case, run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["", "trained"])
def test_a_tensor_scales_as_its_number_does(dtype, shape, trained):
    case = make_case((4, 30), 24, 18, 6, dtype=dtype, adapter_dtype=dtype)
    scaling = torch.full(shape, case.scaling, requires_grad=trained)

    def by_tensor(x, weight, bias, lora_a, lora_b, activation, _, **options):
        return alora_linear(x, weight, bias, lora_a, lora_b, activation, scaling, **options)

    assert_within_bound(run(case, by_tensor), case)


def test_a_tensor_is_read_in_every_call():
    case = make_case()
    scaling = torch.tensor(1.0)
    args = (case.x, case.weight, case.bias, case.lora_a, case.lora_b, case.activation)
    for value in (1.0, 3.0, -2.0):
        scaling.fill_(value)
        assert torch.equal(alora_linear(*args, scaling), alora_linear(*args, value))


def test_a_scaling_can_be_trained():
    case = make_case(dtype=torch.float64)
    scaling = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def f(scaling, lora_b, lora_bias):
        args = (case.x, case.weight, case.bias, case.lora_a, lora_b, case.activation, scaling)
        return alora_linear(*args, lora_bias=lora_bias)

    leaves = [t.detach().clone().requires_grad_() for t in (case.lora_b, case.lora_bias)]
    assert torch.autograd.gradcheck(f, (scaling, *leaves))


def test_each_projection_has_its_own():
    case = make_case()
    two = [(case.weight, None, case.lora_a, case.lora_b, s) for s in (torch.tensor(3.0), 0.5)]
    ys = alora_linear_group(case.x, two, case.activation)
    for y, scaling in zip(ys, (3.0, 0.5)):
        args = (case.x, case.weight, None, case.lora_a, case.lora_b, case.activation, scaling)
        torch.testing.assert_close(y, alora_linear(*args))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("inf"))])
def test_a_number_that_is_not_finite_is_refused(value):
    case = make_case()
    args = (case.x, case.weight, case.bias, case.lora_a, case.lora_b, case.activation, value)
    with pytest.raises(ValueError, match=r"scaling must be finite, got (nan|inf)"):
        alora_linear(*args)


def test_a_tensor_of_several_elements_is_refused():
    case = make_case()
    args = (case.x, case.lora_a, case.lora_b, case.activation, torch.ones(2))
    with pytest.raises(ValueError, match=r"must have one element, got shape \(2,\)"):
        alora_add(torch.zeros(*case.x.shape[:-1], case.weight.shape[0]), *args)


class Layer(torch.nn.Module):
    def __init__(self, case, scaling):
        super().__init__()
        self.case, self.scaling = case, scaling

    def forward(self, x, activation):
        case = self.case
        args = (case.weight, case.bias, case.lora_a, case.lora_b, activation, self.scaling)
        return alora_linear(x, *args)


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("dynamic", [None, True], ids=str)
def test_a_compiler_makes_one_graph_more_for_another_scaling(tensor, dynamic):
    """One graph for a tensor; two for a number that changes, as for any number of a module."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    case = make_case(dtype=torch.float64)
    layer = Layer(case, torch.tensor(1.5) if tensor else 1.5)
    compiled = torch.compile(layer, backend=backend, dynamic=dynamic, fullgraph=True)
    for value in (1.5, 0.25, -3.0, 7.0):
        if tensor:
            layer.scaling.fill_(value)
        else:
            layer.scaling = value
        args = (case.x, case.weight, case.bias, case.lora_a, case.lora_b, case.activation)
        got = compiled(case.x, case.activation)
        torch.testing.assert_close(got, alora_linear(*args, value))
    assert len(graphs) == (1 if tensor or dynamic else 2)
