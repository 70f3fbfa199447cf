"""The state of a forward for layers whose rows are not its tokens (`stream` finds these layers)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..activation import Activation
from ..invocation import invocation_of
from .adapters import Adapters
from .state import ForwardState, reshape, unknown_rows
from .stream import BESIDE, CACHE, EXPERT, HEAD

logger = logging.getLogger("alora_kernels")


def elsewhere(adapters: Adapters, place: str, state: ForwardState | None) -> ForwardState | None:
    """`state` as a layer at `place` sees it.

    Outside a forward `state` is None. A tower can be called there too (`get_image_features`) and
    gets a state. For other places the result is None.
    """
    if state is None:
        return Beside(adapters, None) if place == BESIDE else None
    view = state.views.get(place)
    if view is None:
        view = state.views[place] = VIEWS[place](adapters, state)
    return view


class View(ForwardState):
    """The state that layers at one place of the model read.

    Attributes:
        tokens: the state of the forward, or None outside a forward.
    """

    def __init__(self, adapters: Adapters, tokens: ForwardState | None) -> None:
        if tokens is None:
            super().__init__(adapters, None, {}, 0, 0)
        else:
            size = (tokens.batch, tokens.seq_len)
            super().__init__(adapters, tokens.names, {}, *size, tokens.keep, tokens.row_names)
            self.past, self.starts = tokens.past, tokens.starts
            self.activations = tokens.activations
        self.tokens = tokens


class Beside(View):
    """Layers that never see the tokens: activated LoRAs are off, plain LoRAs act on all rows."""

    def activation_for(self, name: str, x: Tensor) -> Activation:
        rows = x.shape[:-1].numel()
        if self.adapters.invocation(name) is not None:
            return Activation.none(rows, device=x.device)
        if self.row_names is not None and any(n != name for n in self.row_names):
            paths = ", ".join(sorted(self.adapters.beside)[:3])
            raise RuntimeError(
                f"adapter {name!r}: the rows of this batch run different adapters, but which rows "
                f"of a layer outside the tokens ({paths}) belong to which row of the batch is not "
                "known; run them in separate batches, or leave those layers out of target_modules"
            )
        return Activation.all(rows, device=x.device)


class Routed(View):
    """Routed experts: they see some of the forward's tokens, in an order that is not known."""

    def reshaped(self, activation: Activation, x: Tensor, name: str) -> Activation:
        chosen = own_rows(self, activation, x) or all_or_none(activation, x)
        if chosen is None:
            raise unknown_rows(self, x, name)
        return chosen


class Heads(View):
    """Layers that follow the decoder: they see all tokens, or only those whose logits are asked."""

    after_decoder = True

    def reshaped(self, activation: Activation, x: Tensor, name: str) -> Activation:
        chosen = all_or_none(activation, x)
        return reshape(self, activation, x, name) if chosen is None else chosen


def own_rows(state: ForwardState, activation: Activation, x: Tensor) -> Activation | None:
    """The activation that an `adapter_scope` outside a forward gave for x; None if it did not."""
    alone = state.batch == 0 and activation.num_rows == x.shape[:-1].numel()
    return activation if alone else None


def all_or_none(activation: Activation, x: Tensor) -> Activation | None:
    """The activation for x if all rows of `activation` are active, or none is; else None.

    Every row of x is one of the rows of `activation`.
    """
    rows = x.shape[:-1].numel()
    if activation.num_active == 0:
        return Activation.none(rows, device=x.device)
    if activation.num_active == activation.num_rows:
        return Activation.all(rows, device=x.device)
    return None


