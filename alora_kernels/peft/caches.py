"""Reads KV caches of every kind: finds one among arguments, asks its length, compares its bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

# The names of the argument that holds a cache, in the models of transformers.
NAMES = (
    "cache",
    "past_key_values",
    "cache_params",
    "state",
    "past_buckets_states",
    "mems",
    "layer_past",
    "past",
)
CHANNELS = 4  # channels of the first head; their bits stand for a token
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def among(values: Mapping[str, Any]) -> Any:
    """The cache among named arguments or outputs; None if there is none."""
    for name in NAMES:
        if values.get(name) is not None:
            return values[name]
    for value in values.values():
        if _is_cache(value):
            return value
    return None


def of_output(output: Any) -> Any:
    """The cache that a forward returned; None if it returned none."""
    if isinstance(output, dict):
        return among(output)
    if isinstance(output, tuple):
        return next((value for value in output if _is_cache(value)), None)
    return None


def _is_cache(value: Any) -> bool:
    return isinstance(value, Cache) or hasattr(value, "get_seq_length")


def carrier_of(cache: Any) -> Any:
    """The object on which an attribute for `cache` can be set (a list or tuple takes none)."""
    cache = getattr(cache, "self_attention_cache", cache)
    while isinstance(cache, list | tuple) and cache:
        cache = cache[0]
    return cache


def length_of(cache: Any) -> int | Tensor | None:
    """Tokens in the cache: an int, a tensor if it is counted on the device, None if unknown."""
    if cache is None:
        return 0
    if isinstance(cache, list | tuple):
        if not cache:
            return 0
        keys = cache[0][0] if isinstance(cache[0], list | tuple) and cache[0] else None
        return keys.shape[-2] if isinstance(keys, Tensor) and keys.dim() == 4 else None
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if layers and not any(hasattr(layer, "get_seq_length") for layer in layers):
        return None if any(_has_state(layer) for layer in layers) else 0
    ask = getattr(cache, "get_seq_length", None)
    length = None if ask is None else ask()
    return length if isinstance(length, int | Tensor) else None


def _has_state(layer: Any) -> bool:
    """Whether a recurrent layer has read something."""
    known = getattr(layer, "has_previous_state", False)
    return any(known.values()) if isinstance(known, dict) else bool(known)


def fingerprint(cache: Any, count: int) -> Tensor | None:
    """Bits of what the cache holds for its last tokens, `[B, n, C]` with n ≤ `count`.

    The bits come from a few channels of the keys and values, in the last layer that keeps every
    token. Recurrent layers keep no tokens: there the bits are a few elements of the state (n = 1).
    Two caches with the same bits hold the same rows. None if the bits cannot be read.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    if isinstance(cache, list | tuple):
        last = cache[-1] if cache else None
        if isinstance(last, list | tuple):
            return _of_tokens(last[0], last[1], None, count) if len(last) > 1 else None
        return _of_states(cache)
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        return _of_parts(cache, count)
    attention = [layer for layer in layers if isinstance(getattr(layer, "keys", None), Tensor)]
    whole = [layer for layer in attention if not getattr(layer, "is_sliding", False)] or attention
    if not whole:
        recurrent = [layer for layer in layers if _has_state(layer)]
        if not recurrent:
            return None
        states = (getattr(recurrent[-1], name, {}) for name in ("conv_states", "recurrent_states"))
        return _of_states([t for s in states if isinstance(s, dict) for t in s.values()])
    layer = whole[-1]
    keys, values = layer.keys, layer.values
    quantised = getattr(layer, "_quantized_keys", None)
    if quantised is not None:  # only 8-bit floats keep old bits: other kinds quantise them again
        if not (isinstance(quantised, tuple) and isinstance(quantised[0], Tensor)):
            return None
        keys, values = quantised[0], layer._quantized_values[0]
    filled = None
    if hasattr(layer, "max_cache_len"):
        filled = getattr(layer, "cumulative_length_int", None)
        filled = getattr(layer, "cumulative_length", None) if filled is None else filled
        filled = layer.get_seq_length() if filled is None else filled
    return _of_tokens(keys, values, filled, count)


def _of_tokens(keys: Any, values: Any, filled: int | Tensor | None, count: int) -> Tensor | None:
    """Bits of keys and values `[B, H, S, D]`; `filled` of the S places are in use (None = all)."""
    if not (isinstance(keys, Tensor) and keys.dim() == 4 and keys.numel()):
        return None
    if keys.device.type == "meta":
        return None
    size = keys.shape[2]
    pair = [keys]
    if isinstance(values, Tensor) and values.shape[:3] == keys.shape[:3]:
        pair += [values] if values.dtype == keys.dtype else []
    if isinstance(filled, Tensor):
        count = min(count, size)
        place = filled.to(keys.device) - count + torch.arange(count, device=keys.device)
        parts = [t[:, 0, :, :CHANNELS].index_select(1, place.clamp(min=0)) for t in pair]
    else:
        end = size if filled is None else min(filled, size)
        parts = [t[:, 0, max(end - count, 0) : end, :CHANNELS] for t in pair]
    return _bits(parts)


def _of_parts(cache: Any, count: int) -> Tensor | None:
    """Bits of a recurrent model's cache in transformers 4.57: lists of tensors, one per layer."""
    conv = getattr(cache, "conv_states", None)
    keys: list[Tensor] = getattr(cache, "key_cache", [])
    if not isinstance(conv, list | Tensor):
        return None
    for place in range(len(keys) - 1, -1, -1):
        if keys[place].dim() == 4:
            return _of_tokens(keys[place], cache.value_cache[place], None, count)
    states: list[Any] = [conv, getattr(cache, "ssm_states", ())]
    return _of_states([by_layer[-1] for by_layer in states if len(by_layer)])


def _of_states(states: Sequence[Any]) -> Tensor | None:
    rows = [t.detach().flatten(1) for t in states if isinstance(t, Tensor) and t.dim() > 1]
    rows = [t for t in rows if t.shape[1] and t.dtype == rows[0].dtype]
    if not rows or rows[0].device.type == "meta":
        return None
    step = 4 * CHANNELS
    return _bits([t[:, :: max(1, t.shape[1] // step)][:, None, :step] for t in rows])


def _bits(parts: list[Tensor]) -> Tensor:
    joined = torch.cat([part.detach() for part in parts], -1)
    return joined.view(BITS[joined.element_size()])
