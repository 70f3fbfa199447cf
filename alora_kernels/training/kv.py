"""Two KV caches: one collects keys and values of prefixes, the other lets suffixes read them.

transformers drops an ordinary cache under gradient checkpointing, because a layer that runs twice
would append twice. `ReadOnlyPrefix.update` concatenates and stores nothing, so a layer may run any
number of times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .guard import PrefixError

# Keys and values of one layer: [H, n, D] for a row, [B, H, n, D] for a batch.
KeyValue = tuple[Tensor, Tensor]


class LastLayerDone(Exception):
    """Raised once the last layer has stored its keys and values; nothing later is needed."""


class _Layer(CacheLayerMixin):
    """The part that both kinds of layer share: the sliding window, or None for full attention."""

    is_compileable = False
    is_sliding = False

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.sliding_window = window
        self.is_sliding = window is not None
        self.is_initialized = True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: there is no state to prepare."""

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    get_max_cache_shape = get_max_length  # the name before transformers 5

    def reset(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} cannot be reset")


def _count(query: int | Tensor) -> int:
    """The number of queries. transformers before version 5 passes their positions instead."""
    return query if isinstance(query, int) else int(query.shape[0])


class _CollectLayer(_Layer):
    """Appends chunks of right-padded prefixes. A sliding layer drops tokens that no row needs.

    Args:
        window: the sliding window, or None.
        shortest: the length of the shortest prefix in the batch. Its last window must be kept.
    """

    def __init__(self, window: int | None, shortest: int) -> None:
        super().__init__(window)
        self.shortest = shortest
        self.seen = 0  # the number of tokens so far
        self.first = 0  # position of the first token that is still stored

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        before = self.seen
        self.seen += key_states.shape[-2]
        if self.keys is None or self.values is None:
            self.keys, self.values = key_states, value_states
        else:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        keys, values = self.keys, self.values
        if self.window is None:
            return keys, values
        visible = max(before - self.window + 1, 0) - self.first
        keep = max(min(self.seen, self.shortest) - self.window + 1, 0)
        if keep > self.first:
            self.keys = keys[:, :, keep - self.first :]
            self.values = values[:, :, keep - self.first :]
            self.first = keep
        return keys[:, :, visible:], values[:, :, visible:]

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        offset = 0 if self.window is None else max(self.seen - self.window + 1, 0)
        return self.seen - offset + _count(query_length), offset

    def row(self, b: int, length: int) -> KeyValue:
        """The last `min(length, window − 1)` keys and values of row `b`, `[H, n, D]`."""
        assert self.keys is not None and self.values is not None
        start = 0 if self.window is None else max(length - self.window + 1, 0)
        span = slice(start - self.first, length - self.first)
        return self.keys[b, :, span], self.values[b, :, span]


class PrefixCollector(Cache):
    """Collects the prefix keys and values of every layer over one or more chunks.

    Args:
        windows: for each layer its sliding window, or None for full attention.
        lengths: the length of each row's prefix.
    """

    def __init__(self, windows: Sequence[int | None], lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.collected = [_CollectLayer(w, min(self.lengths)) for w in windows]
        super().__init__(layers=list(self.collected))
        self.stop_in: int | None = None  # index of the running layer, if it may stop early

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx >= len(self.collected):
            raise PrefixError(
                f"the model writes to layer {layer_idx} of its cache, but its config tells of "
                f"{len(self.collected)} layers; use prefix='full'"
            )
        states = self.collected[layer_idx].update(key_states, value_states)
        if self.stop_in == layer_idx:
            raise LastLayerDone
        return states

    def rows(self) -> list[list[KeyValue]]:
        """For each row the keys and values of all layers, as views."""
        return [
            [layer.row(b, length) for layer in self.collected]
            for b, length in enumerate(self.lengths)
        ]


class _Extend(torch.autograd.Function):
    """Concatenates right-aligned prefixes and the suffixes of a batch, with a single copy.

    The prefixes are constants. The gradient is that of the suffixes.
    """

    @staticmethod
    def forward(ctx: Any, suffix: Tensor, stored: int, *prefixes: Tensor) -> Tensor:
        ctx.stored = stored
        batch, heads, length, width = suffix.shape
        out = suffix.new_empty(batch, heads, stored + length, width)
        for b, prefix in enumerate(prefixes):
            gap = stored - prefix.shape[1]
            out[b, :, :gap] = 0
            out[b, :, gap:stored] = prefix
        out[:, :, stored:] = suffix
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad[:, :, ctx.stored :], None, *[None] * (len(ctx.needs_input_grad) - 2)


class _ReadOnlyLayer(_Layer):
    """One layer of the read-only cache. Its `update` changes nothing."""

    def __init__(self, window: int | None, length: int, rows: Sequence[KeyValue]) -> None:
        super().__init__(window)
        self.length = length
        self.stored = length if window is None else min(length, window - 1)
        self.rows = list(rows)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = zip(*self.rows)
        return (
            _Extend.apply(key_states, self.stored, *keys),
            _Extend.apply(value_states, self.stored, *values),
        )

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return self.stored + _count(query_length), self.length - self.stored


class ReadOnlyPrefix(Cache):
    """A cache with the right-aligned prefixes of a batch. Layers can read it but not change it.

    Args:
        windows: for each layer its sliding window, or None.
        length: the length of the longest prefix.
        rows: for each row the keys and values of all layers, `[H, n, D]`.
    """

    def __init__(
        self, windows: Sequence[int | None], length: int, rows: Sequence[Sequence[KeyValue]]
    ) -> None:
        self.lent = [
            _ReadOnlyLayer(w, length, [row[i] for row in rows]) for i, w in enumerate(windows)
        ]
        super().__init__(layers=list(self.lent))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.lent[layer_idx].update(key_states, value_states)

    def tensors(self) -> Iterator[Tensor]:
        """Every stored tensor."""
        for layer in self.lent:
            for keys, values in layer.rows:
                yield keys
                yield values
