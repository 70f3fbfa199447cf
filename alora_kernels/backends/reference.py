"""The `reference` backend: runs the definition itself, on any device and in any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import Call, Gradients, Needs, Problem, Projection
from ..reference import alora_linear_reference


class ReferenceBackend:
    name = "reference"

    def why_not_here(self) -> str | None:
        return None

    def why_not(self, problem: Problem, strategy: str) -> str | None:
        return None if strategy == "delta" else "the reference has the strategy 'delta' alone"

    def forward(
        self,
        call: Call,
        strategy: str,
        x: Tensor,
        projections: Sequence[Projection],
        base_outs: Sequence[Tensor] | None,
        save: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        ys = outputs(call, x, projections, base_outs)
        if base_outs is None:
            return ys, None
        for base, y in zip(base_outs, ys):
            base.copy_(y)
        return list(base_outs), None

    def backward(
        self,
        call: Call,
        strategy: str,
        x: Tensor,
        projections: Sequence[Projection],
        xa: Tensor | None,
        dys: Sequence[Tensor],
        needs: Needs,
    ) -> Gradients:
        return gradients(call, x, projections, dys, needs)


def outputs(
    call: Call, x: Tensor, projections: Sequence[Projection], base_outs: Sequence[Tensor] | None
) -> list[Tensor]:
    """The outputs `[..., N]` of x `[..., K]`, differentiable any number of times and in any mode of
    torch."""
    given = [None] * len(projections) if base_outs is None else base_outs
    return [_output(call, x, p, i, base) for i, (p, base) in enumerate(zip(projections, given))]


def gradients(
    call: Call,
    x: Tensor,
    projections: Sequence[Projection],
    dys: Sequence[Tensor],
    needs: Needs,
    *,
    create_graph: bool = False,
) -> Gradients:
    """The wanted gradients by autograd; with `create_graph` they can be differentiated again."""
    count = len(projections)
    wanted = [needs.x, *needs.lora_a, *needs.lora_b, *needs.lora_bias]
    tensors = [
        x,
        *(p.lora_a for p in projections),
        *(p.lora_b for p in projections),
        *(p.lora_bias for p in projections),
    ]
    with torch.enable_grad():
        # Two projections may share a tensor. Each use becomes a leaf, so it gets its own gradient.
        leaves = [
            t if t is None else t.view_as(t) if create_graph else t.detach().requires_grad_(need)
            for t, need in zip(tensors, wanted)
        ]
        x_leaf = leaves[0]
        assert x_leaf is not None
        again, base_outs = [], []
        for i, p in enumerate(projections):
            a, b, bias = (leaves[1 + j * count + i] for j in range(3))
            assert a is not None and b is not None
            again.append(p._replace(lora_a=a, lora_b=b, lora_bias=bias))
            base_outs.append(torch.zeros_like(dys[i]))
        outs = outputs(call, x_leaf, again, None if again[0].weight is not None else base_outs)
        inputs = [t for t, need in zip(leaves, wanted) if need and t is not None]
        found = iter(
            torch.autograd.grad(
                outs, inputs, list(dys), materialize_grads=True, create_graph=create_graph
            )
        )
    grads = [next(found) if need and t is not None else None for t, need in zip(leaves, wanted)]
    return Gradients(
        grads[0],
        grads[1 : 1 + count],
        grads[1 + count : 1 + 2 * count],
        grads[1 + 2 * count :],
    )


def _output(call: Call, x: Tensor, p: Projection, i: int, base_out: Tensor | None) -> Tensor:
    return alora_linear_reference(
        x,
        p.weight,
        p.bias,
        p.lora_a,
        p.lora_b,
        call.activation.mask,
        call.scalings[i],
        lora_bias=p.lora_bias,
        dropout_p=call.options.dropout_p,
        seed=call.seed,
        prefix_grad=call.options.prefix_grad,
        adapter_precision=call.options.adapter_precision,
        base_out=base_out,
    )
