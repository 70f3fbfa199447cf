"""This package's kernels as vLLM's LoRA op on a GPU (`ALORA_VLLM_OPS=1`).

    y[rows of s, slice i] += scale · (x[rows of s] · A_i[s]ᵀ) · B_i[s]ᵀ      for every slot s

The layout is that of `lora_cpu.py`, but here the device itself holds which rows run which slot
(`DeviceRows`). These tensors are rewritten for each batch, in place and without a synchronisation.
They never move, so a captured graph reads the rows of the next batch. Launches are sized for all
rows, and programs past a slot's count exit at once. So a layer costs one shrink for each slot, and
one expand for each slot and slice, even if no row runs the slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activation import Activation
from ..contract import Call, Projection
from ..dispatch import choose, problem_of

_library = torch.library.Library("alora_kernels_vllm", "DEF")
_library.define(
    "add_linear(Tensor(a!) y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor row_adapter, "
    "Tensor active_rows, Tensor active_count, float scale, int[] output_slices) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class DeviceRows:
    """Which rows of a batch run each slot, in tensors that are rewritten for each batch."""

    def __init__(self, slots: int, rows: int, device: torch.device | str) -> None:
        def full(*shape: int) -> Tensor:
            return torch.full(shape, -1, dtype=torch.int32, device=device)

        self.row_adapter = full(slots, rows)  # 0 where the row runs the slot, else −1
        self.active_rows = full(slots, rows)  # ascending, then −1
        self.active_count = torch.zeros(slots, dtype=torch.int32, device=device)

    def update(self, indices: Tensor) -> None:
        """Store the slot of every row, integer `[M]` on the device. A row with −1 runs no slot."""
        slots, capacity = self.row_adapter.shape
        count = indices.shape[0]
        numbers = torch.arange(slots, device=indices.device, dtype=indices.dtype)
        mine = indices.unsqueeze(0) == numbers.unsqueeze(1)  # [slots, M]
        self.row_adapter.fill_(-1)
        self.row_adapter[:, :count] = mine.to(torch.int32) - 1
        # A row goes to the column of its rank within the slot. All others go to one more column,
        # which is cut off.
        rank = torch.where(mine, torch.cumsum(mine, 1, dtype=torch.int64) - 1, capacity)
        listed = self.active_rows.new_full((slots, capacity + 1), -1)
        row = torch.arange(count, device=indices.device, dtype=torch.int32)
        listed.scatter_(1, rank, row.expand(slots, count).contiguous())
        self.active_rows.copy_(listed[:, :capacity])
        self.active_count.copy_(mine.sum(1, dtype=torch.int32))


def add_linear(
    y: Tensor,  # [M, ≥ Σ N_i], in place
    x: Tensor,  # [M, K]
    lora_a: Sequence[Tensor],  # [n, 1, R, K] for each slice
    lora_b: Sequence[Tensor],  # [n, 1, N_i, R] for each slice
    row_adapter: Tensor,
    active_rows: Tensor,
    active_count: Tensor,
    scale: float,
    output_slices: Sequence[int],
) -> None:
    """The op itself. It runs on every device that a backend of this package serves."""
    rows = x.shape[0]
    outs = list(torch.split(y[:, : sum(output_slices)], list(output_slices), dim=1))
    for slot in range(row_adapter.shape[0]):
        activation = Activation(
            row_adapter[slot, :rows],
            active_rows[slot, :rows],
            active_count[slot : slot + 1],
        )
        projections = [
            Projection(None, None, a[slot, 0], b[slot, 0], None) for a, b in zip(lora_a, lora_b)
        ]
        call = Call(activation, (scale,) * len(projections))
        problem = problem_of(call, x, projections, base_given=True, backward=False)
        backend, strategy = choose(problem, "auto", "delta")
        backend.forward(call, strategy, x, projections, outs, False)


_library.impl("add_linear", add_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("alora_kernels_vllm::add_linear", lib=_library)
def _fake(*args: object) -> None:
    return None
