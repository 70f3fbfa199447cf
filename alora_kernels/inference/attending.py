"""Lets the attention layers of a model read a shared prefix, in one thread and one block of code.

It registers a function of its own through transformers' `AttentionInterface`. Outside of
`attending(...)` that function calls the attention that the model had before.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .shared_prefix import SharedPrefixCache, SharedPrefixError

NAME = "alora_shared_prefix"
# Rotary embeddings that depend on the longest row of a batch.
_BY_LONGEST_ROW = ("dynamic", "longrope")

_current: contextvars.ContextVar[SharedPrefixCache | None] = contextvars.ContextVar(
    "alora_shared_prefix", default=None
)
_lock = threading.Lock()
_users: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()


def sharing_problem(model: Any, cache: Cache, padded: bool) -> str | None:
    """Why `model` cannot share the prefix in `cache`, as far as its config tells; else None.

    Args:
        padded: the rows differ in length.
    """
    config = model.config.get_text_config(decoder=True)
    base = implementation_of(config)
    if base not in _FORWARDS:
        return f"its attention implementation is {base!r}, not sdpa or eager"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not take its attention from AttentionInterface"
    if any(kind.__name__ == "DummyLayer" for layer in cache.layers for kind in type(layer).__mro__):
        return "some layers read the keys of others"
    if hasattr(model, "peft_config"):
        from ..peft.stream import projects_cache  # a plain model needs no peft

        projected = projects_cache(model)
        if projected is not None:
            return f"{projected} projects what its cache returns"
    if any(hasattr(module, "rope_deltas") for module in model.modules()):
        return "it keeps the positions of its last batch in itself (rope_deltas)"
    if any(getattr(layer, "keys", None) is None for layer in cache.layers):
        return "some layers hold no keys"
    for name in ("attn_logit_softcapping", "attention_chunk_size", "use_bidirectional_attention"):
        if getattr(config, name, None):
            return f"its config sets {name}"
    if getattr(config, "is_causal", True) is False:
        return "its attention is bidirectional"
    if padded:
        if getattr(config, "attn_temperature_tuning", None):
            return (
                "its queries are scaled by their place in the cache, and the rows differ in length"
            )
        for kind in _rope_types(getattr(config, "rope_parameters", None) or {}):
            if kind in _BY_LONGEST_ROW:
                return f"its rotary embedding ({kind}) depends on the longest row of a batch"
    return None


@contextmanager
def attending(model: Any, cache: SharedPrefixCache) -> Iterator[None]:
    """While the block lasts, `model`'s attention layers read `cache`'s prefix in this thread."""
    _enter(model)
    token = _current.set(cache)
    try:
        yield
    finally:
        _current.reset(token)
        _leave(model)


def implementation_of(config: Any) -> str | None:
    """The name of a model's attention, or of the one before `attending` replaced it."""
    name: str | None = config._attn_implementation
    return name.removeprefix(NAME + "_") if name else name


def _rope_types(parameters: Any) -> list[str]:
    """The kinds of rotary embedding. Some models have one for each kind of layer."""
    if not isinstance(parameters, dict):
        return []
    found = [str(parameters[key]) for key in ("rope_type", "type") if key in parameters]
    return found + [kind for value in parameters.values() for kind in _rope_types(value)]


def _enter(model: Any) -> None:
    """Replace the attention, if no other thread has done so.

    Threads outside of `attending` see no change: their masks and results are those of the
    implementation before.
    """
    with _lock:
        state = _users.setdefault(model, [0, None])
        if state[0] == 0:
            config = model.config.get_text_config(decoder=True)
            state[1] = config._attn_implementation
            name = f"{NAME}_{state[1]}"
            AttentionInterface.register(name, _FORWARDS[state[1]])
            AttentionMaskInterface.register(name, _MASKS[state[1]])
            # Only the decoder's: other parts of a model may have another attention.
            config._attn_implementation = name
        state[0] += 1


def _leave(model: Any) -> None:
    with _lock:
        state = _users[model]
        state[0] -= 1
        if state[0] == 0:
            model.config.get_text_config(decoder=True)._attn_implementation = state[1]
            del _users[model]


def _forward(original: str) -> Any:
    def forward(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = _current.get()
        if cache is None:
            function = _implementation(original, module)
            return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if kwargs.get("output_attentions"):
            raise SharedPrefixError("output_attentions is not available over a shared prefix")
        if kwargs.get("dropout"):
            raise SharedPrefixError(f"{type(module).__name__} drops attention at random")

        def own(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            function = _implementation(original, module)
            if original == "eager":  # it adds its mask to the scores
                mask = query.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
            out: Tensor = function(module, query, key, value, mask, scaling=scaling, **kwargs)[0]
            return out

        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return cache.attend(module, query, key, value, attention_mask, scale, own), None

    return forward


def _mask(original: str) -> Any:
    def mask(*args: Any, **kwargs: Any) -> Any:
        if _current.get() is None:
            return ALL_MASK_ATTENTION_FUNCTIONS[original](*args, **kwargs)
        kwargs["allow_is_causal_skip"] = False  # the mask is checked, so there must be one
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    return mask


def _implementation(name: str, module: Any) -> Any:
    """The attention that `module` would have called. Eager is a function in the model's file."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


_FORWARDS = {name: _forward(name) for name in ("sdpa", "eager")}
_MASKS = {name: _mask(name) for name in _FORWARDS}
