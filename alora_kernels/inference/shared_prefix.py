"""Attention of many rows over one prefix that is stored once.

Every row's queries attend to the prefix `[1, H, P, D]` in one product and to the row's own suffix
in another; the two are merged by their log-sum-exp:

    out = Σ_i exp(lse_i − lse) out_i,   lse = log Σ_i exp(lse_i)

Registered through transformers' `AttentionInterface` under a name of its own. Outside
`attending(...)` the function hands over to the implementation that the model had before.
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
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..peft.stream import projects_cache

NAME = "alora_shared_prefix"
# Scores of one product are held in float32: at most this many, 64 MiB.
MAX_SCORES = 1 << 24
# Arguments that change the formula; a layer that passes one is not served.
_FOREIGN = ("softcap", "s_aux", "position_bias", "sinks")


class SharedPrefixError(RuntimeError):
    """The model's attention is not the one that shares a prefix."""


def shared_prefix_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    prefix_mask: Tensor | None = None,
    suffix_mask: Tensor | None = None,
) -> Tensor:
    """softmax(scaling · q [K_prefix; K_suffix]ᵀ) [V_prefix; V_suffix], the prefix stored once.

    Args:
        query: `[B, H·G, Q, D]`; G query heads share a key head.
        prefix_key, prefix_value: `[1, H, P, D]`.
        key, value: `[B, H, S, D]`, the rows' own.
        scaling: of the scores.
        prefix_mask: bool `[B, Q, P]`, true where a query sees a prefix token; None: everywhere.
        suffix_mask: bool `[B, Q, S]`.

    Returns:
        `[B, H·G, Q, D]` in query's dtype. Softmax in float32 (float64 for float64).
    """
    batch, heads, queries, depth = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    # [B, H, G·Q, D]: the queries that share a key head are rows of one product.
    rows = query.reshape(batch, kv_heads, group * queries, depth)
    # All rows of the batch at once: [H, B·G·Q, D] against [H, P, D].
    joined = rows.transpose(0, 1).reshape(kv_heads, batch * group * queries, depth)
    mask = None
    if prefix_mask is not None:
        mask = prefix_mask.unsqueeze(1).expand(-1, group, -1, -1)
        mask = mask.reshape(1, batch * group * queries, -1)
    out_p, lse_p = _attend(joined, prefix_key[0], prefix_value[0], scaling, mask)
    out_p = out_p.view(kv_heads, batch, group * queries, -1).transpose(0, 1)
    lse_p = lse_p.view(kv_heads, batch, group * queries).transpose(0, 1)
    if suffix_mask is not None:
        suffix_mask = suffix_mask.unsqueeze(1).expand(-1, group, -1, -1)
        suffix_mask = suffix_mask.reshape(batch, 1, group * queries, -1)
    out_s, lse_s = _attend(rows, key, value, scaling, suffix_mask)
    # A side that sees nothing has −inf; a query that sees nothing at all (padding) gets zeros.
    top = torch.maximum(lse_p, lse_s)
    top = torch.where(top.isinf(), torch.zeros_like(top), top)
    weight_p, weight_s = (lse_p - top).exp().unsqueeze(-1), (lse_s - top).exp().unsqueeze(-1)
    total = (weight_p + weight_s).clamp_min(torch.finfo(weight_p.dtype).tiny)
    out = (out_p * weight_p + out_s * weight_s) / total
    return out.to(query.dtype).reshape(batch, heads, queries, -1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, `[..., T, D]` and `[..., T]`, both in at least float32."""
    rows = query.shape[-2]
    step = max(1, MAX_SCORES // max(1, query.shape[:-2].numel() * key.shape[-2]))
    outs, sums = [], []
    for begin in range(0, rows, step):
        part = query[..., begin : begin + step, :]
        scores = torch.matmul(part, key.transpose(-1, -2))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scaling)
        if mask is not None:
            scores.masked_fill_(~mask[..., begin : begin + step, :], -torch.inf)
        if key.shape[-2] == 0:
            top = scores.new_zeros(*scores.shape[:-1], 1)
        else:
            top = scores.amax(-1, keepdim=True)
            top = torch.where(top.isinf(), torch.zeros_like(top), top)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        out = torch.matmul(weights.to(value.dtype), value).to(weights.dtype)
        outs.append(out / total.clamp_min(torch.finfo(total.dtype).tiny))
        sums.append((total.log() + top).squeeze(-1))
    if len(outs) == 1:
        return outs[0], sums[0]
    return torch.cat(outs, -2), torch.cat(sums, -1)


class _SharedLayer(CacheLayerMixin):
    """One layer: the base's prefix, never written, and the rows' own suffixes."""

    is_compileable = False
    is_sliding = False

    def __init__(self, layer: Any, length: int) -> None:
        super().__init__()
        self.prefix_key, self.prefix_value = layer.keys, layer.values
        self.length = length
        sliding = isinstance(layer, DynamicSlidingWindowLayer)
        self.window: int | None = layer.sliding_window if sliding else None
        self.is_initialized = True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    @property
    def suffix_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values = key_states, value_states
        else:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length + self.suffix_length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        if isinstance(query_length, Tensor):  # transformers 4 passes the positions
            query_length = query_length.shape[0]
        return self.suffix_length + query_length, self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5


class SharedPrefixCache(Cache):
    """A base cache of one row, lent to many rows that each append their own tokens.

    Args:
        base: a cache of dynamic layers with batch size 1. It is not written.
        padding: int64 `[B]`, how many tokens of each row's suffix are padding, all at its front.
    """

    def __init__(self, base: Cache, padding: Tensor) -> None:
        length = base.get_seq_length()
        super().__init__(layers=[_SharedLayer(layer, length) for layer in base.layers])
        self.length, self.padding = length, padding

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Any:
        """The attention of one layer over prefix and suffix, `[B, Q, H·G, D]`."""
        layer = self.layers[module.layer_idx]
        if key is not layer.keys:
            raise SharedPrefixError(
                f"{type(module).__name__} changes the keys between the cache and the attention"
            )
        suffix, queries = key.shape[-2], query.shape[-2]
        column = torch.arange(suffix, device=query.device)
        row = column[suffix - queries :]
        distance = row[:, None] - column  # [Q, S]
        seen = (distance >= 0) & (column >= self.padding[:, None, None])
        prefix_mask = None
        if layer.window is not None:
            seen = seen & (distance < layer.window)
            stored = layer.prefix_key.shape[-2]
            # A query at position p sees the keys after p − window.
            first = self.length - stored
            if self.length + suffix - first > layer.window:
                position = self.length + row - self.padding[:, None]  # [B, Q]
                held = torch.arange(first, self.length, device=query.device)
                prefix_mask = held > (position - layer.window).unsqueeze(-1)
        out = shared_prefix_attention(
            query,
            layer.prefix_key,
            layer.prefix_value,
            key,
            value,
            scaling,
            prefix_mask,
            seen.expand(query.shape[0], -1, -1),
        )
        return out.transpose(1, 2).contiguous()


_current: contextvars.ContextVar[SharedPrefixCache | None] = contextvars.ContextVar(
    "alora_shared_prefix", default=None
)
_lock = threading.Lock()
_users: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()


def sharing_problem(model: Any, cache: Cache) -> str | None:
    """Why `model` cannot share the prefix in `cache`, or None."""
    config = model.config.get_text_config(decoder=True)
    base = _original(config._attn_implementation)
    if base not in ("sdpa", "eager"):
        return f"its attention implementation is {base!r}, not sdpa or eager"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not take its attention from AttentionInterface"
    if any(kind.__name__ == "DummyLayer" for layer in cache.layers for kind in type(layer).__mro__):
        return "some layers read the keys of others"
    projected = projects_cache(model)
    if projected is not None:
        return f"{projected} projects what its cache returns"
    if len({getattr(layer, "keys", None) is None for layer in cache.layers}) != 1:
        return "some layers hold no keys"
    for name in ("attn_logit_softcapping", "attention_chunk_size", "use_bidirectional_attention"):
        if getattr(config, name, None):
            return f"its config sets {name}"
    if getattr(config, "is_causal", True) is False:
        return "its attention is bidirectional"
    return None


@contextmanager
def attending(model: Any, cache: SharedPrefixCache) -> Iterator[None]:
    """Within the block `model`'s attention layers, in this thread, read `cache`'s prefix."""
    _enter(model)
    token = _current.set(cache)
    try:
        yield
    finally:
        _current.reset(token)
        _leave(model)


def _original(implementation: str | None) -> str | None:
    if implementation and implementation.startswith(NAME):
        return implementation.removeprefix(NAME + "_")
    return implementation


def _enter(model: Any) -> None:
    """The first of several concurrent users switches the attention; to others it changes nothing:
    masks and, outside `attending`, results are those of the implementation before."""
    with _lock:
        state = _users.setdefault(model, [0, None])
        if state[0] == 0:
            config = model.config.get_text_config(decoder=True)
            state[1] = config._attn_implementation
            name = f"{NAME}_{state[1]}"
            AttentionInterface.register(name, _FORWARDS[state[1]])
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[state[1]])
            model.set_attn_implementation(name)
        state[0] += 1


def _leave(model: Any) -> None:
    with _lock:
        state = _users[model]
        state[0] -= 1
        if state[0] == 0:
            model.set_attn_implementation(state[1])
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
        foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
        if foreign:
            raise SharedPrefixError(f"{type(module).__name__} uses {', '.join(foreign)}")
        if kwargs.get("output_attentions"):
            raise SharedPrefixError("output_attentions is not available over a shared prefix")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        # transformers' mask counts cache slots, where padding shifts a row's window: not used.
        return cache.attend(module, query, key, value, scale), None

    return forward


def _implementation(name: str, module: Any) -> Any:
    """The attention that `module` would have called. Eager is a function of its own file."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


_FORWARDS = {name: _forward(name) for name in ("sdpa", "eager")}
