"""The oracle: the reference in float64, and the bound that every backend is held to.

The bound is twice the error (in the Frobenius norm) that the reference, run by PyTorch in the same
dtype, makes against float64. The error of a few elements is noisy, so two ulp of the largest
element are always allowed: that is nothing beside the norm of a larger result.
"""

from __future__ import annotations

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


def reference(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
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
        rounded = t.to(case.x.dtype) if compute else t
        return rounded.to(dtype).detach().requires_grad_()

    x = case.x.to(dtype).detach().requires_grad_()
    a, b, c = leaf(case.lora_a), leaf(case.lora_b), leaf(case.lora_bias)
    assert a is not None and b is not None
    y = alora_linear_reference(
        x,
        case.weight.to(dtype),
        None if case.bias is None else case.bias.to(dtype),
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
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy.to(dtype), materialize_grads=True)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads)}}


def assert_within_bound(got: dict[str, Tensor], case: Case) -> None:
    """Every entry of `got` is within twice PyTorch's own error of the float64 reference."""
    exact = reference(case, torch.float64)
    torchs = reference(case, case.x.dtype)
    for name, value in got.items():
        want = exact[name]
        assert value.shape == want.shape, name
        assert not value.isnan().any(), f"{name} has NaN"
        error = (value.double() - want).norm().item()
        own = (torchs[name].double() - want).norm().item()
        if case.x.dtype == torch.float64:  # the exact result is itself rounded
            own = torch.finfo(torch.float64).eps * want.norm().item()
        largest = want.abs().max().item() if want.numel() else 0.0
        bound = 2 * own + 2 * torch.finfo(case.x.dtype).eps * largest
        assert error <= bound, f"{name}: error {error:.3g}, PyTorch's own {own:.3g}"


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
