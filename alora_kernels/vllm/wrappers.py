"""vLLM's punica wrapper on a CPU, with this package's arithmetic. vLLM imports it by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from .lora_cpu import Group, Slots, add_linear, expand, group_rows, shrink


class AloraWrapperCPU(PunicaWrapperCPU):
    """Rows are grouped once for each batch; every layer then works on slices of its tensors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._slots = Slots()
        # Before the first mapping no row has an adapter: vLLM's index tensors are not written yet.
        self._groups: list[Group] = []
        self._sampler_groups: list[Group] = []

    def update_metadata(
        self,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        # Only vLLM's index tensors are updated. Its own ops also split the batch into runs of one
        # slot, with room for one run per request, but a prefill across its invocation has two.
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.is_prefill = mapping.is_prefill
        self._groups = group_rows(self.token_lora_indices)
        self._sampler_groups = group_rows(self.sampler_indices)

    def add_shrink(
        self,
        y: tuple[Tensor, ...] | Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        x = x.view(-1, x.shape[-1])
        shrink(y, x, [self._slots(a) for a in lora_a_stacked], self._groups, scale)

    def add_expand(
        self,
        y: Tensor,
        x: tuple[Tensor, ...] | Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        slots = [self._slots(b) for b in lora_b_stacked]
        y = y.view(-1, y.shape[-1])
        expand(y, x, slots, self._groups, output_slices, offset_start, add_inputs)

    def add_lora_embedding(
        self,
        y: Tensor,
        x: Tensor,
        lora_b_stacked: Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        y = y.view(-1, y.shape[-1])
        slots = self._slots(lora_b_stacked)
        expand(y, [x], [slots], self._groups, [y.shape[1]], add_inputs=add_inputs)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._groups:
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        lora_a = [self._slots(a) for a in lora_a_stacked]
        lora_b = [self._slots(b) for b in lora_b_stacked]
        add_linear(y, x, lora_a, lora_b, self._groups, scale, output_slices)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._sampler_groups:
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        low = x.new_zeros(x.shape[0], lora_b_stacked.size(-1), dtype=torch.float32)
        shrink([low], x, [self._slots(lora_a_stacked)], self._sampler_groups, scale)
        expand(y, [low], [self._slots(lora_b_stacked)], self._sampler_groups, [y.shape[1]])

    def apply_lora_full_linear(
        self,
        y: Tensor,
        x: Tensor,
        weight_stacked: Tensor,
        bias_stacked: Tensor,
        module_enabled: Tensor,
    ) -> None:
        full = x.new_zeros(x.shape[0], weight_stacked.size(-2), dtype=torch.float32)
        shrink([full], x, [self._slots(weight_stacked)], self._sampler_groups, 1.0)
        y.copy_(self._select_full_linear_output(y, full, bias_stacked, module_enabled))
