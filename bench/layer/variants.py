"""The variants that are compared: the base linear, this package, PEFT's aLoRA layer, and by hand.

A variant builds a `Step` for a case: a function without arguments that runs the layer forward and,
for a case with backward, takes the gradients of x, lora_a and lora_b.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alora_kernels import AloraLinear, alora_linear
from bench.layer.cases import Case, Tensors

Outputs = dict[str, Tensor]  # "y" and, with backward, "x", "lora_a", "lora_b" (the gradients)
Step = Callable[[], Outputs]


class Variant:
    """One way to compute the layer."""

    name: str
    adapted = True  # False for the base linear alone
    own_dropout = False  # torch's generator draws it, so nobody knows the mask in advance

    def adapter_precision(self, case: Case) -> str:
        """The arithmetic of the adapter, as a value of the package's argument of that name."""
        return "compute"

    def build(self, case: Case, tensors: Tensors) -> Step:
        """The step of `case`. If the variant cannot run it, its own error is raised."""
        raise NotImplementedError


class BaseLinear(Variant):
    """The frozen nn.Linear. No variant can cost less."""

    name = "base linear"
    adapted = False

    def build(self, case: Case, tensors: Tensors) -> Step:
        return _step(case, tensors, _frozen_linear(tensors.weight), {})


@dataclass(frozen=True)
class Package(Variant):
    """alora_kernels.AloraLinear with one backend and one strategy."""

    backend: str = "auto"
    strategy: str = "auto"
    precision: str = "compute"

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"alora {self.backend}/{self.strategy}"

    def adapter_precision(self, case: Case) -> str:
        return self.precision

    def build(self, case: Case, tensors: Tensors) -> Step:
        activation = case.rows.activation
        adapter = _adapter(case, tensors)
        options: dict[str, Any] = {
            "backend": self.backend,
            "strategy": self.strategy,
            "adapter_precision": self.precision,
            "prefix_grad": case.prefix_grad,
        }
        if not case.dropout_p:
            layer = _alora_layer(case, tensors, adapter, options)
            return _step(case, tensors, lambda x: layer(x, activation), adapter)

        # The module draws a new seed in each call, but the check has to know the seed.
        def forward(x: Tensor) -> Tensor:
            return alora_linear(
                x,
                tensors.weight,
                None,
                adapter["lora_a"],
                adapter["lora_b"],
                activation,
                case.scaling,
                dropout_p=case.dropout_p,
                seed=tensors.seed,
                **options,
            )

        return _step(case, tensors, forward, adapter)


class PeftLayer(Variant):
    """PEFT's own aLoRA layer, built by PEFT and called as PEFT's model calls it."""

    name = "PEFT"
    own_dropout = True

    def adapter_precision(self, case: Case) -> str:
        return "compute" if case.adapter_dtype == case.dtype else "fp32"

    def build(self, case: Case, tensors: Tensors) -> Step:
        layer = _peft_layer(case, tensors)
        adapter = {
            "lora_a": layer.lora_A["default"].weight,
            "lora_b": layer.lora_B["default"].weight,
        }
        offsets = list(case.rows.offsets)
        return _step(case, tensors, lambda x: layer(x, alora_offsets=offsets), adapter)


class ByHand(Variant):
    """The delta strategy in the five lines of PyTorch that one would write."""

    name = "by hand"
    own_dropout = True

    def build(self, case: Case, tensors: Tensors) -> Step:
        weight, scaling, dropout_p = tensors.weight, case.scaling, case.dropout_p
        adapter = _adapter(case, tensors)
        lora_a, lora_b = adapter["lora_a"], adapter["lora_b"]
        activation = case.rows.activation
        # They are found once, as in this package: the search is no part of the layer.
        active = activation.active_rows[: case.rows.num_active].to(torch.int64)

        def forward(x: Tensor) -> Tensor:
            y = F.linear(x, weight)
            rows = F.dropout(x.flatten(0, 1)[active], dropout_p)
            delta = rows @ lora_a.to(x.dtype).T @ lora_b.to(x.dtype).T
            y.view(-1, y.shape[-1]).index_add_(0, active, delta, alpha=scaling)
            return y

        return _step(case, tensors, forward, adapter)


def _step(
    case: Case, tensors: Tensors, forward: Callable[[Tensor], Tensor], adapter: Mapping[str, Tensor]
) -> Step:
    """The function that is timed, around `forward`. `adapter` are the parameters with gradients."""
    if not case.backward:
        x = tensors.x
        return lambda: {"y": forward(x)}
    x = tensors.x.detach().requires_grad_()
    dy = tensors.dy
    names = ("x", *adapter)
    wanted = (x, *adapter.values())

    def run() -> Outputs:
        y = forward(x)
        return {"y": y, **dict(zip(names, torch.autograd.grad(y, wanted, dy)))}

    return run


def _adapter(case: Case, tensors: Tensors) -> dict[str, nn.Parameter]:
    """Parameters that share the memory of the case's lora_a and lora_b."""
    return {
        "lora_a": nn.Parameter(tensors.lora_a, requires_grad=case.backward),
        "lora_b": nn.Parameter(tensors.lora_b, requires_grad=case.backward),
    }


def _alora_layer(
    case: Case, tensors: Tensors, adapter: Mapping[str, nn.Parameter], options: dict[str, Any]
) -> AloraLinear:
    layer = AloraLinear.from_linear(
        _frozen_linear(tensors.weight),
        r=case.rank,
        lora_alpha=case.scaling * case.rank,
        adapter_dtype=case.adapter_dtype,
    )
    layer.lora_A, layer.lora_B = adapter["lora_a"], adapter["lora_b"]
    for name, value in options.items():
        setattr(layer, name, value)
    return layer


def _frozen_linear(weight: Tensor) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class _OneLinear(nn.Module):
    """The smallest model that PEFT can adapt."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _peft_layer(case: Case, tensors: Tensors) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that the tiny model is no language model
        config = peft.LoraConfig(
            r=case.rank,
            lora_alpha=case.scaling * case.rank,  # type: ignore[arg-type]
            lora_dropout=case.dropout_p,
            target_modules=["linear"],
            alora_invocation_tokens=[1],  # makes it an aLoRA; its offsets are passed directly
        )
        model: Any = peft.get_peft_model(_OneLinear(_frozen_linear(tensors.weight)), config)
    layer = model.base_model.model.linear
    for module, weight in ((layer.lora_A, tensors.lora_a), (layer.lora_B, tensors.lora_b)):
        parameter = module["default"].weight
        if parameter.shape != weight.shape:
            raise RuntimeError(
                f"PEFT built an adapter of shape {tuple(parameter.shape)}, "
                f"the case has {tuple(weight.shape)}"
            )
        module["default"].weight = nn.Parameter(weight, requires_grad=case.backward)
    layer.train(case.backward)
    return layer
