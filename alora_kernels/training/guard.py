"""Checks whether the prefix of a model may run without gradient, and says why not.

That is exact only if nothing before the invocation depends on a trained parameter, on a random
number, or on later tokens. Each check here names one way in which a model can violate this.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..invocation import invocation_of
from ..peft.adapters import is_adopted
from ..peft.stream import reads_cache
from ..peft.support import why_unsuited
from .checkpointing import checkpointed_layers, hooks_run_again

_DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_dropout",
    "attn_pdrop",
    "activation_dropout",
    "input_jitter_noise",
    "router_jitter_noise",
    "dropout",
    "embd_pdrop",
    "hidden_dropout",
    "hidden_dropout_prob",
    "layerdrop",
    "resid_pdrop",
)
_TESTED_ATTENTION = ("sdpa", "eager")
_OWN_WAYS = {
    "whisper": "makes a mask for the tokens of one forward alone",
    "prophetnet": "takes one token at a time with a cache",
    "git": "makes its masks for text behind an image, and differs over a lent prefix",
}
_NO_RESTART = ("dynamic", "longrope")  # RoPE types whose angles depend on the total length


class PrefixError(ValueError):
    """The prefix must not run without gradient; the message lists every reason."""


def unwrap(model: nn.Module) -> Any:
    """The PEFT model inside wrappers of DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
            continue
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_adapter(name: str) -> bool:
    """Whether a parameter name is that of a LoRA matrix (not of a fully trained module)."""
    return any(part in name for part in (".lora_A.", ".lora_B."))


