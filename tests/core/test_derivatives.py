"""Every derivative that PyTorch can ask for: second ones, torch.func, forward mode."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from alora_kernels import (
    Activation,
    AloraLinear,
    alora_add,
    alora_linear,
    alora_linear_group,
    alora_linear_reference,
)
from alora_kernels.autograd import shaped

from ..oracle import make_case

OPTIONS = [
    {},
    {"dropout_p": 0.3, "seed": 5},
    {"prefix_grad": False},
    {"adapter_precision": "fp32"},
    {"strict_inactive": True},
]


@pytest.fixture
def case():
    return make_case((2, 5), 4, 3, 2, dtype=torch.float64)


def op(case, **options):
    """The op of x, lora_a, lora_b and lora_bias."""

    def f(x, a, b, c):
        return alora_linear(
            x, case.weight, case.bias, a, b, case.activation, 1.5, lora_bias=c, **options
        )

    return f


def definition(case, **options):
    seed = options.pop("seed", None)
    options.pop("strict_inactive", None)

    def f(x, a, b, c):
        return alora_linear_reference(
            x, case.weight, case.bias, a, b, case.mask, 1.5, lora_bias=c,
            seed=None if seed is None else torch.tensor([seed]), **options,
        )  # fmt: skip

    return f


def leaves(case):
    return tuple(t.detach().clone().requires_grad_() for t in case.leaves.values())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_second_derivatives(case, options):
    inputs = leaves(case)
    if options.get("prefix_grad", True):  # without it the gradient is not that of the function
        assert torch.autograd.gradgradcheck(op(case, **options), inputs)
    penalties = []
    for f in (op(case, **options), definition(case, **options)):
        grads = torch.autograd.grad(f(*inputs).pow(3).sum(), inputs, create_graph=True)
        penalty = sum(g.pow(2).sum() for g in grads)
        penalties.append(torch.autograd.grad(penalty, inputs))
    for mine, theirs in zip(*penalties):
        torch.testing.assert_close(mine, theirs)


def test_second_derivatives_by_backward(case):
    """As the Trainer, or a gradient penalty of a GAN, asks for them."""
    results = []
    for f in (op(case), definition(case)):
        inputs = leaves(case)
        (dx,) = torch.autograd.grad(f(*inputs).pow(2).sum(), inputs[0], create_graph=True)
        dx.pow(2).sum().backward()
        results.append([t.grad for t in inputs])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs)


def test_second_derivatives_of_groups_that_share_an_adapter(case):
    x, a, b, c = leaves(case)
    results = []
    for group in (True, False):
        if group:
            ys = alora_linear_group(x, [(case.weight, None, a, b, 1.5, c)] * 2, case.activation)
        else:
            ys = [definition(case)(x, a, b, c) - case.bias for _ in range(2)]
        y = ys[0].pow(3).sum() + ys[1].pow(2).sum()
        first = torch.autograd.grad(y, (x, a, b, c), create_graph=True)
        results.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, a, b, c)))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("inplace", [False, True])
def test_second_derivatives_of_add(case, inplace):
    base = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def f(base, x, a, b, c):
        out = base * 2
        return alora_add(out, x, a, b, case.activation, 1.5, lora_bias=c, inplace=inplace)

    assert torch.autograd.gradgradcheck(f, (base, *leaves(case)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_mode(case, options):
    inputs = [t.detach() for t in leaves(case)]
    tangents = [torch.randn_like(t) for t in inputs]
    wanted = jvp(definition(case, **options), tuple(inputs), tuple(tangents))
    got = jvp(op(case, **options), tuple(inputs), tuple(tangents))
    torch.testing.assert_close(got, wanted)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents)]
        y, dy = forward_ad.unpack_dual(op(case, **options)(*duals))
    torch.testing.assert_close((y, dy), wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_transforms(case, options):
    inputs = tuple(t.detach() for t in leaves(case))
    f, g = op(case, **options), definition(case, **options)

    def loss(h):
        return lambda *args: h(*args).pow(3).sum()

    every = (0, 1, 2, 3)
    for transform in (
        lambda h: grad(loss(h), every)(*inputs),
        lambda h: vjp(h, *inputs)[1](case.dy),
        lambda h: jacrev(h, every)(*inputs),
        lambda h: jacfwd(h, every)(*inputs),
        lambda h: hessian(loss(h), every)(*inputs),
        lambda h: vmap(lambda a: h(inputs[0], a, *inputs[2:]))(torch.stack([inputs[1]] * 3)),
        lambda h: vmap(lambda x: h(x, *inputs[1:]))(torch.stack([inputs[0], inputs[0] * 2])),
    ):
        torch.testing.assert_close(transform(f), transform(g))


def test_gradients_of_each_sample(case):
    """vmap over token ids: each sample has an activation of its own."""
    layer = AloraLinear(4, 3, r=2, lora_alpha=3, dtype=torch.float64)
    torch.nn.init.normal_(layer.lora_B)
    ids = torch.randint(0, 3, (6, 1, 7))
    x = torch.randn(6, 1, 7, 4, dtype=torch.float64)
    trained = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters, ids, x):
        activation = Activation.from_input_ids(ids, [1, 2])
        return functional_call(layer, parameters, (x, activation)).pow(2).sum()

    together = vmap(grad(loss), in_dims=(None, 0, 0))(trained, ids, x)
    for i in range(6):
        layer.zero_grad()
        layer(x[i], Activation.from_input_ids(ids[i], [1, 2])).pow(2).sum().backward()
        for name, value in together.items():
            torch.testing.assert_close(value[i], layer.get_parameter(name).grad)


def test_second_derivatives_in_a_traced_graph(case):
    torch._dynamo.reset()
    results = []
    for f in (torch.compile(op(case), backend="eager", fullgraph=True), definition(case)):
        inputs = leaves(case)
        (dx,) = torch.autograd.grad(f(*inputs).pow(2).sum(), inputs[0], create_graph=True)
        results.append(torch.autograd.grad(dx.pow(2).sum(), inputs))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs)


# ---------------------------------------------------------------------- outputs are not views


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("lead", [(10,), (2, 5), (1, 2, 5)], ids=str)
def test_outputs_may_be_changed_in_place(lead, compiled):
    case = make_case(lead, 4, 3, 2, dtype=torch.float64)
    results = []
    for ours in (True, False):
        x, a, b, c = leaves(case)

        def f(x, a, b, c, ours=ours):
            if ours:
                one = (case.weight, None, a, b, 1.5, c)
                first, second = alora_linear_group(x, [one, one], case.activation)
                third = alora_add(first.clone(), x, a, b, case.activation, 1.5)
            else:
                first = definition(case)(x, a, b, c) - case.bias
                second = first.clone()
                third = definition(case)(x, a, b, c) - case.bias
                third = third + definition(case)(x, a, b, c * 0) - x @ case.weight.T - case.bias
            first.clamp_(-1, 1)
            second.mul_(2)
            third[..., 0] += 1
            return first.sum() + second.pow(2).sum() + third.pow(2).sum()

        torch._dynamo.reset()
        run = torch.compile(f, backend="aot_eager", fullgraph=True) if compiled and ours else f
        results.append(torch.autograd.grad(run(x, a, b, c), (x, a, b, c)))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", ["fresh", "view", "turned"])
def test_a_backend_may_return_views(kind, shape):
    """`shaped` makes an output that is no view, in the memory that the backend filled."""
    with torch.no_grad():
        made = {
            "fresh": lambda: torch.randn(6, 4),
            "view": lambda: torch.randn(7, 4)[1:],
            "turned": lambda: torch.randn(4, 6).t(),
        }[kind]()
        values, address = made.clone(), made.data_ptr()
        y = shaped(made, shape)
    assert y.shape == shape and not y._is_view() and y.data_ptr() == address
    assert torch.equal(y, values.reshape(shape))


# ---------------------------------------------------------------------- other ways of asking


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorised_jacobians(case, strategy):
    def ask(f):
        return torch.autograd.functional.jacobian(
            f, leaves(case), vectorize=True, strategy=strategy
        )

    torch.testing.assert_close(ask(op(case)), ask(definition(case)))


def test_many_gradients_at_once(case):
    dys = torch.randn(4, *case.dy.shape, dtype=torch.float64)
    for traced in (False, True):
        torch._dynamo.reset()
        mine = torch.compile(op(case), backend="eager") if traced else op(case)
        results = []
        for f in (mine, definition(case)):
            inputs = leaves(case)
            results.append(torch.autograd.grad(f(*inputs), inputs, dys, is_grads_batched=True))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "hessian"])
def test_a_transform_in_a_compiled_function(case, transform):
    inputs = tuple(t.detach() for t in leaves(case))

    def ask(f):
        def of_a(a):
            return f(inputs[0], a, *inputs[2:]).pow(3)

        return {
            "grad": grad(lambda a: of_a(a).sum()),
            "jvp": lambda a: jvp(of_a, (a,), (torch.ones_like(a),)),
            "vmap": lambda a: vmap(of_a)(torch.stack([a, a * 2])),
            "hessian": hessian(lambda a: of_a(a).sum()),
        }[transform]

    torch._dynamo.reset()
    compiled = torch.compile(ask(op(case)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs[1]), ask(definition(case))(inputs[1]))
