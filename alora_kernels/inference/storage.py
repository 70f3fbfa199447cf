"""A session on disk: token ids and the base cache, in safetensors."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ..files import whole_folder
from .context import Context
from .views import shared_layers

if TYPE_CHECKING:
    from .session import Session

FORMAT = "alora_kernels.session.2"
FIRST_FORMAT = "alora_kernels.session.1"  # token ids alone, and a sample of the weights
logger = logging.getLogger("alora_kernels")
_PART = 1 << 26  # bytes of a weight that are hashed at a time
# What beside the weights decides keys and values, where a config has it.
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
# What a config says that decides nothing about them, and what stands in the settings already.
_INDIFFERENT = (
    *_DECIDING,
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("initializer_range", "use_cache", "return_dict", "tie_word_embeddings", "id2label"),
    *(
        "label2id",
        "output_hidden_states",
        "output_attentions",
        "output_router_logits",
        "problem_type",
    ),
    *(
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "quantization_config",
        "chunk_size_feed_forward",
    ),
    *("router_aux_loss_coef", "is_encoder_decoder", "model_type", "max_position_embeddings"),
)


def save_session(session: Session, folder: Path) -> Path:
    """Write `session.json` and `cache.safetensors` into a new folder, whole or not at all.

    Raises:
        FileExistsError: the folder exists and is not empty.
        TypeError: the cache holds more than keys and values (a recurrent model), or a message more
            than JSON can hold.
    """
    from safetensors.torch import save_file

    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"Session.save: {folder} is not empty; give a new folder")
    if not shared_layers(session._cache):
        kinds = sorted({type(layer).__name__ for layer in session._cache.layers})
        raise TypeError(f"Session.save: only keys and values can be saved, not {', '.join(kinds)}")
    tensors = {}
    layers: list[Any] = list(session._cache.layers)
    for i, layer in enumerate(layers):
        if layer.keys is not None:
            tensors[f"{i}.keys"] = layer.keys.contiguous()
            tensors[f"{i}.values"] = layer.values.contiguous()
    header = {
        "format": FORMAT,
        "token_ids": list(session.token_ids),
        "cached_length": session.cached_length,
        "context": _written(session._context),
        "base": {**_settings(session), "weights": _weights(session)},
        "config": _config(session),
    }
    with whole_folder(folder) as building:
        save_file(tensors, building / "cache.safetensors")
        (building / "session.json").write_text(json.dumps(header), encoding="utf8")
    return folder


def load_session(session: Session, folder: Path) -> None:
    """Fill an empty session from `folder`.

    Raises:
        ValueError: the files were written for another model, or do not fit together.
    """
    from safetensors.torch import load_file

    header = json.loads((folder / "session.json").read_text(encoding="utf8"))
    first = header.get("format") == FIRST_FORMAT
    if not first and header.get("format") != FORMAT:
        raise ValueError(
            f"Session.load: {folder} has format {header.get('format')!r}, not {FORMAT}"
        )
    weights = _sampled_weights(session) if first else _weights(session)
    here = {**_settings(session), "weights": weights}
    saved = header["base"]
    differ = [k for k in {**here, **saved} if saved.get(k) != here.get(k)]
    # Another version of transformers may know settings that the saved config does not have.
    other, config = header.get("config", {}), _config(session)
    unlike = {
        name: config[name] for name in config if other.get(name, config[name]) != config[name]
    }
    here, saved, differ = {**here, **unlike}, {**saved, **other}, [*differ, *unlike]
    if differ:
        raise ValueError(
            f"Session.load: {folder} was saved for another base model: "
            + ", ".join(f"{k} is {here.get(k)!r}, saved {saved.get(k)!r}" for k in differ)
        )
    tensors = load_file(folder / "cache.safetensors")
    cache = DynamicCache(config=session.base.config)
    length = int(header["cached_length"])
    layers: list[Any] = list(cache.layers)
    for i, layer in enumerate(layers):
        if length == 0:
            break
        keys, values = (tensors.get(f"{i}.{name}") for name in ("keys", "values"))
        window = getattr(layer, "sliding_window", None)
        stored = length if window is None else min(length, window - 1)
        if keys is None or values is None or keys.shape[-2] != stored:
            raise ValueError(f"Session.load: layer {i} in {folder} does not hold {stored} tokens")
        layer.update(keys.to(session.base.device), values.to(session.base.device))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
    ids = tuple(int(i) for i in header["token_ids"])
    if first:
        logger.warning(
            "Session.load: %s was written by an older version, which compares a sample of the "
            "weights only and keeps no messages; save the session again",
            folder,
        )
        context = Context(ids=ids, border=len(ids))
    else:
        given = header["context"]
        context = Context(**{**given, "ids": ids, "messages": tuple(given["messages"])})
    session._context, session._cache = context, cache


def _written(context: Context) -> dict[str, Any]:
    """A context without its token ids, as JSON."""
    fields = {name: value for name, value in vars(context).items() if name != "ids"}
    try:
        json.dumps(fields["messages"])
    except TypeError as error:
        raise TypeError(
            f"Session.save: a message holds what JSON cannot: {error}; give messages of text"
        ) from error
    return fields


def _settings(session: Session) -> dict[str, Any]:
    """What the keys and values depend on, beside the weights."""
    config = session.base.config.get_text_config(decoder=True)
    deciding = {name: _value(config, name) for name in _DECIDING}
    settings = {
        "model_type": session.base.config.model_type,
        "dtype": str(session.base.dtype),
        **{name: value for name, value in deciding.items() if value is not None},
        "rope": _rope(config),
    }
    return dict(json.loads(json.dumps(settings)))  # as it is read again


def _config(session: Session) -> dict[str, Any]:
    """All else that the decoder's config says, and that is not known to decide nothing."""
    config = session.base.config.get_text_config(decoder=True).to_dict()
    kept = {name: value for name, value in config.items() if name not in _INDIFFERENT}
    return dict(json.loads(json.dumps(kept, default=str)))


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # one that differs from layer to layer: the weights' shapes tell
        return None


def _weights(session: Session) -> str:
    """A hash of every byte of the base model's weights and buffers.

    Adapters do not take part, and what a PEFT model calls a layer that it has wrapped is put back.
    """
    tensors = sorted(_base_tensors(session.base), key=lambda named: named[0])
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for part in flat.split(_PART):
            digest.update(part.cpu().numpy())
    return digest.hexdigest()


def _base_tensors(base: Any) -> list[tuple[str, torch.Tensor]]:
    named = [*base.named_parameters(), *base.named_buffers()]
    return [
        (name.replace(".base_layer.", "."), tensor)
        for name, tensor in named
        if "lora_" not in name and tensor.numel()
    ]


def _sampled_weights(session: Session) -> str:
    """What the first format wrote about the weights."""
    total = 0.0
    for name, parameter in session.base.named_parameters():
        if "lora_" in name or "magnitude" in name:
            continue
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        total += float(flat[::step].double().abs().sum())
    return f"{total:.9g}"


def _rope(config: Any) -> dict[str, Any]:
    """The rotary embedding in the words of transformers 5, also from a config of version 4."""
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        scaling = getattr(config, "rope_scaling", None) or {"rope_type": "default"}
        rope = {"rope_theta": getattr(config, "rope_theta", None), **scaling}
    return dict(rope)
