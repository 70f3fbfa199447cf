"""Compares each variant's result with the reference. Only a variant that passes is timed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from alora_kernels import alora_linear_reference
from alora_kernels.selftest.accuracy import excess
from bench.layer.cases import Case, Tensors
from bench.layer.variants import BaseLinear, Outputs, Step, Variant


class WrongResult(Exception):
    """A variant's error is larger than rounding explains."""


class Checker:
    """Compares the variants of one case with the reference in float64.

    The bound is a multiple of the error that the reference itself has when PyTorch runs it in the
    case's dtype: twice for the root mean square of a tensor, eight times for its worst element. The
    truth is computed once for each arithmetic of the adapter, and is used for every variant.
    """

    def __init__(self, case: Case, tensors: Tensors) -> None:
        self._case = case
        self._tensors = tensors
        self._known: dict[object, tuple[Outputs, Outputs]] = {}

    def check(self, variant: Variant, case: Case) -> None:
        """Raise WrongResult unless every output and gradient of `variant` is right.

        `case` is the checker's case, or its forward alone. A variant that drops by torch's
        generator is checked without dropout, since nobody can know its mask in advance.
        """
        if variant.own_dropout:
            case = case.but(dropout_p=0.0)
        got = grad_mode(case, variant.build(case, self._tensors))
        truth, own = self._references(variant, case)
        for name in got:
            compare(f"{variant.name}, {describe(case)}", name, got[name], truth[name], own[name])

    def _references(self, variant: Variant, case: Case) -> tuple[Outputs, Outputs]:
        """The truth in float64, and PyTorch's own result in the case's dtype."""
        precision = variant.adapter_precision(case)
        case = case.but(backward=case.backward or self._case.backward)
        key = (variant.adapted, precision, case.dropout_p)
        if key not in self._known:
            exact = double(case, self._tensors, precision)
            self._known[key] = (
                reference(case, exact, variant.adapted, "compute"),
                reference(case, self._tensors, variant.adapted, precision),
            )
        return self._known[key]


def describe(case: Case) -> str:
    """One case in words, for messages."""
    rows = case.rows
    return (
        f"{case.model} {case.layer} {case.in_features}→{case.out_features}, "
        f"{rows.batch}×{rows.seq_len} rows, {rows.num_active} active, R={case.rank}, "
        f"{case.dtype_name}, {case.pass_name}"
    )


def grad_mode(case: Case, step: Step) -> Outputs:
    """Run a step once, in the grad mode in which it will be timed."""
    with torch.set_grad_enabled(case.backward):
        return {name: tensor.detach() for name, tensor in step().items()}


def double(case: Case, tensors: Tensors, precision: str) -> Tensors:
    """The operands in float64. The adapter is first rounded as the arithmetic requires."""
    rounded = case.dtype if precision == "compute" else case.adapter_dtype
    return Tensors(
        x=tensors.x.double(),
        weight=tensors.weight.double(),
        lora_a=tensors.lora_a.to(rounded).double(),
        lora_b=tensors.lora_b.to(rounded).double(),
        dy=tensors.dy.double(),
        seed=tensors.seed,
    )


def reference(case: Case, tensors: Tensors, adapted: bool, precision: str) -> Outputs:
    """The outputs and gradients by the definition."""
    leaves = {"x": tensors.x, "lora_a": tensors.lora_a, "lora_b": tensors.lora_b}
    leaves = {name: t.detach().requires_grad_(case.backward) for name, t in leaves.items()}
    active = case.rows.activation.mask
    with torch.set_grad_enabled(case.backward):
        y = alora_linear_reference(
            leaves["x"],
            tensors.weight,
            None,
            leaves["lora_a"],
            leaves["lora_b"],
            active if adapted else torch.zeros_like(active),
            case.scaling,
            dropout_p=case.dropout_p if adapted else 0.0,
            seed=tensors.seed,
            prefix_grad=case.prefix_grad or not adapted,
            adapter_precision=precision,
        )
        if not case.backward:
            return {"y": y}
        gradients = torch.autograd.grad(y, list(leaves.values()), tensors.dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients))}


def compare(where: str, name: str, got: Tensor, truth: Tensor, own: Tensor) -> None:
    """Raise WrongResult if `got` is too far from `truth`. `own` is PyTorch's own result."""
    what = "y" if name == "y" else f"the gradient of {name}"
    wrong = excess(got, truth, own)
    if wrong is not None:
        raise WrongResult(f"{where}: {what} is wrong: {wrong}. It was not timed")


def check_all(
    variants: Iterable[Variant], cases: Iterable[Case], tensors: Tensors
) -> dict[str, str]:
    """Check every variant in every case. Returns the reason for each wrong one, by name."""
    cases = list(cases)
    checker = Checker(max(cases, key=lambda case: case.backward), tensors)
    wrong = {}
    for variant in variants:
        try:
            for case in cases:
                checker.check(variant, case)
        except WrongResult as error:
            if isinstance(variant, BaseLinear):
                raise  # no ratio means anything without it
            wrong[variant.name] = str(error)
    return wrong
