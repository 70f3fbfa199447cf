"""What may be shared is shared, what writes in place is copied, the rest is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from alora_kernels.inference import CacheError, view_of
from alora_kernels.inference.views import shared_layers, tensors_of

from .tiny import WINDOW, base_model, context


def filled(cache: Cache, model: object, length: int) -> Cache:
    with torch.no_grad():
        model(  # type: ignore[operator]
            input_ids=torch.tensor([context(length, 1)]), past_key_values=cache, use_cache=True
        )
    return cache


@pytest.mark.parametrize("length", [4, WINDOW - 1, WINDOW, 2 * WINDOW])
def test_a_view_shares_tensors_and_grows_alone(length: int) -> None:
    model = base_model("gemma3", 3)
    cache = filled(DynamicCache(config=model.config), model, length)
    before = [t.clone() for t in tensors_of(cache)]
    view = view_of(cache)
    assert view.layers[0].keys.data_ptr() == cache.layers[0].keys.data_ptr()
    filled(view, model, 5)
    assert view.get_seq_length() == length + 5 and cache.get_seq_length() == length
    view.batch_repeat_interleave(2)
    view.reorder_cache(torch.tensor([1, 0]))
    view.reset()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(cache)))


def test_a_static_cache_is_copied() -> None:
    model = base_model("llama", 3)
    cache = filled(StaticCache(config=model.config, max_cache_len=32), model, 6)
    before = [t.clone() for t in tensors_of(cache)]
    assert not shared_layers(cache)
    view = view_of(cache)
    assert view.layers[0].keys.data_ptr() != cache.layers[0].keys.data_ptr()
    filled(view, model, 5)
    assert int(view.get_seq_length()) == 11 and int(cache.get_seq_length()) == 6
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(cache)))


def test_other_caches_are_refused_by_name() -> None:
    model = base_model("llama", 3)
    with pytest.raises(CacheError, match="offloaded"):
        view_of(DynamicCache(config=model.config, offloading=True))
    with pytest.raises(CacheError, match="expected a transformers Cache, got tuple"):
        view_of(((), ()))  # type: ignore[arg-type]
    quantised = DynamicCache(config=model.config)

    class Four(QuantizedLayer):
        def __init__(self) -> None: ...
        def _quantize(self, tensor, axis): ...
        def _dequantize(self, q_tensor): ...

    quantised.layers[1] = Four()
    with pytest.raises(CacheError, match="layer 1 of the cache is a Four: its residual buffer"):
        view_of(quantised)

    class Odd(type(quantised.layers[0])):  # type: ignore[misc]
        pass

    unknown = DynamicCache(config=model.config)
    unknown.layers[0] = Odd()
    with pytest.raises(CacheError, match="layer 0 of the cache is a Odd, which is not known"):
        view_of(unknown)
