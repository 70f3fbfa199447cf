"""The public functions: the specification as docstrings, and all validation a user can meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .activation import Activation
from .autograd import AloraFunction, as_rows, run_forward
from .backends import STRATEGIES, Call, Projection
from .casting import cast_frozen
from .dispatch import BACKENDS
from .ops import traced_linear

PRECISIONS = ("compute", "fp32")
MAX_DIM = 4


def alora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    activation: Activation,
    scaling: float,
    *,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str = "auto",
    strategy: str = "auto",
    prefix_grad: bool = True,
    adapter_precision: str = "compute",
    strict_inactive: bool = False,
) -> Tensor:
    """y = x Wᵀ + b + scaling · mask ⊙ ((dropout(x) Aᵀ) Bᵀ + lora_bias).

    Differentiable once, in x, lora_a, lora_b and lora_bias; weight and bias are frozen. Gradients
    are deterministic, and zero (not None) when no row is active.

    Args:
        x: `[..., K]`, 1 to 4 dimensions, any strides; M is the product of all but the last. Any
            floating dtype; the kernels take float32, bfloat16 and float16.
        weight: `[N, K]`, x's dtype.
        bias: `[N]` or None, x's dtype.
        lora_a: `[R, K]`, x's dtype or float32.
        lora_b: `[N, R]`, lora_a's dtype.
        activation: which of the M rows are active (the mask).
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rslora; finite.
        lora_bias: `[N]` or None, lora_a's dtype; added on active rows, times scaling.
        dropout_p: probability in [0, 1) that an element of the adapter's input is dropped.
        seed: int64 tensor of one element on x's device, or an int; by default drawn there by
            `torch.randint`. The same seed drops the same elements in every backend.
        backend: "auto", or the name of a backend, which then never falls back.
        strategy: "auto", "delta", "tail" or "onepass".
        prefix_grad: False leaves the gradient of x zero on inactive rows and skips their work;
            exact for the adapter whenever nothing before the invocation is trained.
        adapter_precision: for float32 adapters over a 16-bit x. "compute" rounds the low-rank
            operands to x's dtype, as autocast does; "fp32" computes the adapter's part in float32
            and rounds the sum once, as PEFT does. Under autocast both are "compute".
        strict_inactive: inactive rows equal the base layer bit for bit and stay finite whatever
            the adapter holds (picks `delta`).

    Returns:
        `[..., N]` in x's dtype (under autocast: in the autocast dtype).

    Raises:
        TypeError, ValueError: an argument is not as above; says what came and what was expected.
        RuntimeError: the backend or strategy asked for cannot run here; lists the reasons.

    Source: Greenewald et al., "Activated LoRA: Fine-tuned LLMs for Intrinsics",
    arXiv 2504.12397; PEFT's `alora_invocation_tokens`.
    """
    projection = Projection(weight, bias, lora_a, lora_b, lora_bias)
    (y,) = _apply(
        "alora_linear",
        x,
        [projection],
        [scaling],
        activation,
        None,
        False,
        dropout_p=dropout_p,
        seed=seed,
        backend=backend,
        strategy=strategy,
        prefix_grad=prefix_grad,
        adapter_precision=adapter_precision,
        strict_inactive=strict_inactive,
    )
    return y


def alora_linear_group(
    x: Tensor,
    projections: Sequence[tuple[Any, ...]],
    activation: Activation,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str = "auto",
    strategy: str = "auto",
    prefix_grad: bool = True,
    adapter_precision: str = "compute",
    strict_inactive: bool = False,
) -> tuple[Tensor, ...]:
    """Several masked-LoRA linears of one x (q, k and v; gate and up) in one pass.

    Args:
        x: `[..., K]`, as in `alora_linear`.
        projections: for each layer `(weight, bias, lora_a, lora_b, scaling)` or
            `(weight, bias, lora_a, lora_b, scaling, lora_bias)`. Each has its own N and R. With
            dropout all layers drop the same elements of x.
        activation: shared by all layers.

    The other arguments, errors and the source are those of `alora_linear`.

    Returns:
        One `[..., N]` for each projection.
    """
    fields = []
    for i, p in enumerate(projections):
        if len(p) not in (5, 6):
            raise ValueError(
                f"alora_linear_group: projection {i} has {len(p)} items, expected "
                "(weight, bias, lora_a, lora_b, scaling) or with lora_bias as a sixth"
            )
        weight, bias, lora_a, lora_b, _, *rest = p
        fields.append(Projection(weight, bias, lora_a, lora_b, rest[0] if rest else None))
    if not fields:
        raise ValueError("alora_linear_group: projections is empty, expected at least one")
    return _apply(
        "alora_linear_group",
        x,
        fields,
        [p[4] for p in projections],
        activation,
        None,
        False,
        dropout_p=dropout_p,
        seed=seed,
        backend=backend,
        strategy=strategy,
        prefix_grad=prefix_grad,
        adapter_precision=adapter_precision,
        strict_inactive=strict_inactive,
    )


def alora_add(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    activation: Activation,
    scaling: float,
    *,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str = "auto",
    strategy: str = "auto",
    prefix_grad: bool = True,
    adapter_precision: str = "compute",
    strict_inactive: bool = False,
    inplace: bool = False,
) -> Tensor:
    """y = base_out + scaling · mask ⊙ ((dropout(x) Aᵀ) Bᵀ + lora_bias).

    The adapter's part alone, for a base layer that is quantised or not ours: the base has computed
    `base_out` already. Differentiable in base_out, x, lora_a, lora_b and lora_bias.

    Args:
        base_out: `[..., N]`, x's leading dimensions and dtype.
        x: `[..., K]`, as in `alora_linear`.
        inplace: add into `base_out` and return it; it must then be viewable as `[M, N]`.

    The other arguments, errors and the source are those of `alora_linear`.
    """
    projection = Projection(None, None, lora_a, lora_b, lora_bias)
    (y,) = _apply(
        "alora_add",
        x,
        [projection],
        [scaling],
        activation,
        base_out,
        inplace,
        dropout_p=dropout_p,
        seed=seed,
        backend=backend,
        strategy=strategy,
        prefix_grad=prefix_grad,
        adapter_precision=adapter_precision,
        strict_inactive=strict_inactive,
    )
    return y


def _apply(
    name: str,
    x: Tensor,
    projections: list[Projection],
    scalings: list[float],
    activation: Activation,
    base_out: Tensor | None,
    inplace: bool,
    *,
    dropout_p: float,
    seed: Tensor | int | None,
    backend: str,
    strategy: str,
    prefix_grad: bool,
    adapter_precision: str,
    strict_inactive: bool,
) -> tuple[Tensor, ...]:
    """Check, cast for autocast, and run."""
    device_type = x.device.type
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    if autocast:
        x, projections = _autocast(x, projections, torch.get_autocast_dtype(device_type))
        adapter_precision = "compute" if adapter_precision == "fp32" else adapter_precision
        if base_out is not None and not inplace:
            base_out = base_out.to(x.dtype)
    grad = torch.is_grad_enabled()
    _check_options(name, scalings, dropout_p, seed, backend, strategy, adapter_precision, x)
    _check_tensors(name, x, projections, activation, base_out, grad)
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    elif not isinstance(seed, Tensor):
        seed = torch.tensor([seed], dtype=torch.int64, device=x.device)
    call = Call(
        activation,
        tuple([float(s) for s in scalings]),
        dropout_p,
        seed,
        prefix_grad,
        adapter_precision,
        strict_inactive,
        backend,
        strategy,
    )
    flat = [base_out] * len(projections)
    for column in zip(*projections):
        flat.extend(column)
    needs_grad = grad and (x.requires_grad or any(t is not None and t.requires_grad for t in flat))
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        ys = traced_linear(call, x, flat, needs_grad)
        if inplace and base_out is not None:
            return (base_out.copy_(ys[0]),)
        return ys
    if autocast:
        with torch.autocast(device_type, enabled=False):
            return _eager(call, x, projections, flat, base_out, inplace, needs_grad)
    return _eager(call, x, projections, flat, base_out, inplace, needs_grad)


def _eager(
    call: Call,
    x: Tensor,
    projections: list[Projection],
    flat: list[Tensor | None],
    base_out: Tensor | None,
    inplace: bool,
    needs_grad: bool,
) -> tuple[Tensor, ...]:
    if needs_grad:
        return AloraFunction.apply(call, inplace, x, *flat)
    rows = x.reshape(-1, x.shape[-1])
    if base_out is None:
        ys, _ = run_forward(call, rows, projections, None, save=False)
        return tuple([y.view(*x.shape[:-1], y.shape[-1]) for y in ys])
    y = base_out if inplace else base_out.clone(memory_format=torch.contiguous_format)
    run_forward(call, rows, projections, [as_rows(y)], save=False)
    return (y,)


def _autocast(
    x: Tensor, projections: list[Projection], dtype: torch.dtype
) -> tuple[Tensor, list[Projection]]:
    """x and the frozen weights in the autocast dtype; adapters are rounded by the kernels.

    float64 is left alone, as autocast leaves it.
    """
    if x.dtype == torch.float64:
        return x, projections
    return x.to(dtype), [
        Projection(
            None if p.weight is None else cast_frozen(p.weight, dtype),
            None if p.bias is None else cast_frozen(p.bias, dtype),
            *p[2:],
        )
        if p.weight is None or not p.weight.requires_grad
        else p
        for p in projections
    ]


def _check_options(
    name: str,
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | int | None,
    backend: str,
    strategy: str,
    adapter_precision: str,
    x: Tensor,
) -> None:
    for scaling in scalings:
        if not math.isfinite(scaling):
            raise ValueError(f"{name}: scaling must be finite, got {scaling}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name}: dropout_p must be in [0, 1), got {dropout_p}")
    if isinstance(seed, Tensor) and (
        seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device
    ):
        raise ValueError(
            f"{name}: seed must be an int64 tensor of one element on {x.device}, got "
            f"{seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
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


def check_call(x: Tensor, projections: list[Projection], activation: Activation) -> None:
    """Raise what `alora_linear_group` would for these tensors."""
    grad = torch.is_grad_enabled()
    _check_tensors("alora_linear_group", x, projections, activation, None, grad)


def _check_tensors(
    name: str,
    x: Tensor,
    projections: list[Projection],
    activation: Activation,
    base_out: Tensor | None,
    grad: bool,
) -> None:
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
    if base_out is not None:
        _check(
            name, "base_out", base_out, (*x.shape[:-1], projections[0].lora_b.shape[0]), x, (dtype,)
        )
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
        if base_out is None:
            if weight is None or weight.dim() != 2:
                got = None if weight is None else tuple(weight.shape)
                raise ValueError(f"{name}: weight must have shape [N, K], got {got}")
            _check_plain(name, weight)
            _check(name, "weight", weight, (width, depth), x, (dtype,))
            if bias is not None:
                _check(name, "bias", bias, (width,), x, (dtype,))
            if grad and (weight.requires_grad or (bias is not None and bias.requires_grad)):
                which = "weight" if weight.requires_grad else "bias"
                raise ValueError(
                    f"{name}: {which}.requires_grad is True, but the base layer is frozen and "
                    f"would silently get no gradient; call {which}.requires_grad_(False)"
                )


def _check_plain(name: str, weight: Tensor) -> None:
    """Refuse a DTensor or a quantised subclass, which F.linear alone can multiply."""
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
