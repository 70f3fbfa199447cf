"""The registered ops: torch's own checks, compile, export, and equality with the eager path."""

from __future__ import annotations

import pytest
import torch

import alora_kernels.functional as functional
from alora_kernels import Activation, AloraLinear, activate, alora_add, alora_linear_group

from ..oracle import make_case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def traced(monkeypatch):
    """Makes the public functions take the registered op, as they do under a compiler."""

    def switch(on: bool = True) -> None:
        monkeypatch.setattr(functional, "FakeTensor", torch.Tensor if on else ())

    return switch


def op_args(case, needs_grad: bool, add: bool = False):
    leaves = {n: t.detach().clone().requires_grad_(needs_grad) for n, t in case.leaves.items()}
    activation = case.activation
    base = [torch.randn(*case.x.shape[:-1], case.weight.shape[0])] if add else []
    bias = [] if case.bias is None or add else [case.bias]
    lora_bias = [leaves["lora_bias"]] if "lora_bias" in leaves else []
    dropout_p = case.options.get("dropout_p", 0.0)
    return (
        leaves["x"],
        base,
        [] if add else [case.weight],
        bias,
        [leaves["lora_a"]],
        [leaves["lora_b"]],
        lora_bias,
        activation.row_adapter,
        activation.active_rows,
        activation.active_count,
        torch.tensor([5]) if dropout_p else None,
        [bool(bias)],
        [bool(lora_bias)],
        [case.scaling],
        dropout_p,
        True,
        "compute",
        False,
        "auto",
        "auto",
        needs_grad,
    )


CASES = [{}, {"bias": False, "lora_bias": False}, {"dropout_p": 0.3}]


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_opcheck_forward(needs_grad, options, add) -> None:
    # opcheck compares every output, and `xa` is written on active rows and real columns alone.
    whole = {"rank": 16, "fraction": 1.0} if needs_grad else {"rank": 3}
    case = make_case((2, 5), 7, 6, strided=False, **whole, **options)
    torch.library.opcheck(torch.ops.alora_kernels.linear.default, op_args(case, needs_grad, add))


def test_opcheck_backward() -> None:
    case = make_case((2, 5), 7, 6, 3, strided=False)
    args = op_args(case, False)
    xa = torch.randn(10, 16)
    needs = [True] * 4
    torch.library.opcheck(
        torch.ops.alora_kernels.linear_backward.default, ([case.dy], xa, *args[:-1], needs)
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("what", ["linear", "group", "add", "add in place"])
def test_the_op_and_the_function_give_equal_bits(traced, what, dropout_p) -> None:
    cases = [make_case((2, 20), 24, 10 + i, 4 + i) for i in range(2)]
    options = {"dropout_p": dropout_p, "seed": torch.tensor([9])}
    results = []
    for on in (False, True):
        traced(on)
        x = cases[0].x.detach().requires_grad_()
        leaves = [
            tuple(c.leaves[n].detach().requires_grad_() for n in ("lora_a", "lora_b", "lora_bias"))
            for c in cases
        ]
        activation = cases[0].activation
        projections = [
            (c.weight, c.bias, *mine[:2], c.scaling, mine[2]) for c, mine in zip(cases, leaves)
        ]
        if what.startswith("add"):
            base = torch.nn.functional.linear(x, cases[0].weight)
            a, b, c = leaves[0]
            ys = (
                alora_add(base, x, a, b, activation, 1.5, lora_bias=c,
                          inplace=what != "add", **options),
            )  # fmt: skip
            wanted = [x, *leaves[0]]
        else:
            many = projections[: 2 if what == "group" else 1]
            ys = alora_linear_group(x, many, activation, **options)
            wanted = [x, *(t for mine in leaves[: len(many)] for t in mine)]
        grads = torch.autograd.grad(ys, wanted, [c.dy for c in cases[: len(ys)]])
        results.append([*ys, *grads])
    for eager, op in zip(*results):
        assert torch.equal(eager, op)


LENGTHS = [
    (10, [2, None, 9]),
    (12, [3, 1, None]),  # the one shape change that may recompile
    (17, [None, None, None]),  # no active row
    (33, [0, 5, 32]),
    (2, [1, 1, 1]),
    (12, [0, 0, 0]),
]


@pytest.mark.parametrize("ambient", [False, True])
def test_compile_recompiles_once_at_most(ambient) -> None:
    torch._dynamo.reset()
    layer = AloraLinear(24, 20, r=4, lora_alpha=8)
    torch.nn.init.normal_(layer.lora_B)
    graphs = 0

    def counting(module, inputs):
        nonlocal graphs
        graphs += 1
        return module.forward

    def f(x, activation):
        return layer(x) if ambient else layer(x, activation)

    compiled = torch.compile(f, fullgraph=True, backend=counting)
    for length, starts in LENGTHS:
        x = torch.randn(3, length, 24, requires_grad=True)
        activation = Activation.from_starts(starts, length)
        with activate(activation if ambient else None):
            y = compiled(x, activation)
            want = layer(x, activation)
        assert torch.equal(y, want)
        dy = torch.randn_like(y)
        inputs = [x, layer.lora_A, layer.lora_B]
        for got, expected in zip(
            torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, inputs, dy)
        ):
            assert torch.equal(got, expected)
    assert graphs <= 2