class WholeSequence(View):
    """Projections of what the cache returned: row j of x is token `first + j` of the sequence."""

    def activation_for(self, name: str, x: Tensor) -> Activation:
        assert self.tokens is not None
        state = self.tokens
        if state.everywhere(name):
            return Activation.all(x.shape[:-1].numel(), device=x.device)
        activation = state.activations.get(name)
        if activation is None:
            activation = state.late_activation(name)
        key = (name, tuple(x.shape[:-1]), x.device)
        found = self.shaped.get(key)
        if found is None:
            found = self.shaped[key] = self._whole(name, activation, x).to(x.device)
        return found

    def _whole(self, name: str, activation: Activation, x: Tensor) -> Activation:
        state = self.tokens
        assert state is not None
        told = own_rows(state, activation, x)
        if told is not None:
            return told
        batch, seq_len, past = state.batch, state.seq_len, state.past
        lead = tuple(x.shape[:-1])
        length = lead[-1]
        if lead in ((batch, length), (batch, 1, length)):
            starts = state.starts.get(name)
            whole = starts is not None and not any(starts)  # each row is active from 0, or never
            first = 0 if whole else self._first(length)
            if first is not None and starts is not None:
                return _from_starts(starts, length, first, x.device)
            fresh = not isinstance(past, Tensor) and not past
            if length == seq_len and fresh:
                return activation  # no cache, or an empty one
            if first == 0 and past == 0:
                mask = torch.zeros(batch, length, dtype=torch.bool, device=activation.device)
                mask[:, :seq_len] = activation.mask.view(batch, seq_len)
                return Activation.from_mask(mask)
        raise RuntimeError(
            f"adapter {name!r}: a layer that projects the whole cache got an input of shape "
            f"{tuple(x.shape)} in a forward of {batch} × {seq_len} tokens after "
            f"{'an unknown number' if past is None else past}; expected {batch} rows with every "
            "token of the sequence. Leave the layer out of target_modules, or tell where the "
            "adapter begins by adapter_scope(model, name, starts=[...])"
        )

    def _first(self, length: int) -> int | None:
        """The position of the first of `length` rows; None if no kind of cache returns so many."""
        assert self.tokens is not None
        past, new = self.tokens.past, self.tokens.seq_len
        widths = list(_widths(self.tokens.cache))
        if isinstance(past, Tensor):  # compiled: the host knows the place in a static cache alone
            return 0 if any(w == length and not sliding for w, sliding in widths) else None
        if past is None:
            return None
        if length == past + new:
            return 0
        for width, sliding in widths:
            if length == width and past + new <= width:
                return 0  # a static cache: the rows after the tokens are masked
            if sliding and length in (width, min(past, width - 1) + new):
                return past + new - length
        return None


def _widths(cache: Any) -> Any:
    """For each layer of a cache: how many tokens it can hold, and whether it drops older ones."""
    for layer in getattr(cache, "layers", ()):
        width = getattr(layer, "max_cache_len", None) or getattr(layer, "sliding_window", None)
        if isinstance(width, int) and width > 0:
            yield width, bool(getattr(layer, "is_sliding", False))


def _from_starts(
    starts: list[int | None], length: int, first: int, device: torch.device
) -> Activation:
    if torch.compiler.is_compiling():
        values = [-1 if s is None else s for s in starts]
        return Activation.from_starts(torch.tensor(values, device=device), length, first)
    return Activation.from_starts(starts, length, first, device=device)


VIEWS = {BESIDE: Beside, CACHE: WholeSequence, EXPERT: Routed, HEAD: Heads}


def say_beside(adapters: Adapters, places: dict[str, str]) -> None:
    """Warn once for every layer that never sees the tokens: activated LoRAs are off there."""
    alora = {n for n, config in adapters.configs.items() if invocation_of(config) is not None}
    new = [
        path
        for path, place in places.items()
        if place == BESIDE
        and path not in adapters.beside
        and alora & {*adapters.layers[path].lora_A, *adapters.layers[path].lora_embedding_A}
    ]
    if not new:
        return
    adapters.beside.update(new)
    logger.warning(
        "alora_kernels: %d layers do not see the tokens (a tower, a projector, cross-attention "
        "over other states). Activated LoRAs are off there and train nothing; plain LoRAs run as "
        "always. To keep them out of the adapter, name them in exclude_modules:\n%s",
        len(new),
        "\n".join(f"  {path}" for path in new),
    )
