"""Which base model computed a cache: everything that decides its keys and values, as plain data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

_BYTES_AT_ONCE = 1 << 26  # of a weight that is hashed
# What decides keys and values beside the weights, where a config has it.
_DECIDING = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "attention_chunk_size",
    "num_kv_shared_layers",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "use_bidirectional_attention",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "num_experts_per_tok",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
)
# What is left out of `Identity.config`: it does not change keys and values, or `Identity.settings`
# has it already.
_LEFT_OUT = (
    *_DECIDING,
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("initializer_range", "use_cache", "return_dict", "tie_word_embeddings", "id2label"),
    *("label2id", "output_hidden_states", "output_attentions", "output_router_logits"),
    *("problem_type", "rope_parameters", "rope_scaling", "rope_theta", "quantization_config"),
    *("chunk_size_feed_forward", "router_aux_loss_coef", "is_encoder_decoder", "model_type"),
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Identity:
    """What decides the keys and values of a base model. All values are those of JSON.

    Attributes:
        settings: the model's type, its dtype, the settings of its config that are known to decide,
            and "weights", a digest of its weights.
        config: all other settings of the decoder's config that may decide.
    """

    settings: dict[str, Any]
    config: dict[str, Any]

    def differences(self, saved: Identity) -> list[str]:
        """Each setting in which this model differs from a saved one, with both values.

        A name that only one of the `config`s has is no difference: another version of transformers
        may know settings that the saved config does not have.
        """
        names = {**self.settings, **saved.settings}
        differ = [k for k in names if saved.settings.get(k) != self.settings.get(k)]
        mine, theirs = self.config, saved.config
        unlike = [name for name in mine if theirs.get(name, mine[name]) != mine[name]]
        here = {**self.settings, **{name: mine[name] for name in unlike}}
        there = {**saved.settings, **theirs}
        return [f"{k} is {here.get(k)!r}, saved {there.get(k)!r}" for k in [*differ, *unlike]]


def identity_of(base: Any, *, sampled: bool = False) -> Identity:
    """The identity of a base model.

    Args:
        base: a transformers model. Adapters inside it do not take part.
        sampled: sum a sample of the weights, as sessions of the first format did, instead of
            hashing every byte of them.
    """
    config = base.config.get_text_config(decoder=True)
    deciding = {name: _value(config, name) for name in _DECIDING}
    settings = {
        "model_type": base.config.model_type,
        "dtype": str(base.dtype),
        **{name: value for name, value in deciding.items() if value is not None},
        "rope": _rope(config),
    }
    others = {name: value for name, value in config.to_dict().items() if name not in _LEFT_OUT}
    weights = sampled_weights(base) if sampled else hashed_weights(base)
    # Through JSON, so that a saved identity can be compared with one that was just read.
    return Identity(
        {**json.loads(json.dumps(settings)), "weights": weights},
        json.loads(json.dumps(others, default=str)),
    )


def hashed_weights(base: Any) -> str:
    """A hash of every byte of a base model's weights and buffers.

    Adapters do not take part, and a layer that PEFT has wrapped has the name that it had before.
    """
    tensors = sorted(_base_tensors(base), key=lambda named: named[0])
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for piece in flat.split(_BYTES_AT_ONCE):
            digest.update(piece.cpu().numpy())
    return digest.hexdigest()


def sampled_weights(base: Any) -> str:
    """A sum over a sample of the weights: what the first format kept of them."""
    total = 0.0
    for name, parameter in base.named_parameters():
        if "lora_" in name or "magnitude" in name:
            continue
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        total += float(flat[::step].double().abs().sum())
    return f"{total:.9g}"


def _base_tensors(base: Any) -> list[tuple[str, torch.Tensor]]:
    named = [*base.named_parameters(), *base.named_buffers()]
    return [
        (name.replace(".base_layer.", "."), tensor)
        for name, tensor in named
        if "lora_" not in name and tensor.numel()
    ]


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # it differs from layer to layer; then the shapes of the weights decide
        return None


def _rope(config: Any) -> dict[str, Any]:
    """The rotary embedding in the words of transformers 5, also from a config of version 4."""
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        scaling = getattr(config, "rope_scaling", None) or {"rope_type": "default"}
        rope = {"rope_theta": getattr(config, "rope_theta", None), **scaling}
    return dict(rope)
