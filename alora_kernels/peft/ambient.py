"""What the current forward runs: a request from outside, and the state that layers read.

A ContextVar is right across threads and asyncio tasks; a compiler cannot trace one, so a
thread-local mirror serves compiled code, as `activation.activate` does it.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..activation import Activation
from .refusal import invocation_of

if TYPE_CHECKING:
    from .acceleration import Acceleration
    from .generation import Generation
    from .layers import Group
    from .records import CacheRecord

Names = str | list[str | None] | None


class Request:
    """Which adapters the forwards of one model run, and where they begin.

    Attributes:
        owner: the accelerated model that this request is for.
        chosen: whether `names` overrides the active adapters.
        names: one adapter for all rows, one (or None for the base model) a row, or None: the base.
        starts: absolute start of the adapter in each row (None = base), or None: search.
        offsets: PEFT's `alora_offsets`, counted from the end of the tokens of each forward.
        activation: the active rows themselves.
        generation: the call of `generate` that runs, which tells starts to its own forwards alone.
        outer: the request around this one, perhaps of another model.
    """

    def __init__(
        self,
        owner: Acceleration,
        chosen: bool = False,
        names: Names = None,
        starts: Sequence[int | None] | None = None,
        offsets: Sequence[int | None] | None = None,
        activation: Activation | None = None,
        generation: Generation | None = None,
    ) -> None:
        self.owner, self.chosen, self.names = owner, chosen, names
        self.starts, self.offsets = starts, offsets
        self.activation, self.generation = activation, generation
        self.outer: Request | None = None


@dataclass(frozen=True)
class Note:
    """What a forward leaves for the record of its cache.

    Attributes:
        ids: its tokens `[B, T]`, if known.
        past: tokens that were in the cache before; None: not known, or not asked.
        record: what was known of them.
        starts: where each activated adapter begins.
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
        owner: the accelerated model.
        names: None: every layer runs its own active adapters; else the adapters to run, whatever
            is active.
        row_names: the adapter of each row, where rows differ.
        activations: the active rows of each adapter.
        batch, seq_len: B and T of the tokens (B = 0: not known); `rows` is their product.
        keep: `logits_to_keep` of this forward.
        past, starts, cache: tokens in the cache before this forward, the absolute start of each
            row by adapter, and the cache itself, where they are known.
        outer: the state that this one hides.
        pending: outputs that a group computed for layers that have not been called yet.
        generation: the call of `generate` whose own forward this is.
        note: what the cache's record will take up.
    """

    after_decoder = False  # whether its layers follow the decoder, where rows may be left out

    def __init__(
        self,
        owner: Acceleration,
        names: tuple[str, ...] | None,
        activations: dict[str, Activation],
        batch: int,
        seq_len: int,
        keep: int | Tensor = 0,
        row_names: list[str | None] | None = None,
    ) -> None:
        self.owner, self.names, self.activations = owner, names, activations
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
        self.views: dict[str, ForwardState] = {}  # this forward as layers elsewhere see it

    def activation_for(self, name: str, x: Tensor) -> Activation:
        """The active rows of adapter `name` among the rows of x `[..., K]`.

        Raises:
            RuntimeError: x is not made of the forward's tokens in their order.
        """
        activation = self.activations.get(name)
        if activation is None:
            activation = self.owner.late_activation(self, name)
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

    def reshaped(self, activation: Activation, x: Tensor, name: str) -> Activation:
        """`activation` of the tokens for an x that is not `[B, T, K]`."""
        return reshape(self, activation, x, name)

    def everywhere(self, name: str) -> bool:
        """Whether adapter `name` acts on every row of every layer, as a plain LoRA does."""
        starts = self.starts.get(name)
        if starts is not None:
            return all(start == 0 for start in starts)
        return self.past is not None and invocation_of(self.owner.configs.get(name)) is None


class Pending:
    """Outputs of a group that wait for their layers."""

    def __init__(
        self, group: Group, names: tuple[str, ...], x: Tensor, outputs: dict[int, Tensor]
    ) -> None:
        self.group, self.names, self.x, self.outputs = group, names, x, outputs
        self.mode = _mode(x)

    def fits(self, x: Tensor, names: tuple[str, ...]) -> bool:
        """Whether `names` are asked for in the mode and on the tensor that the group read, and it
        has not been written since."""
        return x is self.x and names == self.names and _mode(x) == self.mode


def _mode(x: Tensor) -> tuple[Any, ...]:
    """What beside x decides a layer's output: what was written to x, and the modes of torch."""
    if torch.compiler.is_compiling():
        return ()  # a compiler follows them by itself
    autocast = torch._C._is_any_autocast_enabled()
    return (
        x._version,
        torch.is_grad_enabled(),
        torch.get_autocast_dtype(x.device.type)
        if autocast and torch.is_autocast_enabled(x.device.type)
        else None,
    )


