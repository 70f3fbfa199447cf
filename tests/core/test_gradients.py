"""What autograd users rely on: exactness, determinism, no wasted work, checkpointing, autocast."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from alora_kernels import Activation, AloraLinear, alora_add, alora_linear

from ..oracle import assert_within_bound, make_case, run

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "matmul", "linear")


class CountProducts(TorchDispatchMode):
    """Counts matrix products as they reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in PRODUCTS:
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.ops.values())


def leaves_of(case):
    return {n: t.detach().clone().requires_grad_() for n, t in case.leaves.items()}


def apply(case, leaves, **options):
    return alora_linear(
        leaves["x"],
        case.weight,
        case.bias,
        leaves["lora_a"],
        leaves["lora_b"],
        case.activation,
        case.scaling,
        lora_bias=leaves.get("lora_bias"),
        **options,
    )


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": 5}], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(options, backend) -> None:
    case = make_case((2, 5), 4, 3, 2, dtype=torch.float64)

    def f(*tensors):
        leaves = dict(zip(case.leaves, tensors))
        return apply(case, leaves, backend=backend, **options)

    assert torch.autograd.gradcheck(f, tuple(leaves_of(case).values()))


def test_gradcheck_of_add() -> None:
    case = make_case((2, 5), 4, 3, 2, dtype=torch.float64)
    base = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def f(base, x, a, b, c):
        return alora_add(base, x, a, b, case.activation, 1.5, lora_bias=c)

    assert torch.autograd.gradcheck(f, (base, *leaves_of(case).values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_two_runs_are_equal_bit_for_bit(dtype, dropout_p) -> None:
    case = make_case((4, 90), 64, 48, 16, dtype=dtype, dropout_p=dropout_p, seed=11)
    first, second = run(case, alora_linear), run(case, alora_linear)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_gradients_are_zero_and_not_none_when_nothing_is_active() -> None:
    case = make_case(fraction=0.0)
    leaves = leaves_of(case)
    apply(case, leaves).backward(case.dy)
    for name in ("lora_a", "lora_b", "lora_bias"):
        assert leaves[name].grad is not None and (leaves[name].grad == 0).all()
    assert torch.equal(leaves["x"].grad, (case.dy @ case.weight))


# Wanted gradients, and the matrix products they need: dx base, dya, dB, dA, dx's adapter part.
NEEDS = [
    (("x", "lora_a", "lora_b"), 5),
    (("lora_a", "lora_b"), 3),
    (("lora_a",), 2),
    (("lora_b",), 1),
    (("x",), 3),
    (("lora_bias",), 0),
]


@pytest.mark.parametrize(("wanted", "products"), NEEDS, ids=str)
def test_no_wasted_product(wanted, products) -> None:
    case = make_case((12,), fraction=1.0)
    leaves = {n: t.requires_grad_(n in wanted) for n, t in leaves_of(case).items()}
    with CountProducts() as forward:
        y = apply(case, leaves)
    assert forward.total == 3, forward.ops
    with CountProducts() as backward:
        y.backward(case.dy)
    assert backward.total == products, backward.ops
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)


def test_inactive_batch_costs_the_base_alone() -> None:
    case = make_case((12,), fraction=0.0)
    leaves = leaves_of(case)
    with CountProducts() as count:
        apply(case, leaves).backward(case.dy)
    assert count.total == 2, count.ops


def test_prefix_grad_false_multiplies_active_rows_alone() -> None:
    case = make_case((64,), strided=False)
    case.mask = torch.arange(64) >= 60
    leaves = leaves_of(case)
    y = apply(case, leaves, prefix_grad=False)
    rows = []

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name.split("::")[1] in PRODUCTS:
                rows.extend(max(a.shape) for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with Rows():
        y.backward(case.dy)
    assert 64 not in rows


def test_no_grad_saves_nothing() -> None:
    case = make_case()
    with torch.no_grad():
        y = apply(case, leaves_of(case))
    assert y.grad_fn is None and not y.requires_grad


def test_retain_graph() -> None:
    case = make_case()
    leaves = leaves_of(case)
    y = apply(case, leaves)
    first = torch.autograd.grad(y, list(leaves.values()), case.dy, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), case.dy)
    for a, b in zip(first, second):
        assert torch.equal(a, b)


def test_a_saved_tensor_changed_in_place_is_noticed() -> None:
    case = make_case()
    leaves = leaves_of(case)
    x = leaves["x"].clone()
    y = apply(case, {**leaves, "x": x})
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(case.dy)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_replays_dropout(use_reentrant) -> None:
    layer = AloraLinear(24, 20, r=4, lora_alpha=8, lora_dropout=0.5)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 10, 24, requires_grad=True)
    activation = Activation.from_starts([2, None, 7], 10)
    grads = []
    for wrap in (False, True):
        torch.manual_seed(3)
        if wrap:
            y = checkpoint(layer, x, activation, use_reentrant=use_reentrant)
        else:
            y = layer(x, activation)
        grads.append(
            torch.autograd.grad(y.square().sum(), [x, layer.lora_A, layer.lora_B])
            if not (wrap and use_reentrant)
            else _backward(y, x, layer)
        )
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def _backward(y, x, layer):
    """Reentrant checkpointing works with .backward() alone."""
    y.square().sum().backward()
    return x.grad, layer.lora_A.grad, layer.lora_B.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["compute", "fp32"])
def test_autocast_computes_as_linears_composed_by_hand(dtype, precision) -> None:
    case = make_case((2, 30), 32, 24, 4)
    leaves = leaves_of(case)
    with torch.autocast("cpu", dtype):
        y = apply(case, leaves, adapter_precision=precision)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy.to(dtype))
    assert [g.dtype for g in grads] == [torch.float32] * 4
    rounded = make_case((2, 30), 32, 24, 4, dtype=dtype)
    for name in ("x", "weight", "bias", "lora_a", "lora_b", "lora_bias", "dy"):
        setattr(rounded, name, getattr(case, name).to(dtype))
    rounded.mask = case.mask
    got = {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads)}}
    assert_within_bound(got, rounded)


def test_backward_under_autocast_is_the_same() -> None:
    case = make_case(strided=False)
    plain = run(case, alora_linear)
    leaves = leaves_of(case)
    y = apply(case, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(y, list(leaves.values()), case.dy)
    for name, grad in zip(leaves, grads):
        assert torch.equal(grad, plain[f"d{name}"])


def test_deterministic_algorithms_change_nothing() -> None:
    case = make_case((80,), fraction=0.5)
    plain = run(case, alora_linear)
    torch.use_deterministic_algorithms(True)
    try:
        strict = run(case, alora_linear)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in plain.items():
        assert torch.equal(value, strict[name])
