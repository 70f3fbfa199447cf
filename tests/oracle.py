"""The oracle: the reference in float64, and the bound that every backend is held to.

The bound is twice the error (in the Frobenius norm) that the reference, run by PyTorch in the same
dtype, makes against float64. An error is a random number, and one of few elements scatters widely:
PyTorch's is therefore the largest of several draws of the same problem, of more where a result has
few elements, and such a result may always err by two ulp of the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from alora_kernels import Activation, alora_linear_reference


@dataclass
class Case:
    """One problem: its tensors, in the dtypes that a user would hand over."""

    x: Tensor  # [..., K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    lora_bias: Tensor | None
    dy: Tensor  # [..., N]
    mask: Tensor  # bool [M]
    scaling: float = 1.5
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def activation(self) -> Activation:
        return Activation.from_mask(self.mask)

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "lora_a": self.lora_a, "lora_b": self.lora_b}
        return named if self.lora_bias is None else {**named, "lora_bias": self.lora_bias}

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})


def make_case(
    lead: tuple[int, ...] = (2, 19),
    depth: int = 33,
    width: int = 21,
    rank: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    fraction: float = 0.4,
    bias: bool = True,
    lora_bias: bool = True,
    strided: bool = True,
    **options: Any,
) -> Case:
    """Random tensors; with `strided` no operand is contiguous or starts at its storage's start."""
    adapter_dtype = adapter_dtype or dtype

    def draw(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        if not strided or not shape:
            return (torch.randn(shape) * scale).to(kind)
        wide = torch.full((*shape[:-1], 2 * shape[-1] + 1), torch.nan)
        wide[..., 1::2] = torch.randn(shape) * scale
        return wide.to(kind)[..., 1::2]

    rows = int(torch.Size(lead).numel())
    return Case(
        draw(*lead, depth),
        draw(width, depth, scale=depth**-0.5),
        draw(width) if bias else None,
        draw(rank, depth, scale=depth**-0.5, kind=adapter_dtype),
        draw(width, rank, scale=rank**-0.5, kind=adapter_dtype),
        draw(width, kind=adapter_dtype) if lora_bias else None,
        draw(*lead, width),
        torch.rand(rows) < fraction,
        options=options,
    )


DRAWS = 12  # of one problem, to measure PyTorch's error
ELEMENTS = 32  # of a result in all its draws together, at least

Change = Callable[[Tensor], Tensor]


class Redraw:
    """Other values of the same size for every tensor it is given, the same ones each time."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.known:
            factor = torch.rand(tensor.shape, device=tensor.device) + 0.5
            self.known[id(tensor)] = tensor, (tensor * factor).to(tensor.dtype)
        return self.known[id(tensor)][1]


def errors_of_pytorch(
    expected: Callable[[torch.dtype, Change], Sequence[Tensor | None]], dtype: torch.dtype
) -> list[float]:
    """PyTorch's error in `dtype` in each of the results of `expected(dtype, change)`."""
    worst: list[float] = []
    draw, draws = 0, DRAWS
    while draw < draws:
        change: Change = Redraw() if draw else lambda tensor: tensor
        exact = expected(torch.float64, change)
        sizes = [e.numel() for e in exact if e is not None and e.numel()]
        draws = max(DRAWS, -(-ELEMENTS // min(sizes, default=ELEMENTS)))
        draw += 1
        pairs = zip(exact, expected(dtype, change))
        errors = [0.0 if e is None else (t.double() - e).norm().item() for e, t in pairs]
        worst = [max(pair) for pair in zip(worst, errors)] if worst else errors
    return worst


def assert_error(name: str, value: Tensor, exact: Tensor, own: float, dtype: torch.dtype) -> None:
    """`value` is within the bound of `exact`, PyTorch's own error being `own`."""
    assert value.shape == exact.shape, name
    if not value.numel():
        return
    assert not value.isnan().any(), f"{name} has NaN"
    error = (value.double() - exact).norm().item()
    bound = max(2 * own, 2 * torch.finfo(dtype).eps * exact.abs().max().item())
    assert error <= bound, (
        f"{name}: error {error:.3g}, PyTorch's own {own:.3g}, allowed {bound:.3g}"
    )


def reference(
    case: Case, dtype: torch.dtype, change: Change = lambda tensor: tensor
) -> dict[str, Tensor]:
    """y and all gradients of the reference with every tensor in `dtype`.

    With 16-bit rounding of the adapters where the kernels round them, so that in float64 the
    result is the exact one for the operands that the kernels see.
    """
    options = dict(case.options)
    for name in ("backend", "strategy", "strict_inactive"):
        options.pop(name, None)
    compute = options.get("adapter_precision", "compute") == "compute"

    def leaf(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        rounded = change(t).to(case.x.dtype) if compute else change(t)
        return rounded.to(dtype).detach().requires_grad_()

    x = change(case.x).to(dtype).detach().requires_grad_()
    a, b, c = leaf(case.lora_a), leaf(case.lora_b), leaf(case.lora_bias)
    assert a is not None and b is not None
    y = alora_linear_reference(
        x,
        change(case.weight).to(dtype),
        None if case.bias is None else change(case.bias).to(dtype),
        a,
        b,
        case.mask,
        case.scaling,
        lora_bias=c,
        **options,
    )
    leaves = {"x": x, "lora_a": a, "lora_b": b}
    if c is not None:
        leaves["lora_bias"] = c
    grads = torch.autograd.grad(
        y, list(leaves.values()), change(case.dy).to(dtype), materialize_grads=True
    )
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads)}}


def assert_within_bound(got: dict[str, Tensor], case: Case) -> None:
    """Every entry of `got` is within twice PyTorch's own error of the float64 reference."""
    dtype = case.x.dtype
    exact = reference(case, torch.float64)
    owns = errors_of_pytorch(lambda d, change: list(reference(case, d, change).values()), dtype)
    # In float64 the exact result is itself rounded. Where its terms cancel, and few elements hide
    # that, an error is of the size of the terms: of the result for operands without a sign.
    terms = reference(case, dtype, torch.abs) if dtype == torch.float64 else {}
    for (name, want), own in zip(exact.items(), owns):
        if terms and want.numel():
            size = max(want.norm() + want.abs().max(), terms[name].abs().max()).item()
            own = torch.finfo(dtype).eps * size
        if name in got:
            assert_error(name, got[name], want, own, dtype)


def run(case: Case, function: Any) -> dict[str, Tensor]:
    """y and all gradients of `function(x, weight, bias, lora_a, lora_b, activation, ...)`."""
    leaves = {n: t.detach().requires_grad_() for n, t in case.leaves.items()}
    y = function(
        leaves["x"],
        case.weight,
        case.bias,
        leaves["lora_a"],
        leaves["lora_b"],
        case.activation,
        case.scaling,
        lora_bias=leaves.get("lora_bias"),
        **case.options,
    )
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy)
    for leaf, grad in zip(leaves.values(), grads):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads)}}
