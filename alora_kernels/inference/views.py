"""Views of a base cache: new layer objects over the same tensors.

transformers' dynamic layers never write into a stored tensor: `update` concatenates, and stores the
result. So a view grows by itself, and the base keeps what it had, bit for bit. `crop` is not used:
a sliding layer cannot give back what has left its window.
"""

from __future__ import annotations

import copy
from typing import Any

import transformers
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

# These layers replace their tensors and never write to them: a shallow copy is a view.
_VIEWED = (DynamicLayer, DynamicSlidingWindowLayer)
# These layers write in place, but their whole state is tensors: a deep copy is a snapshot. They are
# found by name, because older versions of transformers lack some.
_SNAPSHOT = tuple(
    getattr(cache_utils, name)
    for name in ("StaticLayer", "LinearAttentionCacheLayerMixin", "DummyLayer")
    if hasattr(cache_utils, name)
)
# By config.model_type: models that cannot continue what a session has read, and why.
_OWN_WAYS = {
    "prophetnet": "takes one token at a time with a cache, so no context can be read into it",
    "kosmos-2.5": "counts positions from its padding index, otherwise than it does in a session",
}
_REFUSED = {
    "BaseQuantizedLayer": "its residual buffer and its quantised store change together",
    "QuantizedLayer": "its residual buffer and its quantised store change together",
}


class CacheError(TypeError):
    """This kind of cache cannot serve several calls."""


def view_of(cache: Cache) -> Cache:
    """A cache that reads what `cache` holds, and can grow without changing it.

    Dynamic layers (full and sliding) are shared, static and recurrent ones are copied.

    Raises:
        CacheError: a quantised, offloaded, encoder-decoder or unknown cache; says which and why.
    """
    check_cache(cache)
    view = copy.copy(cache)
    view.layers = [_view_layer(layer) for layer in cache.layers]
    return view


def check_cache(cache: Cache) -> None:
    """Refuse a cache that `view_of` cannot serve."""
    if not isinstance(cache, Cache):
        raise CacheError(f"expected a transformers Cache, got {type(cache).__name__}")
    if not hasattr(cache, "layers"):
        raise CacheError(
            f"{type(cache).__name__} has no layers of its own (an encoder-decoder cache): "
            "a session serves decoder-only models"
        )
    if getattr(cache, "offloading", False):
        raise CacheError(
            f"{type(cache).__name__} is offloaded: its layers move between devices while the model "
            "runs, so calls cannot share them. Use DynamicCache(config=model.config)"
        )
    if cache.layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        raise CacheError(
            f"every layer of the cache is recurrent ({type(cache.layers[0]).__name__}), so it does "
            "not know how many tokens it has read; a session needs a layer of attention"
        )
    for i, layer in enumerate(cache.layers):
        for kind in type(layer).__mro__:
            if kind.__name__ in _REFUSED:
                raise CacheError(
                    f"layer {i} of the cache is a {type(layer).__name__}: "
                    f"{_REFUSED[kind.__name__]}, so calls cannot share it. "
                    "Use DynamicCache(config=model.config)"
                )
        if type(layer) not in _VIEWED and not isinstance(layer, _SNAPSHOT):
            raise CacheError(
                f"layer {i} of the cache is a {type(layer).__name__}, which is not known to leave "
                "its tensors unwritten. Use DynamicCache(config=model.config)"
            )


def check_model(model: Any) -> None:
    """Refuse a model that does not keep all of its state in transformers' DynamicCache.

    Raises:
        CacheError: names the model, and the version of transformers: in version 5 some models
            moved to DynamicCache.
    """
    reason = _OWN_WAYS.get(str(getattr(model.config, "model_type", None)))
    if reason is not None:
        raise CacheError(f"{type(model).__name__} {reason}")
    serves = getattr(model, "_supports_default_dynamic_cache", None)
    if serves is not None and not serves():
        raise CacheError(
            f"{type(model).__name__} does not keep what it has read in a DynamicCache in "
            f"transformers {transformers.__version__}, so calls cannot share it"
        )


def shared_layers(cache: Cache) -> bool:
    """Whether every layer is a plain dynamic one, full or sliding."""
    return all(type(layer) in _VIEWED for layer in cache.layers)


def is_recurrent(cache: Cache) -> bool:
    """Whether the state of some layer can be continued by one token at a time only.

    Seen on transformers 5.24 (Bamba): with several tokens at once it began with an empty state.
    """
    kind = getattr(cache_utils, "LinearAttentionCacheLayerMixin", None)
    return kind is not None and any(isinstance(layer, kind) for layer in cache.layers)


def check_states(cache: Cache, model: Any) -> None:
    """Refuse a model whose recurrent layers leave their part of the cache empty when they read.

    Raises:
        CacheError: seen on transformers 5.24 (RecurrentGemma keeps its state in its modules).
    """
    kind = getattr(cache_utils, "LinearAttentionCacheLayerMixin", None)
    for i, layer in enumerate(cache.layers):
        if kind is not None and isinstance(layer, kind) and not _tensors_in(vars(layer)):
            raise CacheError(
                f"{type(model).__name__} keeps the state of its recurrent layers outside of the "
                f"cache (layer {i} of it is empty after reading), so calls cannot share it"
            )


def tensors_of(cache: Cache) -> list[Tensor]:
    """Every tensor that a cache's layers hold, in a fixed order."""
    return [tensor for layer in cache.layers for tensor in _tensors_in(vars(layer))]


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors_in(item)]
    return []


def _view_layer(layer: Any) -> Any:
    return copy.copy(layer) if type(layer) in _VIEWED else copy.deepcopy(layer)