def test_compile_under_autocast() -> None:
    torch._dynamo.reset()
    layer = AloraLinear(24, 20, r=4, lora_alpha=8)
    torch.nn.init.normal_(layer.lora_B)
    activation = Activation.from_starts([2, None], 5)
    x = torch.randn(2, 5, 24, requires_grad=True)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x, activation)

    y, want = torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, want)
    inputs = [x, layer.lora_A, layer.lora_B]
    grads = torch.autograd.grad(y.float().square().sum(), inputs)
    for got, expected in zip(grads, torch.autograd.grad(want.float().square().sum(), inputs)):
        assert torch.equal(got, expected)


@pytest.mark.slow
def test_compile_by_inductor_with_the_search_inside() -> None:
    """The whole forward, invocation search included, in one graph through torch's own compiler."""
    torch._dynamo.reset()
    layer = AloraLinear(16, 12, r=4, lora_alpha=8, lora_dropout=0.25)
    torch.nn.init.normal_(layer.lora_B)

    def f(ids, x):
        activation = Activation.from_input_ids(ids, [1, 2])
        with activate(activation):
            return layer(x, activation).square()

    compiled = torch.compile(f, fullgraph=True)
    ids, x = torch.randint(0, 3, (4, 9)), torch.randn(4, 9, 16, requires_grad=True)
    ids[0, 3:5] = torch.tensor([1, 2])
    layer.eval()
    torch.testing.assert_close(compiled(ids, x), f(ids, x))
    layer.train()
    y = compiled(ids, x)
    inactive = ~Activation.from_input_ids(ids, [1, 2]).mask
    base = torch.nn.functional.linear(x, layer.weight, layer.bias).square()
    torch.testing.assert_close(y.view(36, -1)[inactive], base.view(36, -1)[inactive])
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [x, layer.lora_A]))


def test_export() -> None:
    layer = AloraLinear(16, 12, r=4, lora_alpha=8).eval()
    torch.nn.init.normal_(layer.lora_B)
    x, activation = torch.randn(2, 6, 16), Activation.from_starts([1, None], 6)
    program = torch.export.export(layer, (x, activation))
    targets = {str(n.target) for n in program.graph.nodes}
    assert "alora_kernels.linear.default" in targets
    other = Activation.from_starts([None, 0], 6)
    assert torch.equal(program.module()(x, other), layer(x, other))


def test_meta_tensors_give_shapes() -> None:
    case = make_case(strided=False)
    for name in ("x", "weight", "bias", "lora_a", "lora_b", "lora_bias"):
        setattr(case, name, getattr(case, name).to("meta"))
    case.mask = case.mask.to("meta")
    x = case.x.requires_grad_()
    y = functional.alora_linear(
        x, case.weight, case.bias, case.lora_a, case.lora_b, case.activation, 1.0
    )
    assert y.device.type == "meta" and y.shape == (2, 19, 21)
    (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert dx.shape == x.shape


def test_functional_call_swaps_the_adapter() -> None:
    layer = AloraLinear(16, 12, r=4, lora_alpha=8)
    x, activation = torch.randn(5, 16), Activation.all(5)
    other = {"lora_B": torch.randn(12, 4)}
    y = torch.func.functional_call(layer, other, (x, activation))
    torch.nn.init.zeros_(layer.lora_B)
    want = layer(x, activation) + 2.0 * (x @ layer.lora_A.T) @ other["lora_B"].T
    torch.testing.assert_close(y, want)
