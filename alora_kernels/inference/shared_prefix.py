"""Attention of many rows over one prefix that is stored once.

Every row's queries attend to the prefix `[1, H, P, D]` in one product and to the row's own suffix
in another; the two are merged by their log-sum-exp:

    out = Σ_i exp(lse_i − lse) out_i,   lse = log Σ_i exp(lse_i)

`SharedPrefixCache` holds the prefix for a model whose attention `attending` has switched over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

# How many scores of one product are held at once: 64 MiB in float32.
MAX_SCORES = 1 << 24
# How much of the prefix the comparison with the model's own attention reads.
_COMPARED_TOKENS = 256


class SharedPrefixError(RuntimeError):
    """The model's attention is not the one that can share a prefix."""


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
    # Where a query sees nothing of one side, that side's sum is −inf. A query that sees nothing at
    # all (padding) gets zeros.
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
    """One layer: the prefix of the base cache, never written, and the suffix of each row."""

    is_compileable = False

    def __init__(self, layer: Any, length: int) -> None:
        super().__init__()
        self.prefix_key, self.prefix_value = layer.keys, layer.values
        self.length = length
        self.is_sliding = isinstance(layer, DynamicSlidingWindowLayer)
        self.window: int | None = layer.sliding_window if self.is_sliding else None
        self.is_initialized = True
        self.unread = False  # written, and not read by `attend` since
        self.compared = False  # by `_compare`, with the model's own attention

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    @property
    def stored(self) -> int:
        """How many tokens of the prefix are kept."""
        return int(self.prefix_key.shape[-2])

    @property
    def suffix_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.check_read()
        if self.keys is None or self.values is None:
            self.keys, self.values = key_states, value_states
        else:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        self.unread = True
        return self.keys, self.values

    def check_read(self) -> None:
        """Raise if the last forward did not read this layer through `attend`."""
        if self.unread:
            raise SharedPrefixError("some layers do not take their attention from the interface")

    def get_seq_length(self) -> int:
        return self.length + self.suffix_length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        if isinstance(query_length, Tensor):  # transformers 4 passes positions
            query_length = query_length.shape[0]
        return self.stored + self.suffix_length + query_length, self.length - self.stored

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5


