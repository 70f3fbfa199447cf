"""Touched place: which adapter each token of a batch runs, in vLLM's V1 model runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import invocation
from .patch import Touch, wrap

ACTIVE = Touch(
    "vllm.v1.worker.lora_model_runner_mixin.LoRAModelRunnerMixin.set_active_loras",
    "(self, input_batch, num_scheduled_tokens, num_sampled_tokens=None, "
    "mapping_type=<LoRAMappingType.LANGUAGE: 1>)",
    "tokens before the invocation run no adapter",
)
# The first is replaced. The plugin relies on the others as they are.
TOUCHED: tuple[Touch, ...] = (
    ACTIVE,
    Touch(
        "vllm.v1.worker.lora_model_runner_mixin.LoRAModelRunnerMixin._set_active_loras",
        "(self, prompt_lora_mapping, token_lora_mapping, lora_requests, "
        "mapping_type=<LoRAMappingType.LANGUAGE: 1>)",
        "takes the adapter of each token",
    ),
    Touch(
        "vllm.v1.worker.gpu_input_batch.InputBatch.make_lora_inputs",
        "(self, num_scheduled_tokens, num_sampled_tokens)",
        "gives the adapter of each token",
    ),
)


def install() -> None:
    """Changes the mapping between vLLM's two steps, for batches with adapters only."""
    wrap(ACTIVE, _mapping)


def _mapping(function: Callable[..., None]) -> Callable[..., None]:
    from vllm.lora.layers import LoRAMappingType

    def set_active_loras(
        self: Any,
        input_batch: Any,
        num_scheduled_tokens: np.ndarray,
        num_sampled_tokens: np.ndarray | None = None,
        mapping_type: Any = LoRAMappingType.LANGUAGE,
    ) -> None:
        if num_sampled_tokens is None:
            num_sampled_tokens = np.ones_like(num_scheduled_tokens, dtype=np.int32)
        prompt, tokens, loras = input_batch.make_lora_inputs(
            num_scheduled_tokens, num_sampled_tokens
        )
        if loras:
            starts = starts_of_prefills(self.requests, input_batch)
            if starts:
                computed = input_batch.num_computed_tokens_cpu
                tokens = mapped(tokens, starts, computed, num_scheduled_tokens)
        self._set_active_loras(prompt, tokens, loras, mapping_type)

    return set_active_loras


def starts_of_prefills(requests: dict[str, Any], input_batch: Any) -> dict[int, int]:
    """The start of each aLoRA request that is still reading its prompt, by its row of the batch.

    An invocation lies in the prompt, so whatever comes after the prompt is active.
    """
    count = input_batch.num_reqs
    reading = input_batch.num_computed_tokens_cpu[:count] < input_batch.num_prompt_tokens[:count]
    rows = np.flatnonzero(reading & (input_batch.request_lora_mapping[:count] != 0))
    starts = {}
    for row in rows.tolist():
        found = invocation.of(requests[input_batch.req_ids[row]].sampling_params)
        if found is not None:
            starts[row] = found.start
    return starts


def mapped(
    token_lora: tuple[int, ...],
    starts: dict[int, int],
    computed: np.ndarray,
    scheduled: np.ndarray,
) -> tuple[int, ...]:
    """`token_lora`, with 0 (no adapter) for the tokens before their request's start.

    Args:
        token_lora: the adapter of each token of the batch, row after row.
        starts: for some rows, the position of the first active token.
        computed: for each row, the position of its first token in this batch.
        scheduled: for each row, how many tokens it has in this batch.
    """
    out = np.asarray(token_lora)
    ends = np.cumsum(scheduled)
    for row, start in starts.items():
        first = int(ends[row]) - int(scheduled[row])
        inactive = min(max(start - int(computed[row]), 0), int(scheduled[row]))
        out[first : first + inactive] = 0
    return tuple(out)
