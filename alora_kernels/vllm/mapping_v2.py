"""Touched place: which adapter each token of a batch runs, in vLLM's V2 model runner.

The V2 runner needs Triton and a GPU, and this module has never run inside it. Its mapping is the
pure function `mapping.mapped`, tested against recorded inputs. If the V2 runner is not as expected,
it stays untouched: aLoRA requests are refused there (`PROBLEMS` says why), and served in V1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import invocation
from .mapping import mapped
from .patch import Touch, mismatches, wrap

ADD = Touch(
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.add_requests",
    "(self, scheduler_output)",
    "keeps the start of each request beside its adapter",
)
INPUTS = Touch(
    "vllm.v1.worker.gpu.lora_utils.LoraState.make_lora_inputs",
    "(self, req_ids, idx_mapping, num_scheduled_tokens)",
    "tokens before the invocation run no adapter",
)
REMOVE = Touch(
    "vllm.v1.worker.gpu.lora_utils.LoraState.remove_request",
    "(self, req_id)",
    "forgets the start of a request that is done",
)
TOUCHED: tuple[Touch, ...] = (ADD, INPUTS, REMOVE)

PROBLEMS: list[str] = []


def install() -> None:
    """Changes the V2 runner if it can run here and is as expected. If not, fills `PROBLEMS`."""
    from vllm.platforms import current_platform

    PROBLEMS.clear()
    if current_platform.is_cpu():
        PROBLEMS.append("it does not run on a CPU")
        return
    PROBLEMS.extend(mismatches(TOUCHED))
    if not PROBLEMS:
        wrap(ADD, _adding)
        wrap(INPUTS, _mapping)
        wrap(REMOVE, _removing)


def _adding(function: Callable[..., None]) -> Callable[..., None]:
    def add_requests(self: Any, scheduler_output: Any) -> None:
        function(self, scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            if new.lora_request is not None:
                found = invocation.of(new.sampling_params)
                if found is not None:
                    add(self.lora_state, new.req_id, found.start, self.req_states)

    return add_requests


def add(lora_state: Any, req_id: str, start: int, req_states: Any) -> None:
    """Keeps a request's start on vLLM's LoraState, together with vLLM's table of positions."""
    if not hasattr(lora_state, "alora_starts"):
        lora_state.alora_starts = {}
        lora_state.alora_positions = req_states.num_computed_tokens_np
    lora_state.alora_starts[req_id] = start


def _mapping(function: Callable[..., Any]) -> Callable[..., Any]:
    def make_lora_inputs(
        self: Any, req_ids: list[str], idx_mapping: np.ndarray, num_scheduled_tokens: np.ndarray
    ) -> Any:
        prompt, tokens, loras = function(self, req_ids, idx_mapping, num_scheduled_tokens)
        known = getattr(self, "alora_starts", None)
        if known and loras:
            starts = {row: known[r] for row, r in enumerate(req_ids) if r in known}
            computed = self.alora_positions[idx_mapping]
            tokens = mapped(tokens, starts, computed, num_scheduled_tokens)
        return prompt, tokens, loras

    return make_lora_inputs


def _removing(function: Callable[..., None]) -> Callable[..., None]:
    def remove_request(self: Any, req_id: str) -> None:
        function(self, req_id)
        getattr(self, "alora_starts", {}).pop(req_id, None)

    return remove_request
