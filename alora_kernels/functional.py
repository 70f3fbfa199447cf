"""The public functions. Their docstrings are the specification; `run` checks and runs a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .activation import Activation
from .autograd import AloraFunction, as_rows, flat_of, in_transform, shaped
from .backends.reference import outputs
from .checks import check_options, check_seed, check_tensors
from .contract import Call, Options, Projection
from .ops import traced_linear
from .run import entry_of, in_autocast, run_forward, run_one_row
from .scalings import split_scalings


def alora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    activation: Activation,
    scaling: float | Tensor,
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

    Differentiable in x, lora_a, lora_b and lora_bias; weight and bias are frozen. Gradients are
    deterministic. If no row is active, they are zero, not None. For second derivatives,
    `torch.func` and forward-mode AD the reference runs, in PyTorch's own operations.

    Args:
        x: `[..., K]`, 1 to 4 dimensions, any strides; M is the product of all but the last. Any
            floating dtype; the kernels take float32, bfloat16 and float16.
        weight: `[N, K]`, x's dtype.
        bias: `[N]` or None, x's dtype.
        lora_a: `[R, K]`, x's dtype or float32.
        lora_b: `[N, R]`, lora_a's dtype.
        activation: which of the M rows are active (the mask).
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rslora; finite. A tensor of one
            element is read in every call. If it is on a GPU, the host does not wait for it.
        lora_bias: `[N]` or None, lora_a's dtype; added on active rows, times scaling.
        dropout_p: probability in [0, 1) that an element of the adapter's input is dropped.
        seed: int64 tensor of one element on x's device, or an int; by default `torch.randint` draws
            it on that device. The same seed drops the same elements in every backend.
        backend: "auto", or the name of a backend. A named backend never falls back to another.
        strategy: "auto", "delta", "tail" or "onepass".
        prefix_grad: False leaves the gradient of x zero on inactive rows and skips their work. The
            adapter's gradients stay exact if nothing before the invocation is trained.
        adapter_precision: for float32 adapters over a 16-bit x. "compute" rounds the low-rank
            operands to x's dtype, as autocast does. "fp32" computes the adapter's part in float32
            and rounds the sum once, as PEFT does; under autocast it computes in the autocast dtype,
            again as PEFT does.
        strict_inactive: inactive rows equal the base layer bit for bit, and stay finite whatever
            the adapter holds. It forces `delta`.

    Returns:
        `[..., N]` in x's dtype (under autocast: in the autocast dtype).

    Raises:
        TypeError, ValueError: an argument is not as described above. The message says what came and
            what was expected.
        RuntimeError: the named backend or strategy cannot run here. The message lists the reasons.

    Source: Greenewald et al., "Activated LoRA: Fine-tuned LLMs for Intrinsics",
    arXiv 2504.12397; PEFT's `alora_invocation_tokens`.
    """
    projection = Projection(weight, bias, lora_a, lora_b, lora_bias)
    (y,) = run(
        "alora_linear",
        x,
        [projection],
        [scaling],
        activation,
        Options(
            dropout_p=dropout_p,
            prefix_grad=prefix_grad,
            adapter_precision=adapter_precision,
            strict_inactive=strict_inactive,
            backend=backend,
            strategy=strategy,
        ),
        seed=seed,
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

    All other arguments, the errors and the source are those of `alora_linear`.

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
    return run(
        "alora_linear_group",
        x,
        fields,
        [p[4] for p in projections],
        activation,
        Options(
            dropout_p=dropout_p,
            prefix_grad=prefix_grad,
            adapter_precision=adapter_precision,
            strict_inactive=strict_inactive,
            backend=backend,
            strategy=strategy,
        ),
        seed=seed,
    )


def alora_add(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    activation: Activation,
    scaling: float | Tensor,
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

    Adds the adapter's part to the output of a base layer that is quantised or not ours.
    Differentiable in base_out, x, lora_a, lora_b and lora_bias.

    Args:
        base_out: the output of the base layer, `[..., N]`, x's leading dimensions and dtype.
        x: `[..., K]`, as in `alora_linear`.
        inplace: add into `base_out` and return it; it must then be viewable as `[M, N]`.

    All other arguments, the errors and the source are those of `alora_linear`.
    """
    projection = Projection(None, None, lora_a, lora_b, lora_bias)
    (y,) = run(
        "alora_add",
        x,
        [projection],
        [scaling],
        activation,
        Options(
            dropout_p=dropout_p,
            prefix_grad=prefix_grad,
            adapter_precision=adapter_precision,
            strict_inactive=strict_inactive,
            backend=backend,
            strategy=strategy,
        ),
        seed=seed,
        base_outs=[base_out],
        inplace=inplace,
    )
    return y


def run(
    name: str,
    x: Tensor,
    projections: list[Projection],
    scalings: Sequence[float | Tensor],
    activation: Activation,
    options: Options,
    *,
    seed: Tensor | int | None = None,
    base_outs: Sequence[Tensor] | None = None,
    inplace: bool = False,
) -> tuple[Tensor, ...]:
    """Check a call, cast for autocast, and run it. All public functions end here.

    `name` is the function's name in error messages.
    """
    traced = torch.compiler.is_compiling() or isinstance(x, FakeTensor)
    # `_is_any_autocast_enabled` is asked first because it is faster than reading x.device.type.
    autocast = (traced or torch._C._is_any_autocast_enabled()) and in_autocast(x)
    asked = options
    if autocast:
        x, projections = _autocast(x, projections, torch.get_autocast_dtype(x.device.type))
        if options.adapter_precision == "fp32":
            options = options._replace(adapter_precision="autocast")
        if base_outs is not None and not inplace:
            base_outs = [b.to(x.dtype) for b in base_outs]
    numbers, projections = split_scalings(name, scalings, projections, traced)
    transformed = in_transform()
    if not (traced or transformed or autocast or base_outs):
        ys = run_one_row(x, projections, numbers, activation, options)
        if ys is not None:
            return ys
    entry = None
    if not (traced or transformed):
        entry = entry_of(x, projections, base_outs, activation, numbers, options)
    if entry is None or not entry.checked:
        check_options(name, asked)
        check_tensors(name, x, projections, activation, base_outs)
        needs_grad = _needs_grad(x, projections, base_outs)
        if entry is not None:
            entry.checked, entry.needs_grad = True, needs_grad
    else:
        needs_grad = entry.needs_grad
    drawn = None if options.dropout_p == 0.0 else _seed(name, seed, x)
    call = Call(activation, numbers, options, drawn, entry)
    if traced or transformed:
        if transformed:
            with torch.autocast(x.device.type, enabled=False):
                ys = tuple(outputs(call, x, projections, base_outs))
        else:
            ys = traced_linear(call, x, flat_of(projections, base_outs), needs_grad)
        if inplace and base_outs is not None:
            return tuple([base_out.copy_(y) for base_out, y in zip(base_outs, ys)])
        return ys
    if autocast:
        with torch.autocast(x.device.type, enabled=False):
            return _eager(call, x, projections, base_outs, inplace, needs_grad)
    return _eager(call, x, projections, base_outs, inplace, needs_grad)


def _seed(name: str, seed: Tensor | int | None, x: Tensor) -> Tensor:
    """The seed as a tensor on x's device; drawn on that device if None is given."""
    if isinstance(seed, Tensor):
        check_seed(name, seed, x)
        return seed
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    return torch.tensor([seed], dtype=torch.int64, device=x.device)


def _needs_grad(
    x: Tensor, projections: list[Projection], base_outs: Sequence[Tensor] | None
) -> bool:
    tensors = (x, *(base_outs or ()), *[t for p in projections for t in p])
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _eager(
    call: Call,
    x: Tensor,
    projections: list[Projection],
    base_outs: Sequence[Tensor] | None,
    inplace: bool,
    needs_grad: bool,
) -> tuple[Tensor, ...]:
    if needs_grad:
        return AloraFunction.apply(call, inplace, x, *flat_of(projections, base_outs))
    shape = x.shape
    rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    if base_outs is None:
        ys, _, _ = run_forward(call, rows, projections, None, save=False)
        if ys[0].dim() == len(shape):
            return tuple(ys)
        lead = shape[:-1]
        return tuple([shaped(y, (*lead, y.shape[-1])) for y in ys])
    if not inplace:
        base_outs = [b.clone(memory_format=torch.contiguous_format) for b in base_outs]
    run_forward(call, rows, projections, [as_rows(b) for b in base_outs], save=False)
    return tuple(base_outs)


def _autocast(
    x: Tensor, projections: list[Projection], dtype: torch.dtype
) -> tuple[Tensor, list[Projection]]:
    """x and the frozen weights in the autocast dtype. The kernels round the adapters themselves.

    Weights are cast anew in every call, as autocast casts frozen weights too, because a weight can
    change in ways that leave no trace on the tensor. float64 is not cast; autocast does not cast it
    either.
    """
    if x.dtype == torch.float64:
        return x, projections
    return x.to(dtype), [
        Projection(
            None if p.weight is None else p.weight.to(dtype),
            None if p.bias is None else p.bias.to(dtype),
            *p[2:],
        )
        if p.weight is None or not p.weight.requires_grad
        else p
        for p in projections
    ]
