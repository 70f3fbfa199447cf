"""Touched place: admission. The start of the invocation is found here, once for each request.

vLLM's input processor runs in the process that talks to clients. It sees the tokens that the model
will see: after the chat template and after truncation. A refusal here is an error of one request;
the others go on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ..invocation import last_occurrence
from . import invocation
from .adapter import Adapters
from .patch import Touch, wrap

MISSING = "ALORA_VLLM_MISSING"
BEAM_KEY = "alora_prompt_length"

INPUTS = Touch(
    "vllm.v1.engine.input_processor.InputProcessor.process_inputs",
    "(self, request_id, prompt, params, supported_tasks, arrival_time=None, lora_request=None, "
    "tokenization_kwargs=None, trace_headers=None, priority=0, data_parallel_rank=None, "
    "resumable=False, session_id=None, kv_hints=None)",
    "finds the start of the invocation in a request's prompt, and refuses what is not supported",
)
BEAM = Touch(
    "vllm.entrypoints.generate.beam_search.utils.BeamSearchSequence.get_prompt",
    "(self)",
    "a beam is a new request whose prompt ends in generated tokens, where no invocation counts",
)
TOUCHED: tuple[Touch, ...] = (INPUTS, BEAM)

ADAPTERS = Adapters()


def install() -> None:
    """Lets the search for an invocation run after vLLM's input processor."""
    error_when_missing()
    wrap(INPUTS, _admitting)
    wrap(BEAM, _remembering)


def error_when_missing() -> bool:
    """Whether a prompt without invocation is an error. If not, the base model answers it."""
    given = os.environ.get(MISSING, "base")
    if given not in ("base", "error"):
        raise ValueError(f"{MISSING}={given!r}: expected base (the default) or error")
    return given == "error"


def _admitting(function: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        request = function(self, request_id, prompt, *args, **kwargs)
        if request.lora_request is not None:
            length = prompt.get(BEAM_KEY) if isinstance(prompt, dict) else None
            admit(self.vllm_config, request, length)
        return request

    return process_inputs


def _remembering(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def get_prompt(self: Any) -> Any:
        prompt = function(self)
        if self.lora_request is not None:
            first = self.orig_prompt
            decoder = first["decoder_prompt"] if first["type"] == "enc_dec" else first
            prompt[BEAM_KEY] = len(decoder["prompt_token_ids"])
        return prompt

    return get_prompt


def admit(vllm_config: Any, request: Any, prompt_length: int | None = None) -> None:
    """Writes the start of the invocation into an EngineCoreRequest that names an adapter.

    A request whose prompt has no invocation becomes one to the base model. `prompt_length` is where
    the user's prompt ends, if generated tokens follow it (beam search).
    """
    from vllm.exceptions import VLLMValidationError

    lora_request, params = request.lora_request, request.sampling_params
    try:
        adapter = ADAPTERS.of(lora_request)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="model") from error
    if invocation.of(params) is not None:
        raise VLLMValidationError(
            f"extra_args may not have {invocation.KEY!r}: this plugin writes it",
            parameter="extra_args",
        )
    if adapter.tokens is None:
        return
    reason = refusal(vllm_config, request)
    if reason:
        raise VLLMValidationError(
            f"{lora_request.lora_name!r} is an Activated LoRA, which does not work with {reason}",
            parameter="model",
        )
    start = last_occurrence(_token_ids(request)[:prompt_length], adapter.tokens)
    if start is not None:
        invocation.put(params, invocation.Invocation(start, adapter.identity))
    elif error_when_missing():
        raise VLLMValidationError(
            f"the prompt has no invocation of {lora_request.lora_name!r}: its token ids "
            f"{list(adapter.tokens)} do not occur among the {len(_token_ids(request))} of the "
            f"prompt. With {MISSING}=base the base model would answer.",
            parameter="prompt",
        )
    else:
        request.lora_request = None


def _token_ids(request: Any) -> list[int]:
    """The prompt's token ids, with −1 for an embedding in the place of a token."""
    ids: list[int] = request.prompt_token_ids
    if request.prompt_is_token_ids is None:
        return ids
    return [t if real else -1 for t, real in zip(ids, request.prompt_is_token_ids)]


def refusal(vllm_config: Any, request: Any) -> str | None:
    """Why this request or this engine cannot run an aLoRA; None if it can."""
    from . import mapping_v2

    if request.sampling_params is None:
        return "pooling (embedding, classification, scoring)"
    if request.prompt_token_ids is None:
        return "prompt_embeds without token ids: an invocation is found in token ids"
    if request.resumable:
        return "a prompt that arrives in parts (streaming input)"
    if vllm_config.model_config.is_encoder_decoder:
        return "an encoder-decoder model"
    if vllm_config.kv_transfer_config is not None:
        return "KV connectors and offloading (kv_transfer_config, kv_offloading_size)"
    events = vllm_config.kv_events_config
    if events is not None and events.enable_kv_cache_events:
        return "KV cache events (kv_events_config): they name the adapter of blocks that are shared"
    if vllm_config.lora_config.enable_tower_connector_lora:
        return "enable_tower_connector_lora: image embeddings come before the invocation"
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        return "decode context parallelism"
    if vllm_config.parallel_config.data_parallel_size > 1:
        return "data parallelism (data_parallel_size > 1): it was not tested"
    if vllm_config.use_v2_model_runner and mapping_v2.PROBLEMS:
        return "this version of the V2 model runner: " + "; ".join(mapping_v2.PROBLEMS)
    return None
