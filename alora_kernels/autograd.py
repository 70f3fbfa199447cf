"""AloraFunction: the autograd function of eager calls, from checked tensors to a backend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends.reference import gradients
from .contract import Call, Gradients, Needs, Projection
from .run import run_backward, run_forward


def in_transform() -> bool:
    """Whether torch.func, forward-mode AD or torch.jit.trace is active.

    They need a computation in PyTorch's own operations.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def beyond_backends(dys: Sequence[Tensor]) -> bool:
    """Whether a backward pass must consist of PyTorch's own operations.

    So it must if it is itself differentiated (`create_graph`), or if it computes several gradients
    at once (`is_grads_batched`, a transform of torch.func).
    """
    if torch.is_grad_enabled() or in_transform():
        return True
    return any(torch._C._functorch.is_legacy_batchedtensor(dy) for dy in dys)


def shaped(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`y` with `shape`, in the same memory, and not as a view.

    Autograd refuses in-place changes of a view that a custom function returned.
    """
    if y.shape != shape and y.is_contiguous() and not y._is_view():
        return y.resize_(shape)  # the number of elements stays
    return torch.ops.aten._unsafe_view.default(y, shape) if y._is_view() or y.shape != shape else y


class AloraFunction(torch.autograd.Function):
    """`AloraFunction.apply(call, inplace, x, base_outs…, weights…, biases…, lora_a…, lora_b…,
    lora_bias…)`, each group as long as `call.scalings`; returns a tuple of outputs.

    Differentiable any number of times in x, base_outs, lora_a, lora_b and lora_bias; weights and
    biases are frozen. The backend computes first derivatives. Higher ones come from the reference,
    in PyTorch's own operations. `base_outs` are None if the base is computed here.

    Call the functions in `functional` instead: they check the arguments, this class does not.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, call: Call, inplace: bool, x: Tensor, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = len(call.scalings)
        base_outs = flat[:count]
        projections = projections_of(flat[count:], count)
        given = None
        if base_outs[0] is not None:
            given = [
                b if inplace else b.clone(memory_format=torch.contiguous_format)
                for b in base_outs
                if b is not None
            ]
            if inplace:
                ctx.mark_dirty(*given)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        flat_given = None if given is None else [as_rows(b) for b in given]
        ys, xa, ran = run_forward(call, rows, projections, flat_given, save=True)
        activation = call.activation
        ctx.save_for_backward(
            x,
            xa,
            call.seed,
            activation.row_adapter,
            activation.active_rows,
            activation.active_count,
            *flat[count:],
        )
        ctx.call = call if call.seed is None else call._replace(seed=None)
        ctx.backend = ran
        ctx.set_materialize_grads(False)
        ctx.shapes = [(*x.shape[:-1], y.shape[-1]) for y in ys]
        if given is not None:
            return tuple(given)
        return tuple([shaped(y, shape) for y, shape in zip(ys, ctx.shapes)])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        x, xa, seed, _, _, _, *flat = ctx.saved_tensors
        call = ctx.call if seed is None else ctx.call._replace(seed=seed)
        count = len(call.scalings)
        projections = projections_of(flat, count)
        wanted = ctx.needs_input_grad
        base_grads = dys if projections[0].weight is None else (None,) * count
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        dy_rows = [
            x.new_zeros(rows.shape[0], shape[-1])
            if dy is None
            else dy
            if dy.dim() == 2
            else dy.reshape(-1, dy.shape[-1])
            for dy, shape in zip(dys, ctx.shapes)
        ]
        a, b, bias, end = [3 + i * count for i in (3, 4, 5, 6)]
        needs = Needs(wanted[2], wanted[a:b], wanted[b:bias], wanted[bias:end])
        if not (needs.x or any(wanted[a:end])):
            grads = Gradients(None, [None] * count, [None] * count, [None] * count)
        elif beyond_backends(dy_rows):
            grads = gradients(
                call, rows, projections, dy_rows, needs, create_graph=torch.is_grad_enabled()
            )
        else:
            grads = run_backward(call, rows, projections, xa, ctx.backend, dy_rows, needs)
        dx = grads.x
        if dx is not None and rows is not x:
            dx = dx.reshape(x.shape)
        frozen = (None,) * (2 * count)
        return (
            None, None, dx, *base_grads, *frozen, *grads.lora_a, *grads.lora_b, *grads.lora_bias,
        )  # fmt: skip


def projections_of(flat: Iterable[Tensor | None], count: int) -> list[Projection]:
    """The projections in a flat list `weights…, biases…, lora_a…, lora_b…, lora_bias…`."""
    flat = list(flat)
    if count == 1:
        return [Projection(*flat)]  # type: ignore[arg-type]
    columns = [flat[i * count : (i + 1) * count] for i in range(5)]
    return [Projection(*fields) for fields in zip(*columns)]  # type: ignore[arg-type]


def flat_of(
    projections: Sequence[Projection], base_outs: Sequence[Tensor] | None
) -> list[Tensor | None]:
    """The flat list of tensors that `AloraFunction.apply` takes after x."""
    flat: list[Tensor | None] = [None] * len(projections) if base_outs is None else list(base_outs)
    if len(projections) == 1:
        return [*flat, *projections[0]]
    for column in zip(*projections):
        flat.extend(column)
    return flat


def as_rows(base_out: Tensor) -> Tensor:
    """`base_out` `[..., N]` as `[M, N]` in the same memory."""
    return base_out.view(-1, base_out.shape[-1])