def text_config(model: nn.Module) -> Any:
    config = unwrap(model).get_base_model().config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def attention_windows(model: nn.Module) -> list[int | None]:
    """For each layer its sliding window, or None for full attention.

    Raises:
        PrefixError: a layer has another kind of state (recurrent, chunked, compressed, shared).
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config = text_config(model)
    windows: list[int | None] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        kind = (getattr(config, "layer_types", None) or [None] * (index + 1))[index]
        if kind in ("chunked_attention", "linear_attention"):
            raise PrefixError(
                f"layer {index} uses {kind.replace('_', ' ')}, which is not supported"
            )
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        else:
            raise PrefixError(
                f"layer {index} keeps a {type(layer).__name__}: only full and sliding-window "
                "attention have a prefix that can be lent (recurrent, linear, compressed and "
                "shared states are not carried)"
            )
    return windows or [None] * int(config.num_hidden_layers)


def prefix_problems(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[str]:
    """Every reason why the prefix of `model` needs a gradient, or cannot be computed on its own.

    Args:
        model: a PEFT model, also under DDP, FSDP2 or torch.compile.
        inputs: the inputs in the batch except input_ids, attention_mask, labels and position_ids.

    Returns:
        The reasons as text. The list is empty if the prefix may run without gradient.
    """
    return list(_problems(model, inputs or {}))


def check_prefix(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> None:
    """Raise `PrefixError` with every reason in `prefix_problems`, if there is one."""
    problems = prefix_problems(model, inputs)
    if problems:
        listed = "\n  - ".join(problems)
        raise PrefixError(
            "the prefix cannot be left without gradient here; use prefix='full', or change:\n"
            f"  - {listed}"
        )


def _problems(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[str]:
    from peft import PeftModel, PeftType

    peft = unwrap(model)
    if type(model).__name__ == "FullyShardedDataParallel":
        yield "FSDP1 is not supported; use FSDP2 (fully_shard)"
        return
    if isinstance(model, nn.DataParallel):
        yield "DataParallel is not supported; use DistributedDataParallel"
        return
    if not isinstance(peft, PeftModel):
        yield f"the model is a {type(peft).__name__}, not a PeftModel with an aLoRA adapter"
        return
    for adapter in peft.active_adapters:
        config = peft.peft_config[adapter]
        if config.peft_type != PeftType.LORA:
            yield f"adapter {adapter!r} is {config.peft_type}: only aLoRA leaves the prefix alone"
        elif not invocation_of(config):
            yield (
                f"adapter {adapter!r} is a plain LoRA (no alora_invocation_tokens): it acts on the "
                "prefix too"
            )
    if len(peft.active_adapters) > 1:
        yield f"{len(peft.active_adapters)} adapters are active; activate one"
    merged = sorted({name for m in peft.modules() for name in getattr(m, "merged_adapters", ())})
    if merged:
        yield (
            f"adapter {', '.join(map(repr, merged))} is merged into the base, and the pass over "
            "the prefix, which runs without adapters, would take it out again; call unmerge_adapter"
        )
    yield from _trainable(peft)
    yield from _architecture(peft)
    yield from _randomness(peft)
    yield from _checkpointing(peft)
    for key, value in inputs.items():
        if value is not None and key not in ("use_cache", "return_dict"):
            yield f"the batch holds {key!r}, which the prefix pass would not see"


def _trainable(peft: Any) -> Iterator[str]:
    other = [
        name for name, p in peft.named_parameters() if p.requires_grad and not is_adapter(name)
    ]
    if other:
        yield (
            f"{len(other)} trainable parameters outside of the adapter can reach the prefix, e.g. "
            f"{other[0]}"
        )
    plain = sorted(
        adapter for adapter, config in peft.peft_config.items() if not invocation_of(config)
    )
    for adapter in plain:
        part = f".{adapter}."
        if adapter not in peft.active_adapters and any(
            p.requires_grad and part in name and is_adapter(name)
            for name, p in peft.named_parameters()
        ):
            yield f"plain LoRA adapter {adapter!r} is trainable"


def _architecture(peft: Any) -> Iterator[str]:
    base = peft.get_base_model()
    text = text_config(peft)
    unsuited = why_unsuited(base)
    if unsuited is not None:
        yield unsuited
    elif getattr(text, "use_bidirectional_attention", None) not in (None, False):
        yield "attention is bidirectional: the prefix sees the suffix"
    yield from _cache(peft)
    if getattr(text, "output_router_logits", False):
        yield (
            "output_router_logits is on: the router's auxiliary loss is taken over the prefix too "
            "(set it to False)"
        )
    serves = getattr(base, "_supports_default_dynamic_cache", None)
    if getattr(base, "_is_stateful", False) or (serves is not None and not serves()):
        yield f"{type(base).__name__} carries a recurrent state"
    if text.model_type in _OWN_WAYS:
        yield f"{type(base).__name__} {_OWN_WAYS[text.model_type]}"
    if getattr(text, "cross_attention_layers", None):
        yield "some layers attend to the states of another model (cross_attention_layers)"
    for module in base.modules():
        if hasattr(type(module), "create_position_ids_from_inputs_embeds"):
            yield f"{type(module).__name__} counts positions from its padding index, not from 0"
            break
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        yield "ALiBi biases are made from the attention mask of one pass"
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for kind in _rope_types(rope):
        if kind in _NO_RESTART:
            yield f"RoPE of type {kind!r} depends on the total length of the row"
    try:
        attention_windows(peft)
    except PrefixError as problem:
        yield str(problem)
    attention = getattr(text, "_attn_implementation", "sdpa")
    if attention not in _TESTED_ATTENTION:
        yield (
            f"attention implementation {attention!r} is not tested with a lent prefix; use one of "
            f"{', '.join(_TESTED_ATTENTION)}"
        )


def _cache(peft: Any) -> Iterator[str]:
    """Problems with the cache: the forward takes none, or an adapted layer reads all of it."""
    base = peft.get_base_model()
    name = type(base).__name__
    parameters = inspect.signature(type(base).forward).parameters
    taken = parameters.get("cache", parameters.get("past_key_values"))
    if taken is None:
        yield f"the forward of {name} takes no KV cache (cache or past_key_values)"
    elif "dict" in str(taken.annotation):
        yield f"{name} keeps a cache of its own kind, a {taken.annotation}"
    foreign = [
        path
        for path, layer in base.named_modules()
        if any(adapter in getattr(layer, "lora_A", {}) for adapter in peft.active_adapters)
        and not is_adopted(layer)
        and reads_cache(base, path)
    ]
    if foreign:
        yield (
            f"the adapter sits on {foreign[0]} ({len(foreign)} such layers), which {name} runs "
            "over its whole cache: PEFT's activated LoRA would take the prefix in it for the "
            "suffix. Call alora_kernels.accelerate(model), or leave it out of target_modules"
        )


def _rope_types(rope: Any) -> Iterator[str]:
    if isinstance(rope, Mapping):
        for key in ("rope_type", "type"):
            if isinstance(rope.get(key), str):
                yield rope[key]
                break
        for value in rope.values():
            yield from _rope_types(value)


def _randomness(peft: Any) -> Iterator[str]:
    if not peft.training:
        return
    text = text_config(peft)
    for name in _DROPOUTS:
        rate = getattr(text, name, None)
        if isinstance(rate, (int, float)) and not math.isclose(rate, 0.0):
            yield f"the base model is random in training ({name}={rate}); set it to 0"
    for name, module in peft.named_modules():
        if (
            isinstance(module, nn.modules.dropout._DropoutNd)
            and module.p > 0
            and module.training
            and "lora_dropout" not in name
        ):
            yield f"the base model drops activations in training ({name}, p={module.p})"
            break
    embeddings = peft.get_input_embeddings()
    if getattr(embeddings, "neftune_noise_alpha", None) is not None:
        yield "NEFTune adds noise to the prefix's embeddings"


def _checkpointing(peft: Any) -> Iterator[str]:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

    if not (peft.training and torch.is_grad_enabled()):
        return
    if any(isinstance(m, CheckpointWrapper) for m in peft.modules()):
        yield (
            "torch's checkpoint_wrapper (FSDP's activation_checkpointing) recomputes layers after "
            "PEFT has switched the adapter off; use the model's own gradient_checkpointing"
        )
    on = any(getattr(m, "gradient_checkpointing", False) for m in peft.modules())
    if not on:
        return
    accelerated = any(is_adopted(m) for m in peft.modules())
    # enable_input_require_grads sets a forward hook on the input embeddings.
    inputs_have_gradients = bool(peft.get_input_embeddings()._forward_hooks)
    if hooks_run_again() and not accelerated and not inputs_have_gradients:
        yield (
            "PEFT switches the adapter off before the first checkpointed layer runs again in this "
            "transformers; call model.enable_input_require_grads(), or accelerate(model)"
        )
    if not checkpointed_layers(peft):
        import transformers

        yield (
            f"{type(peft.get_base_model()).__name__} takes the cache away under gradient "
            f"checkpointing in transformers {transformers.__version__} (its layers are no "
            "GradientCheckpointingLayer with a cache among their arguments); turn checkpointing off"
        )
