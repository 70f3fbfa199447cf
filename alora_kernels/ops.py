"""The torch ops that a compiler or an export traces: their schema, fakes and autograd.

Eager calls use `AloraFunction` instead: a registered op with autograd costs about 100 µs on a CPU,
an empty autograd.Function 7 µs. Both end in `run.run_forward` and `run.run_backward`. The ops take
only tensors and constants, so nothing that the host knows of an activation enters a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .activation import Activation
from .autograd import beyond_backends, projections_of, shaped
from .backends.reference import gradients
from .contract import Call, Needs, Options, Projection, saved_columns, saved_dtype
from .dispatch import choose, problem_of
from .run import run_backward, run_forward

NAMESPACE = "alora_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")

# A list must not contain None, because autograd would treat the whole list as a constant. So absent
# biases are left out, and `has_bias` and `has_lora_bias` say which layers have one.
_TENSORS = (
    "Tensor x, Tensor[] base_outs, Tensor[] weights, Tensor[] biases, Tensor[] lora_a, "
    "Tensor[] lora_b, Tensor[] lora_bias, Tensor row_adapter, Tensor active_rows, "
    "Tensor active_count, Tensor? seed, "
)
_OPTIONS = ", ".join(
    [
        "bool[] has_bias, bool[] has_lora_bias, float[] scalings",
        *(f"{kind.__name__} {name}" for name, kind in get_type_hints(Options).items()),
    ]
)
_TAGS = (torch.Tag.pt2_compliant_tag,)
# forward returns the outputs [..., N], then xa [M, C].
_library.define(f"linear({_TENSORS}{_OPTIONS}, bool save) -> Tensor[]", tags=_TAGS)
# backward returns dx, dA…, dB…, dlora_bias…; a gradient that is not wanted has shape [0].
_library.define(
    f"linear_backward(Tensor[] dys, Tensor xa, {_TENSORS}{_OPTIONS}, bool[] needs) -> Tensor[]",
    tags=_TAGS,
)

TENSOR_ARGS = 11  # the number of arguments in _TENSORS


def _spread(present: Sequence[Any], has: Sequence[bool]) -> list[Any]:
    """`present`, with None inserted where `has` is false."""
    rest = iter(present)
    return [next(rest) if h else None for h in has]


def _call(tensors: Sequence[Any], options: Sequence[Any]) -> tuple[Call, list[Projection]]:
    """The call and its projections, from the flat arguments of an op."""
    _, _, weights, biases, lora_a, lora_b, lora_bias, *activation, seed = tensors
    has_bias, has_lora_bias, scalings, *rest = options
    count = len(scalings)
    call = Call(Activation(*activation), tuple(scalings), Options(*rest), seed)
    flat = [
        *(weights or [None] * count),
        *_spread(biases, has_bias),
        *lora_a,
        *lora_b,
        *_spread(lora_bias, has_lora_bias),
    ]
    return call, projections_of(flat, count)


def _needs(needs: Sequence[bool], count: int) -> Needs:
    """`Needs` from a flat list: x, then lora_a…, lora_b…, lora_bias…."""
    groups = [tuple(needs[1 + i * count : 1 + (i + 1) * count]) for i in range(3)]
    return Needs(needs[0], *groups)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _forward(*args: Any) -> list[Tensor]:
    tensors, options, save = args[:TENSOR_ARGS], args[TENSOR_ARGS:-1], args[-1]
    x, base_outs = tensors[:2]
    call, projections = _call(tensors, options)
    copy = torch.contiguous_format
    given = [_rows(b).clone(memory_format=copy) for b in base_outs] or None
    ys, xa, _ = run_forward(call, _rows(x), projections, given, save)
    if xa is None or not save:
        _, columns = saved_columns([p.lora_a.shape[0] for p in projections])
        dtype = saved_dtype(x.dtype, call.options.adapter_precision)
        xa = x.new_empty(x.shape[:-1].numel() if save else 0, columns, dtype=dtype)
    return [*(shaped(y, (*x.shape[:-1], y.shape[-1])) for y in ys), xa]


def _forward_fake(*args: Any) -> list[Tensor]:
    tensors, options, save = args[:TENSOR_ARGS], args[TENSOR_ARGS:-1], args[-1]
    x, lora_a, lora_b = tensors[0], *tensors[4:6]
    ys = [x.new_empty(*x.shape[:-1], b.shape[0]) for b in lora_b]
    _, columns = saved_columns([a.shape[0] for a in lora_a])
    rows = _rows(x).shape[0] if save else 0
    dtype = saved_dtype(x.dtype, Options(*options[3:]).adapter_precision)
    return [*ys, x.new_empty(rows, columns, dtype=dtype)]


def _backward(dys: Sequence[Tensor], xa: Tensor, *args: Any) -> list[Tensor]:
    tensors, options, needs = args[:TENSOR_ARGS], args[TENSOR_ARGS:-1], args[-1]
    x = tensors[0]
    call, projections = _call(tensors, options)
    count = len(projections)
    # An op cannot return the backend that ran forward, but the same choice finds it again.
    given = projections[0].weight is None
    problem = problem_of(call, _rows(x), projections, given, backward=False)
    backend, _ = choose(problem, call.options.backend, call.options.strategy)
    grads = run_backward(
        call,
        _rows(x),
        projections,
        xa,
        backend.name,
        [_rows(dy) for dy in dys],
        _needs(needs, count),
    )
    dx = None if grads.x is None else grads.x.view(x.shape)
    found = [dx, *grads.lora_a, *grads.lora_b, *grads.lora_bias]
    return [x.new_empty(0) if g is None else g.contiguous() for g in found]


def _backward_fake(dys: Sequence[Tensor], xa: Tensor, *args: Any) -> list[Tensor]:
    tensors, options, needs = args[:TENSOR_ARGS], args[TENSOR_ARGS:-1], args[-1]
    x, lora_a, lora_b, lora_bias = tensors[0], *tensors[4:7]
    sources = [x, *lora_a, *lora_b, *_spread(lora_bias, options[1])]
    return [
        x.new_empty(source.shape, dtype=source.dtype) if need else x.new_empty(0)
        for source, need in zip(sources, needs)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.options = inputs[:TENSOR_ARGS], inputs[TENSOR_ARGS:-1]
    ctx.base_given = bool(tensors[1])
    # Backward does not read base_outs: their gradient is dy. So they are not saved.
    kept = [[] if i == 1 else t for i, t in enumerate(tensors)]
    ctx.lengths = [len(t) if isinstance(t, list | tuple) else None for t in kept]
    flat: list[Tensor | None] = []
    for t in kept:
        flat.extend(t if isinstance(t, list | tuple) else [t])
    ctx.save_for_backward(output[-1], *flat)


def _autograd_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    xa, *flat = ctx.saved_tensors
    rest = iter(flat)
    tensors: list[Any] = [
        next(rest) if n is None else [next(rest) for _ in range(n)] for n in ctx.lengths
    ]
    x, _, weights, biases, lora_a, lora_b = tensors[:6]
    count = len(lora_a)
    wanted, has_lora_bias = ctx.needs_input_grad, ctx.options[1]
    wants_bias = [bool(w) for w in _spread(wanted[6], has_lora_bias)]
    needs = [wanted[0], *wanted[4], *wanted[5], *wants_bias]
    dys = [
        x.new_zeros(*x.shape[:-1], b.shape[0]) if dy is None else dy
        for dy, b in zip(grads[:count], lora_b)
    ]
    if beyond_backends(dys):
        call, projections = _call(tensors, ctx.options)
        again = gradients(
            call,
            x,
            projections,
            dys,
            _needs(needs, count),
            create_graph=torch.is_grad_enabled(),
        )
        got = [again.x, *again.lora_a, *again.lora_b, *again.lora_bias]
    else:
        found = torch.ops.alora_kernels.linear_backward(dys, xa, *tensors, *ctx.options, needs)
        got = [g if need else None for g, need in zip(found, needs)]
    da, db, dbias = (got[1 + i * count : 1 + (i + 1) * count] for i in range(3))
    return (
        got[0],
        dys if ctx.base_given else [],
        [None] * len(weights),
        [None] * len(biases),
        da,
        db,
        [g for g, has in zip(dbias, has_lora_bias) if has],
        *(None,) * (4 + len(ctx.options) + 1),
    )


_library.impl("linear", _forward, "CompositeExplicitAutograd")
_library.impl("linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::linear", _forward_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::linear_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    f"{NAMESPACE}::linear", _autograd_backward, setup_context=_setup_context, lib=_library
)


def traced_linear(
    call: Call, x: Tensor, flat: Sequence[Tensor | None], save: bool
) -> tuple[Tensor, ...]:
    """Run `call` through the registered op. `flat` is the list that `AloraFunction.apply` takes."""
    count = len(call.scalings)
    groups = [list(flat[i * count : (i + 1) * count]) for i in range(6)]
    activation = call.activation
    *ys, _ = torch.ops.alora_kernels.linear(
        x,
        *([t for t in group if t is not None] for group in groups),
        activation.row_adapter,
        activation.active_rows,
        activation.active_count,
        call.seed,
        [bias is not None for bias in groups[2]],
        [bias is not None for bias in groups[5]],
        list(call.scalings),
        *call.options,
        save,
    )
    return tuple(ys)
