"""Touched place: the keys of cached blocks.

A block of a LoRA request is keyed by its tokens, its predecessor and the adapter. Before its
invocation an aLoRA request has the base model's keys and values, so these blocks lose the adapter
from their key. Salt, images and embeddings stay in it. Blocks from the start on keep the adapter's
name and path; the plugin adds a digest, which differs for other files at the same path.

vLLM's own hasher does the work. It sees the request twice: first as a base request that ends at the
start, then as the LoRA request that it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from . import invocation
from .patch import Touch, wrap

UPDATE = Touch(
    "vllm.v1.request.Request.update_block_hashes",
    "(self)",
    "blocks before the invocation are the base model's and are shared with it",
)
# The first is replaced. The plugin relies on the others as they are.
TOUCHED: tuple[Touch, ...] = (
    UPDATE,
    Touch(
        "vllm.v1.core.kv_cache_utils.get_request_block_hasher",
        "(hash_block_size, caching_hash_fn)",
        "hashes what a request shows of itself",
    ),
    Touch(
        "vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys",
        "(request, start_token_idx, end_token_idx, start_mm_idx)",
        "takes the adapter, salt, images and embeddings from the request",
    ),
    Touch(
        "vllm.v1.core.kv_cache_utils._gen_lora_extra_hash_keys",
        "(request)",
        "takes name and path of the adapter",
    ),
)


def install() -> None:
    """Replaces the method that appends new hashes. Base requests take the same steps as before."""
    wrap(UPDATE, _updating)


def _updating(function: Callable[[Any], None]) -> Callable[[Any], None]:
    def update_block_hashes(self: Any) -> None:
        hasher = self._block_hasher
        if hasher is None:
            return
        if self.lora_request is None:
            self.block_hashes.extend(hasher(self))
        else:
            extend(self, hasher)

    return update_block_hashes


class _View:
    """A request as the hasher is to see it: another adapter, and perhaps fewer tokens."""

    def __init__(self, request: Any, lora_request: Any, num_tokens: int) -> None:
        self._request = request
        self.lora_request = lora_request
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def extend(request: Any, hasher: Callable[[Any], list[Any]]) -> None:
    """Appends the hashes of a LoRA request's new full blocks."""
    found = invocation.of(request.sampling_params)
    if found is None:
        request.block_hashes.extend(hasher(request))
        return
    total = request.num_tokens
    before = _View(request, None, min(total, found.start))
    request.block_hashes.extend(hasher(before))
    lora = request.lora_request
    named = SimpleNamespace(
        lora_name=lora.lora_name, lora_path=f"{lora.lora_path}\naLoRA {found.identity}"
    )
    request.block_hashes.extend(hasher(_View(request, named, total)))
