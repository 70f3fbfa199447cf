"""Makes scalings floats for the kernels; multiplies unknown values into lora_b instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental import symbolic_shapes

from .autograd import in_transform
from .checks import finite
from .contract import Projection


def split_scalings(
    name: str,
    scalings: Sequence[float | Tensor],
    projections: list[Projection],
    traced: bool,
) -> tuple[tuple[float, ...], list[Projection]]:
    """The scalings as floats, and the projections to use with them.

    Sometimes the host cannot read a scaling: it is a tensor on a GPU, a tensor that is traced or
    differentiated, or a symbolic number of a compiler. Such a scaling is multiplied into lora_b and
    lora_bias, and its float is 1. So nothing waits for a device, and a new value causes no
    recompilation.

    Raises:
        ValueError: a number is not finite, or a tensor has more than one element.
    """
    if not traced and {s.__class__ for s in scalings} == {float}:
        return tuple([finite(name, s) for s in scalings]), projections  # type: ignore[arg-type]
    numbers, used = [], []
    for scaling, p in zip(scalings, projections):
        if isinstance(scaling, Tensor):
            if scaling.numel() != 1:
                raise ValueError(
                    f"{name}: a scaling that is a tensor must have one element, got shape "
                    f"{tuple(scaling.shape)}"
                )
            known = not traced and scaling.device.type == "cpu" and _is_constant(scaling)
        else:
            known = not traced or _is_static(scaling)
        numbers.append(finite(name, float(scaling)) if known else 1.0)
        used.append(p if known else _scaled(p, scaling))
    return tuple(numbers), used


def _is_constant(scaling: Tensor) -> bool:
    """Whether a scaling on the CPU may be replaced by its value: nothing differentiates it."""
    return not (scaling.requires_grad or in_transform())


def _is_static(scaling: float) -> bool:
    """Whether a compiler treats `scaling` as a constant of its graph."""
    static = getattr(symbolic_shapes, "has_static_value", None)  # torch 2.6 lacks it
    return static is None or static(scaling)


def _scaled(p: Projection, scaling: float | Tensor) -> Projection:
    """`p` with `scaling` multiplied into lora_b and lora_bias, in float32 or wider.

    Kernels then round the product once, as they round a plain lora_b.
    """
    dtype = torch.promote_types(p.lora_b.dtype, torch.float32)
    factor = scaling
    if isinstance(scaling, Tensor):
        factor = scaling.reshape(()).to(p.lora_b.device, dtype)
    bias = None if p.lora_bias is None else p.lora_bias.to(dtype) * factor
    return p._replace(lora_a=p.lora_a.to(dtype), lora_b=p.lora_b.to(dtype) * factor, lora_bias=bias)
