"""The state of one forward: which adapters its layers run, and on which rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..activation import Activation, current_activation
from ..ambient import Ambient
from .adapters import Adapters, active_in
from .cache_record import CacheRecord
from .generation import Generation
from .groups import Pending


@dataclass(frozen=True)
class Note:
    """What a forward adds to the record of its cache.

    Attributes:
        ids: the forward's token ids `[B, T]`, if known.
        past: the number of tokens in the cache before it; None: not known, or not asked.
        record: the cache's record before the forward, if there was one.
        starts: the absolute start in each row, by activated adapter.
        plain: no activated adapter ran.
    """

    ids: Tensor | None
    past: int | None = None
    record: CacheRecord | None = None
    starts: dict[str, list[int | None]] = field(default_factory=dict)
    plain: bool = False


class ForwardState:
    """The adapters of one forward, shared by all its layers.

    Attributes:
        adapters: the adapters of the accelerated model.
        names: the adapters to run, whichever are active. None: every layer runs its own active
            adapters.
        row_names: the adapter of each row; None if all rows run the same.
        activations: the active rows of each adapter.
        batch, seq_len: B and T of the tokens (B = 0: not known); `rows` is their product.
        keep: `logits_to_keep` of this forward.
        past: the number of tokens in the cache before this forward, if known.
        starts: by adapter, the absolute start of each row, if known.
        cache: the cache that this forward continues.
        outer: the state that was current before this one.
        pending: outputs that a group computed for layers that have not been called yet.
        generation: the call of `generate` that this forward belongs to.
        note: what this forward adds to the record of its cache.
        shaped: activations for inputs of other shapes and devices, computed once.
        views: this forward as layers see it whose rows are not its tokens.
    """

    after_decoder = False  # whether the layers follow the decoder, which may drop rows before them

    def __init__(
        self,
        adapters: Adapters,
        names: tuple[str, ...] | None,
        activations: dict[str, Activation],
        batch: int,
        seq_len: int,
        keep: int | Tensor = 0,
        row_names: list[str | None] | None = None,
    ) -> None:
        self.adapters, self.names, self.activations = adapters, names, activations
        self.row_names = row_names
        self.batch, self.seq_len, self.rows = batch, seq_len, batch * seq_len
        self.keep = keep
        self.past: int | Tensor | None = None
        self.starts: dict[str, list[int | None]] = {}
        self.cache: Any = None
        self.outer: ForwardState | None = None
        self.pending: Pending | None = None
        self.generation: Generation | None = None
        self.note: Note | None = None
        self.shaped: dict[tuple[str, tuple[int, ...], torch.device], Activation] = {}
        self.views: dict[str, ForwardState] = {}

    def activation_for(self, name: str, x: Tensor) -> Activation:
        """The active rows of adapter `name` among the rows of x `[..., K]`.

        Raises:
            RuntimeError: the rows of x are not the forward's tokens in their order.
        """
        activation = self.activations.get(name)
        if activation is None:
            activation = self.late_activation(name)
        shape = x.shape
        if (
            len(shape) == 3
            and shape[1] == self.seq_len
            and shape[0] == self.batch
            and activation.row_adapter.device == x.device
        ):
            return activation
        key = (name, tuple(shape[:-1]), x.device)
        found = self.shaped.get(key)
        if found is None:
            found = self.shaped[key] = self.reshaped(activation, x, name).to(x.device)
        return found

    def late_activation(self, name: str) -> Activation:
        """The activation of an adapter that is active in a layer, but not in the first LoRA layer.

        Its invocation was not searched for, so only a plain LoRA can run.
        """
        if self.rows and self.adapters.invocation(name) is None:
            return Activation.all(self.rows)
        raise RuntimeError(
            f"adapter {name!r} is active in a layer but not in the first LoRA layer of the model, "
            "so its invocation was not searched for; activate adapters through model.set_adapter"
        )

    def reshaped(self, activation: Activation, x: Tensor, name: str) -> Activation:
        """The activation for an x that is not `[B, T, K]`, from that of the tokens."""
        return reshape(self, activation, x, name)

    def everywhere(self, name: str) -> bool:
        """Whether adapter `name` acts on every row of every layer, as a plain LoRA does."""
        starts = self.starts.get(name)
        if starts is not None:
            return all(start == 0 for start in starts)
        return self.past is not None and self.adapters.invocation(name) is None


class BlockState(ForwardState):
    """The state of layers that the user calls on their own inside an `adapter_scope`.

    It lasts for the whole block, and the user may ask PEFT in the block which adapters are active.
    The answer must stay true, so layers with PEFT's forward get their adapters by arguments alone.
    """


def reshape(state: ForwardState, activation: Activation, x: Tensor, name: str) -> Activation:
    """The activation for an x that is not `[B, T, K]`: flattened, with heads, or the last tokens.

    `activation` is that of the forward's tokens.

    Raises:
        RuntimeError: it is not known which tokens the rows of x are.
    """
    lead = tuple(x.shape[:-1])
    rows = x.shape[:-1].numel()
    if rows == activation.num_rows and (len(lead) == 1 or lead[0] in (1, state.batch or lead[0])):
        return activation  # [B·T, K], [B, T, K] on another device, or [1, B·T, K]
    if state.everywhere(name):
        return Activation.all(rows, device=x.device)
    batch, seq_len = state.batch, state.seq_len
    mask = activation.mask.view(batch, seq_len)
    if len(lead) >= 3 and (*lead[:2], lead[-1]) == (batch, seq_len, seq_len):
        raise unknown_rows(state, x, name)  # H = T: [B, T, H, K] and [B, H, T, K] both fit
    if len(lead) >= 3 and lead[:2] == (batch, seq_len):  # [B, T, H, K]
        return Activation.from_mask(mask.view(batch, seq_len, *(1,) * len(lead[2:])).expand(lead))
    if len(lead) >= 3 and (lead[0], lead[-1]) == (batch, seq_len):  # [B, H, T, K]
        return Activation.from_mask(mask.view(batch, *(1,) * len(lead[1:-1]), seq_len).expand(lead))
    if lead == (batch,) and state.adapters.invocation(name) is None:
        return Activation.from_mask(mask[:, 0])  # [B, K]: a plain LoRA acts on whole sequences
    if state.after_decoder and len(lead) == 2 and lead[0] == batch:
        kept = mask[:, -state.keep :] if isinstance(state.keep, int) else mask[:, state.keep]
        if kept.shape == lead:  # the tokens that logits_to_keep selects
            return Activation.from_mask(kept)
    raise unknown_rows(state, x, name)


def unknown_rows(state: ForwardState, x: Tensor, name: str) -> RuntimeError:
    """The error for an input whose rows are not known to be which tokens."""
    return RuntimeError(
        f"adapter {name!r}: a layer got an input of shape {tuple(x.shape)}, but this forward has "
        f"{state.batch} × {state.seq_len} tokens, so which of its rows are active is not known; "
        "leave layers that see a selection of the tokens (routed experts) or other states (a "
        "tower, the whole cache) out of target_modules, or run them under adapter_scope with an "
        "Activation of their own rows"
    )


_current: Ambient[ForwardState] = Ambient("alora_state")
current_state = _current.get
set_state = _current.set


@contextmanager
def within(state: ForwardState | None) -> Iterator[None]:
    """Run a block under `state`. Outputs that a group computed in the block do not outlive it."""
    before, pending = current_state(), None if state is None else state.pending
    set_state(state)
    try:
        yield
    finally:
        if state is not None:
            state.pending = pending
        set_state(before)


def starts_of(state: ForwardState, name: str, starts: list[int | None]) -> list[int | None]:
    """`starts`, with None in the rows that do not run `name`."""
    if state.row_names is None:
        return starts
    return [s if n == name else None for s, n in zip(starts, state.row_names)]


def restrict(state: ForwardState, name: str, activation: Activation) -> Activation:
    """`activation`, restricted to the rows that run `name`."""
    if state.row_names is None:
        return activation
    mine = [n == name for n in state.row_names]
    rows = activation.num_rows // len(mine)
    mask = torch.tensor(mine).repeat_interleave(rows).to(activation.device)
    return Activation.from_mask(activation.mask & mask)


def state_outside(adapters: Adapters, layer: Any, x: Tensor) -> ForwardState:
    """The state for a layer that is called outside a forward of the model.

    A plain LoRA acts on all rows. An activated LoRA takes the activation of `activate(...)`.

    Raises:
        RuntimeError: an activated LoRA is active, but no activation is.
    """
    rows = x.shape[:-1].numel()
    batch, seq_len = (x.shape[0], rows // x.shape[0]) if x.dim() > 2 and rows else (1, rows)
    state = ForwardState(adapters, None, {}, batch, seq_len)
    ambient = current_activation()
    for name in active_in(layer):
        if adapters.invocation(name) is None:
            state.activations[name] = Activation.all(rows, device=x.device)
        elif ambient is not None:
            state.activations[name] = ambient
        elif name in layer.lora_A:
            raise RuntimeError(
                f"adapter {name!r}: a layer was called outside the forward of "
                f"{type(adapters.root).__name__}, so where its invocation begins is not known; "
                "call the whole model, or run the layer under adapter_scope(model, name, "
                "activation) or activate(activation). (A recomputation by a checkpoint that "
                "is not the model's own gradient_checkpointing comes here too.)"
            )
    return state
