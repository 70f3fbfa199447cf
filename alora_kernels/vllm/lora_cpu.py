"""vLLM's LoRA op on a CPU: rows are grouped by adapter, so that A and B are never copied.

    y[rows of s, slice i] += scale · (x[rows of s] · A_i[s]ᵀ) · B_i[s]ᵀ      for every slot s in use

vLLM keeps the adapters of one layer in *slots*: `lora_a_stacked[i] [n, 1, R, K]` and
`lora_b_stacked[i] [n, 1, N_i, R]`, one tensor for each output slice i (q, k and v; gate and up).
`indices [M]` names the slot of every row, −1 for a row that runs the base model. The rows of each
slot are found once for a batch (`group_rows`). Neighbouring rows are read in place, as a slice;
only scattered rows are gathered. B is already multiplied by `lora_alpha / r`: vLLM's `scale` is 1.

vLLM's own CPU ops gather A and B once for each *row* instead (M · R · (K + N) elements). They use
−1 as an index, and so read the last slot.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..activation import Activation
from ..backends.cpu import CpuBackend
from ..backends.cpu.rows import parts_of
from ..contract import Call, Projection

BACKEND = CpuBackend()


class Group(NamedTuple):
    """The rows of a batch that run one slot."""

    slot: int
    activation: Activation


def group_rows(indices: Tensor) -> list[Group]:
    """The rows of each slot in `indices` (integer `[M]` on the CPU), without those that have −1."""
    found = indices.numpy()
    rows = found.shape[0]
    groups = []
    for slot in np.unique(found).tolist():
        if slot < 0:
            continue
        mask = np.zeros(rows + 2, dtype=np.int8)
        mask[1:-1] = found == slot
        edges = np.flatnonzero(np.diff(mask)).tolist()
        segments = list(zip(edges[::2], edges[1::2]))
        groups.append(Group(slot, Activation._from_segments(segments, rows, None)))
    return groups


class Slots:
    """Views of each slot's matrices, made once for a stack: every call of a layer needs them."""

    def __init__(self) -> None:
        # By the stack's id. The stack is kept, too, so that no other tensor can get its id.
        self._known: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def __call__(self, stack: Tensor) -> tuple[Tensor, ...]:
        """The matrices `[a, b]` of all slots of a stack `[n, 1, a, b]` or `[n, a, b]`."""
        known = self._known.get(id(stack))
        if known is None:
            views = stack.view(stack.shape[0], *stack.shape[-2:]).unbind(0)
            known = self._known[id(stack)] = stack, views
        return known[1]


def add_linear(
    y: Tensor,  # [M, ≥ offset + Σ N_i], in place
    x: Tensor,  # [M, K]
    lora_a: Sequence[tuple[Tensor, ...]],  # for each slice the slots, [R, K] each
    lora_b: Sequence[tuple[Tensor, ...]],  # for each slice the slots, [N_i, R] each
    groups: Sequence[Group],
    scale: float,
    output_slices: Sequence[int],
) -> None:
    """y[:, slice i] += scale · (x · A_iᵀ) · B_iᵀ on the rows of each group, in place."""
    if not groups:
        return
    rows = groups[0].activation.num_rows  # vLLM may pad the batch with rows that have no slot
    y, x = y[:rows], x[:rows].to(y.dtype)
    edges = [0]
    for size in output_slices:
        edges.append(edges[-1] + size)
    outs = [y[:, lo:hi] for lo, hi in itertools.pairwise(edges)]
    for slot, activation in groups:
        projections = [
            Projection(None, None, a[slot], b[slot], None) for a, b in zip(lora_a, lora_b)
        ]
        call = Call(activation, (float(scale),) * len(projections))
        BACKEND.forward(call, "delta", x, projections, outs, False)


def shrink(
    xa: Tensor | Sequence[Tensor],  # for each slice [M, R], overwritten
    x: Tensor,  # [M, K]
    lora_a: Sequence[tuple[Tensor, ...]],
    groups: Sequence[Group],
    scale: float,
) -> None:
    """xa_i = scale · x · A_iᵀ on the rows of each group, zero on all others, in xa's dtype."""
    for out, slots in zip(xa, lora_a):
        out = out.view(-1, out.shape[-1])
        out.zero_()
        for slot, activation in groups:
            a = slots[slot].to(out.dtype)  # [R, K]
            for rows, _, _ in parts_of(activation):
                out[rows, : a.shape[0]] = (x[rows].to(out.dtype) @ a.t()).mul_(scale)


def expand(
    y: Tensor,  # [M, ≥ offset + Σ N_i], in place
    xa: Tensor | Sequence[Tensor],  # for each slice [M, R]
    lora_b: Sequence[tuple[Tensor, ...]],
    groups: Sequence[Group],
    output_slices: Sequence[int],
    offset: int = 0,
    add_inputs: bool = True,
) -> None:
    """y[:, slice i] += xa_i · B_iᵀ on the rows of each group.

    Without `add_inputs` the slices are set to zero first. A slice is cut where y ends, since vLLM
    pads the vocabularies of B and of y differently.
    """
    for low, slots, size in zip(xa, lora_b, output_slices):
        out = y[:, offset : offset + size]
        offset += size
        if not add_inputs:
            out.zero_()
        for slot, activation in groups:
            b = slots[slot][: out.shape[1]].to(y.dtype)  # [N, R]
            for rows, _, _ in parts_of(activation):
                part = low[rows, : b.shape[1]].to(y.dtype) @ b.t()
                if isinstance(rows, slice):
                    out[rows, : b.shape[0]].add_(part)
                else:
                    out[:, : b.shape[0]].index_add_(0, rows, part)