class SharedPrefixCache(Cache):
    """A base cache of one row, lent to many rows that each append their own tokens.

    It takes nothing about the model on trust. Each layer must read the very keys and values that it
    put here. The model's mask must be the one that the positions give. And in the first forward the
    model's own attention must give the same result.

    Args:
        base: a cache of dynamic layers with batch size 1. It is not written.
        padding: int64 `[B]`, how many tokens of each row's suffix are padding, all at its front.
    """

    def __init__(self, base: Cache, padding: Tensor) -> None:
        length = base.get_seq_length()
        super().__init__(layers=[_SharedLayer(layer, length) for layer in base.layers])
        self.length, self.padding = length, padding
        self._masks: dict[Any, tuple[Tensor, tuple[Tensor | None, Tensor]]] = {}
        self._masks_of = -1

    def check_read(self) -> None:
        """Raise if the last forward did not read some layer through `attend`."""
        layers: list[Any] = self.layers
        for layer in layers:
            layer.check_read()

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        own: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The attention of one layer over prefix and suffix, `[B, Q, H·G, D]`.

        Args:
            mask: bool `[B, 1, Q, stored + suffix]`, as the model has made it for this cache.
            own: the attention that the model has without a shared prefix. Its arguments are query,
                key, value and a bool mask.

        Raises:
            SharedPrefixError: the model's attention is not this one.
        """
        layer = self._layer_of(module, key, value)
        prefix_mask, suffix_mask = self._masks_for(module, layer, mask, query.shape[-2])
        if not layer.compared:
            assert mask is not None
            self._compare(module, layer, query, mask, scaling, own)
            layer.compared = True
        layer.unread = False
        out = shared_prefix_attention(
            query,
            layer.prefix_key,
            layer.prefix_value,
            key,
            value,
            scaling,
            prefix_mask,
            suffix_mask,
        )
        return out.transpose(1, 2).contiguous()

    def _layer_of(self, module: Any, key: Tensor, value: Tensor) -> Any:
        kind = type(module).__name__
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not 0 <= index < len(self.layers):
            raise SharedPrefixError(f"{kind} does not say which layer of the cache it reads")
        layer: Any = self.layers[index]
        for what, given, kept in (
            ("keys", key, layer.keys),
            ("values", value, layer.values),
        ):
            if given is not kept:
                raise SharedPrefixError(
                    f"{kind} changes the {what} between the cache and the attention"
                )
        return layer

    def _masks_for(
        self, module: Any, layer: Any, mask: Tensor | None, queries: int
    ) -> tuple[Tensor | None, Tensor]:
        """Which tokens of the prefix and of the suffix each query sees, by their positions.

        The model's mask counts places in the cache, and padding moves a row's tokens to later
        places. So the masks are computed here, and the model's mask must be the one that its places
        give.
        """
        suffix = layer.suffix_length
        if self._masks_of != suffix:  # the masks are another forward's
            self._masks, self._masks_of = {}, suffix
        name = (id(mask), layer.stored, layer.window)
        if name in self._masks:
            return self._masks[name][1]
        rows = self.padding.shape[0]
        shape = (queries, layer.stored + suffix)
        if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
            raise SharedPrefixError(f"{type(module).__name__} makes a mask of its own")
        if mask.shape[-2:] != shape or mask.shape[0] not in (1, rows):
            raise SharedPrefixError(
                f"{type(module).__name__} has a mask of shape {tuple(mask.shape)}, not "
                f"{(rows, 1, *shape)}"
            )
        device = mask.device
        place = torch.arange(self.length - layer.stored, self.length + suffix, device=device)
        query = place[-queries:]
        distance = query[:, None] - place
        first = (self.length + self.padding)[:, None, None]  # place of a row's first own token
        seen = (distance >= 0) & ((place < self.length) | (place >= first))
        if layer.window is not None:
            seen = seen & (distance < layer.window)
        real = query[:, None] >= first  # the others are padding, whose results nobody reads
        if not torch.equal(mask[:, 0] & real, seen & real):
            raise SharedPrefixError(
                f"{type(module).__name__} sees other tokens than those before it"
                + ("" if layer.window is None else f" within {layer.window}")
            )
        prefix_mask = None
        if layer.window is not None:
            # A query at position p sees the keys after p − window.
            position = query - self.padding[:, None]
            if layer.stored + suffix > layer.window:
                after = (position - layer.window).unsqueeze(-1)
                prefix_mask = place[: layer.stored] > after
        found = prefix_mask, seen[..., layer.stored :]
        self._masks[name] = mask, found  # the mask is kept, so that no other gets its id
        return found

    def _compare(
        self,
        module: Any,
        layer: Any,
        query: Tensor,
        mask: Tensor,
        scaling: float,
        own: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        """Compare this formula with the model's own attention, on the first row's last query."""
        dtype = torch.float32 if query.device.type == "mps" else torch.float64
        begin = max(layer.stored - _COMPARED_TOKENS, 0)
        prefix_key, prefix_value = (
            t[:, :, begin:].to(dtype) for t in (layer.prefix_key, layer.prefix_value)
        )
        query, key, value = (t[:1].to(dtype) for t in (query[:, :, -1:], layer.keys, layer.values))
        mask = mask[:1, :, -1:, begin:]
        kept = layer.stored - begin
        ours = shared_prefix_attention(
            query,
            prefix_key,
            prefix_value,
            key,
            value,
            scaling,
            mask[:, 0, :, :kept],
            mask[:, 0, :, kept:],
        )
        whole = torch.cat([prefix_value, value], -2)
        try:
            theirs = own(query, torch.cat([prefix_key, key], -2), whole, mask)
            gap = (ours.transpose(1, 2) - theirs.to(dtype)).abs().max()
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise SharedPrefixError(
                f"the attention of {type(module).__name__} cannot be compared: {error}"
            ) from error
        # Some eager attentions compute the softmax in float32, whatever the dtype.
        if not bool(gap <= 1e-5 * whole.abs().max()):
            raise SharedPrefixError(
                f"{type(module).__name__} computes more than softmax(scaling · q kᵀ) v"
            )