def reshape(state: ForwardState, activation: Activation, x: Tensor, name: str) -> Activation:
    """`activation` for an x that is not `[B, T, K]`: flattened, with heads, or the last tokens."""
    lead = tuple(x.shape[:-1])
    rows = x.shape[:-1].numel()
    if rows == activation.num_rows and (len(lead) == 1 or lead[0] in (1, state.batch or lead[0])):
        return activation  # [B·T, K], [B, T, K] on another device, or [1, B·T, K]
    if state.everywhere(name):
        return Activation.all(rows, device=x.device)
    batch, seq_len = state.batch, state.seq_len
    mask = activation.mask.view(batch, seq_len)
    if len(lead) >= 3 and (*lead[:2], lead[-1]) == (batch, seq_len, seq_len):
        raise unknown_rows(state, x, name)  # as many heads as tokens: two layouts fit
    if len(lead) >= 3 and lead[:2] == (batch, seq_len):  # [B, T, H, K]
        return Activation.from_mask(mask.view(batch, seq_len, *(1,) * len(lead[2:])).expand(lead))
    if len(lead) >= 3 and (lead[0], lead[-1]) == (batch, seq_len):  # [B, H, T, K]
        return Activation.from_mask(mask.view(batch, *(1,) * len(lead[1:-1]), seq_len).expand(lead))
    if lead == (batch,) and invocation_of(state.owner.configs.get(name)) is None:
        return Activation.from_mask(mask[:, 0])  # one vector a row: a plain LoRA has whole rows
    if state.after_decoder and len(lead) == 2 and lead[0] == batch:
        kept = mask[:, -state.keep :] if isinstance(state.keep, int) else mask[:, state.keep]
        if kept.shape == lead:  # what logits_to_keep left
            return Activation.from_mask(kept)
    raise unknown_rows(state, x, name)


def unknown_rows(state: ForwardState, x: Tensor, name: str) -> RuntimeError:
    """The error for an input whose rows cannot be told."""
    return RuntimeError(
        f"adapter {name!r}: a layer got an input of shape {tuple(x.shape)}, but this forward has "
        f"{state.batch} × {state.seq_len} tokens, so which of its rows are active is not known; "
        "leave layers that see a selection of the tokens (routed experts) or other states (a "
        "tower, the whole cache) out of target_modules, or run them under adapter_scope with an "
        "Activation of their own rows"
    )


class _Mirror(threading.local):
    # Set for each thread, not defaults of the class: a graph traced while a name is missing from
    # the thread's dict is guarded by its absence, and would be made again after a forward.
    def __init__(self) -> None:
        self.request: Request | None = None
        self.state: ForwardState | None = None


_mirror = _Mirror()
_request: contextvars.ContextVar[Request | None] = contextvars.ContextVar(
    "alora_request", default=None
)
_state: contextvars.ContextVar[ForwardState | None] = contextvars.ContextVar(
    "alora_state", default=None
)


def current_state() -> ForwardState | None:
    """The state of the innermost forward of this thread or task."""
    if torch.compiler.is_compiling():
        return _mirror.state
    return _state.get()


def set_state(state: ForwardState | None) -> None:
    _mirror.state = state
    if not torch.compiler.is_compiling():
        _state.set(state)


def current_request(owner: Acceleration) -> Request | None:
    """The innermost request for `owner`."""
    request = _mirror.request if torch.compiler.is_compiling() else _request.get()
    while request is not None and request.owner is not owner:
        request = request.outer
    return request


def set_request(request: Request | None) -> Request | None:
    """Make `request` the current one; returns the one before."""
    if torch.compiler.is_compiling():
        before = _mirror.request
    else:
        before = _request.get()
        _request.set(request)
    _mirror.request = request
    return before


class requesting:
    """`with requesting(request):`; a class, because a compiler traces it more easily."""

    def __init__(self, request: Request | None) -> None:
        self.request = request
        self.before: Request | None = None

    def __enter__(self) -> None:
        self.before = set_request(self.request)
        if self.request is not None:
            self.request.outer = self.before

    def __exit__(self, *error: object) -> None:
        set_request(self.before)


@contextmanager
def within(state: ForwardState | None) -> Iterator[None]:
    """Run a block under `state`; a group's leftovers die with the block."""
    before, pending = current_state(), None if state is None else state.pending
    set_state(state)
    try:
        yield
    finally:
        if state is not None:
            state.pending = pending
        set_state(before)
