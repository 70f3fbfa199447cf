"""Checks the arguments of a call. Every error says what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .activation import Activation
from .contract import PRECISIONS, STRATEGIES, Options, Projection
from .dispatch import BACKENDS
from .run import MAX_DIM


def finite(name: str, scaling: float) -> float:
    """`scaling` as a float; raises ValueError if it is not finite."""
    if not math.isfinite(scaling):
        raise ValueError(f"{name}: scaling must be finite, got {scaling}")
    return float(scaling)


def check_options(name: str, options: Options) -> None:
    """Refuse options that are wrong for all tensors."""
    dropout_p, adapter_precision = options.dropout_p, options.adapter_precision
    backend, strategy = options.backend, options.strategy
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name}: dropout_p must be in [0, 1), got {dropout_p}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"{name}: unknown backend {backend!r}; the backends are auto, {', '.join(BACKENDS)}"
        )
    if strategy != "auto" and strategy not in STRATEGIES:
        raise ValueError(
            f"{name}: unknown strategy {strategy!r}; the strategies are auto, "
            f"{', '.join(STRATEGIES)}"
        )
    if adapter_precision not in PRECISIONS:
        raise ValueError(
            f"{name}: adapter_precision must be one of {', '.join(PRECISIONS)}, "
            f"got {adapter_precision!r}"
        )


def check_seed(name: str, seed: Tensor, x: Tensor) -> None:
    """Refuse a seed that kernels cannot read."""
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        raise ValueError(
            f"{name}: seed must be an int64 tensor of one element on {x.device}, got "
            f"{seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )


def check_tensors(
    name: str,
    x: Tensor,
    projections: list[Projection],
    activation: Activation,
    base_outs: Sequence[Tensor] | None,
) -> None:
    """Refuse tensors that do not fit together, or an activation that does not fit x."""
    if not isinstance(activation, Activation):
        raise TypeError(
            f"{name}: activation must be an alora_kernels.Activation, got "
            f"{type(activation).__name__}; Activation.from_mask takes a mask"
        )
    if not 1 <= x.dim() <= MAX_DIM:
        raise ValueError(f"{name}: x must have 1 to {MAX_DIM} dimensions, got {x.dim()}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must have a floating dtype, got {x.dtype}")
    depth, device, dtype = x.shape[-1], x.device, x.dtype
    if not torch.compiler.is_compiling():
        rows = x.shape[:-1].numel()
        if activation.num_rows != rows:
            raise ValueError(
                f"{name}: activation describes {activation.num_rows} rows but x has {rows}"
            )
    if activation.row_adapter.device != device:
        raise ValueError(
            f"{name}: activation is on {activation.device} but x is on {device}; "
            f"move it once per forward with activation.to({str(device)!r})"
        )
    for base_out, p in zip(base_outs or (), projections):
        _check(name, "base_out", base_out, (*x.shape[:-1], p.lora_b.shape[0]), x, (dtype,))
    for weight, bias, lora_a, lora_b, lora_bias in projections:
        if lora_a.dim() != 2 or lora_b.dim() != 2:
            raise ValueError(
                f"{name}: lora_a and lora_b must have shapes [R, K] and [N, R], got "
                f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
            )
        rank, width = lora_a.shape[0], lora_b.shape[0]
        if rank == 0:
            raise ValueError(f"{name}: lora_a has R=0; the rank must be at least 1")
        if lora_a.shape[1] != depth:
            raise ValueError(f"{name}: lora_a has K={lora_a.shape[1]} but x has K={depth}")
        if lora_b.shape[1] != rank:
            raise ValueError(f"{name}: lora_b has R={lora_b.shape[1]} but lora_a has R={rank}")
        adapter = (dtype, torch.promote_types(dtype, torch.float32))
        _check(name, "lora_a", lora_a, (rank, depth), x, adapter)
        _check(name, "lora_b", lora_b, (width, rank), x, (lora_a.dtype,))
        if lora_bias is not None:
            _check(name, "lora_bias", lora_bias, (width,), x, (lora_a.dtype,))
        if base_outs is None:
            if weight is None or weight.dim() != 2:
                got = None if weight is None else tuple(weight.shape)
                raise ValueError(f"{name}: weight must have shape [N, K], got {got}")
            _check_plain(name, weight)
            _check(name, "weight", weight, (width, depth), x, (dtype,))
            if bias is not None:
                _check(name, "bias", bias, (width,), x, (dtype,))
            if torch.is_grad_enabled() and (
                weight.requires_grad or (bias is not None and bias.requires_grad)
            ):
                which = "weight" if weight.requires_grad else "bias"
                raise ValueError(
                    f"{name}: {which}.requires_grad is True, but the base layer is frozen and "
                    f"would silently get no gradient; call {which}.requires_grad_(False)"
                )


def _check_plain(name: str, weight: Tensor) -> None:
    """Refuse a DTensor or a quantised subclass, which only F.linear can multiply."""
    kind = type(weight)
    if kind in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return
    if isinstance(weight, FakeTensor | torch.nn.Parameter):
        if type(weight.data) in (Tensor, FakeTensor):
            return
        kind = type(weight.data)
    raise TypeError(
        f"{name}: weight is a {kind.__name__}, expected a plain tensor; run the base layer's own "
        "forward and give its output to alora_add (a sharded weight is whole only inside the "
        "forward of its module)"
    )


def _check(
    name: str,
    argument: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name}: {argument} must have shape {list(shape)}, got {list(tensor.shape)}"
        )
    if tensor.dtype not in dtypes:
        allowed = " or ".join(dict.fromkeys(str(d) for d in dtypes))
        raise TypeError(
            f"{name}: {argument} must be {allowed} (x is {x.dtype}), got {tensor.dtype}"
        )
    if tensor.device != x.device:
        raise ValueError(f"{name}: {argument} is on {tensor.device} but x is on {x.device}")
