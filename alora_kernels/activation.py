"""`Activation`: which rows of a batch run the adapter.

It is computed once per forward of the model, and all layers share it. So no layer searches for
tokens, copies to the device or waits for it. Rows are tokens: batch × sequence, flattened to M.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node

from .ambient import Ambient
from .invocation import find_invocation_starts

Segment = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Activation:
    """The active rows of one batch, as tensors on the device of the layers that use them.

    Build it with one of the `from_*` constructors, `all` or `none`.

    Attributes:
        row_adapter: int32 `[M]`. −1 if the row runs the base model, else the index of its adapter.
            The mask of the formula is `row_adapter >= 0`.
        active_rows: int32 `[capacity]`, capacity ≥ the number of active rows. The active rows in
            ascending order, then −1.
        active_count: int32 `[1]`, how many entries of `active_rows` are valid.
        num_active: the number of active rows on the host, or None if the host does not know it.
        max_active: an upper bound of `num_active`, known on the host.
        segments: half-open row ranges `(start, stop)` that make up the active rows, or None if the
            host does not know them.
        expected_active: the number of active rows to plan for if the host does not know it.
    """

    row_adapter: Tensor  # int32 [M]
    active_rows: Tensor  # int32 [capacity]
    active_count: Tensor  # int32 [1]
    num_active: int | None = None
    max_active: int = -1
    segments: tuple[Segment, ...] | None = None
    expected_active: int | None = None

    def __post_init__(self) -> None:
        if self.max_active < 0:
            known = self.num_active
            object.__setattr__(
                self, "max_active", self.row_adapter.shape[0] if known is None else known
            )
        if self.segments is None and readable(self.row_adapter) and self.num_rows:
            highest = int(self.row_adapter.max())
            if highest > 0:
                raise NotImplementedError(
                    f"Activation: row_adapter names adapter {highest}, but one adapter is served "
                    "per call; indices must be -1 (base model) or 0"
                )

    # ------------------------------------------------------------------ constructors

    @classmethod
    def from_input_ids(
        cls,
        input_ids: Tensor,
        invocation_tokens: Sequence[int] | Tensor,
        attention_mask: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Activation:
        """Activate each sequence from the first token of its last invocation to its end.

        A sequence without the invocation runs the base model. This is PEFT's rule for
        `alora_invocation_tokens`. With `attention_mask`, padded positions neither match nor become
        active; without it, padding counts as tokens.

        Args:
            input_ids: integer `[B, T]` or `[T]`.
            invocation_tokens: the token ids of the invocation, at least one.
            attention_mask: `[B, T]`, nonzero where a token is real.
            device: the device of the result; by default that of `input_ids`. If `input_ids` is on
                the CPU, the rows are counted there, so `num_active` is known without a
                synchronisation.
        """
        starts = find_invocation_starts(input_ids, invocation_tokens, attention_mask)  # [B]
        ids = input_ids if input_ids.dim() == 2 else input_ids.unsqueeze(0)
        position = torch.arange(ids.shape[1], device=ids.device)
        mask = (starts >= 0).unsqueeze(1) & (position >= starts.unsqueeze(1))  # [B, T]
        if attention_mask is not None:
            mask = mask & (attention_mask.reshape(ids.shape) != 0)
        return cls.from_mask(mask, device=device)

    @classmethod
    def from_offsets(
        cls,
        offsets: Sequence[int | None],
        seq_len: int,
        *,
        device: torch.device | str | None = None,
    ) -> Activation:
        """Activate the last `min(offset, seq_len)` tokens of each sequence, as `alora_offsets` do.

        A sequence with the offset None, zero or less runs the base model.
        """
        starts = [None if not o or o < 0 else max(seq_len - o, 0) for o in offsets]
        return cls.from_starts(starts, seq_len, device=device)

    @classmethod
    def from_starts(
        cls,
        starts: Sequence[int | None] | Tensor,
        seq_len: int,
        first_position: int = 0,
        *,
        device: torch.device | str | None = None,
    ) -> Activation:
        """Activate each sequence from its absolute `invocation_start` on.

        Args:
            starts: for each sequence the absolute position of its first active token; None (or
                −1 in a tensor) runs the base model.
            seq_len: tokens of each sequence in this chunk.
            first_position: absolute position of the chunk's first token. It is not 0 in cached
                decoding, chunked prefill and assisted decoding.
        """
        if isinstance(starts, Tensor):
            relative = starts.to(torch.int64) - first_position
            position = torch.arange(seq_len, device=starts.device)
            mask = (starts >= 0).unsqueeze(1) & (position >= relative.unsqueeze(1))
            return cls.from_mask(mask, device=device)
        segments = []
        for b, start in enumerate(starts):
            if start is None:
                continue
            begin = min(max(start - first_position, 0), seq_len)
            segments.append((b * seq_len + begin, (b + 1) * seq_len))
        return cls._from_segments(segments, len(starts) * seq_len, device)

    @classmethod
    def from_packed(
        cls,
        cu_seqlens: Sequence[int] | Tensor,
        starts: Sequence[int | None] | Tensor,
        *,
        device: torch.device | str | None = None,
    ) -> Activation:
        """Activate sequences that are packed into one row, each from its own start.

        Args:
            cu_seqlens: `[S + 1]` cumulative lengths, beginning with 0.
            starts: `[S]` start of the invocation within its own sequence; None (or −1 in a
                tensor) runs the base model.
        """
        if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type != "cpu":
            if device is None:
                device = cu_seqlens.device
            # One copy of S + 1 integers per forward. Dispatch then never has to wait for a count.
            cu_seqlens = cu_seqlens.cpu()
        bounds = [int(c) for c in cu_seqlens]
        begin = [
            None if s is None or int(s) < 0 else int(s)
            for s in (starts.tolist() if isinstance(starts, Tensor) else starts)
        ]
        if not bounds or bounds[0] != 0 or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(
                f"Activation.from_packed: cu_seqlens must begin with 0 and never fall, got {bounds}"
            )
        if len(begin) != len(bounds) - 1:
            raise ValueError(
                f"Activation.from_packed: {len(bounds) - 1} sequences but {len(begin)} starts"
            )
        segments = [
            (min(lo + s, hi), hi) for lo, hi, s in zip(bounds, bounds[1:], begin) if s is not None
        ]
        return cls._from_segments(segments, bounds[-1], device)

    @classmethod
    def from_mask(cls, mask: Tensor, *, device: torch.device | str | None = None) -> Activation:
        """Activate the rows where `mask` (`[B, T]` or `[M]`, bool or integer) is true."""
        flat = mask.reshape(-1)
        flat = flat if flat.dtype == torch.bool else flat != 0
        rows = flat.shape[0]
        count = flat.sum(dtype=torch.int32).reshape(1)
        # Every active row is written to its rank among the active rows. All other rows go to one
        # slot past the end, which is cut off. `nonzero` would have to wait for the device.
        rank = torch.cumsum(flat, 0, dtype=torch.int64) - 1
        slot = torch.where(flat, rank, rows)
        numbers = torch.arange(rows, dtype=torch.int32, device=flat.device)
        active = torch.full((rows + 1,), -1, dtype=torch.int32, device=flat.device)
        active = active.scatter(0, slot, numbers)[:rows]
        host: dict[str, Any] = {}
        if readable(flat):
            known = int(count)
            host = {"num_active": known, "segments": _runs(active[:known])}
        activation = cls(flat.to(torch.int32) - 1, active, count, **host)
        return activation if device is None else activation.to(device)

    @classmethod
    def all(cls, num_rows: int, *, device: torch.device | str | None = None) -> Activation:
        """Activate every row: plain LoRA."""
        return cls._from_segments([(0, num_rows)], num_rows, device)

    @classmethod
    def none(cls, num_rows: int, *, device: torch.device | str | None = None) -> Activation:
        """Activate no row: the base model."""
        return cls._from_segments([], num_rows, device)

    @classmethod
    def _from_segments(
        cls, segments: Sequence[Segment], num_rows: int, device: torch.device | str | None
    ) -> Activation:
        row_adapter = torch.full((num_rows,), -1, dtype=torch.int32)
        active = torch.full((num_rows,), -1, dtype=torch.int32)
        merged: list[Segment] = []
        count = 0
        for begin, end in segments:
            if begin == end:
                continue
            row_adapter[begin:end] = 0
            active[count : count + end - begin] = torch.arange(begin, end, dtype=torch.int32)
            count += end - begin
            if merged and merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((begin, end))
        host = torch.tensor([count], dtype=torch.int32)
        activation = cls(row_adapter, active, host, num_active=count, segments=tuple(merged))
        return activation if device is None else activation.to(device)

    # ------------------------------------------------------------------ use

    @property
    def num_rows(self) -> int:
        """M, the number of rows that this activation describes."""
        return self.row_adapter.shape[0]

    @property
    def device(self) -> torch.device:
        return self.row_adapter.device

    @property
    def mask(self) -> Tensor:
        """bool `[M]`, true on active rows."""
        return self.row_adapter >= 0

    @property
    def planned_active(self) -> int:
        """The number of active rows to plan for: known, else expected, else the upper bound."""
        if self.num_active is not None:
            return self.num_active
        return self.max_active if self.expected_active is None else self.expected_active

    def expecting(self, fraction: float) -> Activation:
        """A copy that tells dispatch which fraction of active rows to plan for.

        Dispatch uses it if the host does not know `num_active`.
        """
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"Activation.expecting: fraction must be in [0, 1], got {fraction}")
        return dataclasses.replace(self, expected_active=round(fraction * self.num_rows))

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Activation:
        """The same activation on another device. It keeps what the host knows."""
        device = torch.device(device)
        if device == self.device or (device.type == self.device.type and device.index is None):
            return self
        return dataclasses.replace(
            self,
            row_adapter=self.row_adapter.to(device, non_blocking=non_blocking),
            active_rows=self.active_rows.to(device, non_blocking=non_blocking),
            active_count=self.active_count.to(device, non_blocking=non_blocking),
        )

    def __repr__(self) -> str:
        active = "?" if self.num_active is None else self.num_active
        return f"Activation({active} of {self.num_rows} rows active, device={self.device})"


def readable(tensor: Tensor) -> bool:
    """Whether the host may read the values: on the CPU, outside compilers and transforms."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def segments_of(activation: Activation) -> Sequence[Segment]:
    """The half-open row ranges that make up the active rows. May wait for the device."""
    if activation.segments is not None:
        return activation.segments
    return _runs(activation.active_rows[: int(activation.active_count)].cpu())


def _runs(rows: Tensor) -> tuple[Segment, ...]:
    """Maximal runs of consecutive numbers in ascending CPU `rows`."""
    if not len(rows):
        return ()
    values = rows.numpy()
    breaks = (values[1:] - values[:-1] != 1).nonzero()[0] + 1
    edges = [0, *breaks.tolist(), len(values)]
    return tuple((int(values[lo]), int(values[hi - 1]) + 1) for lo, hi in itertools.pairwise(edges))


# The pytree leaves out what the host knows, because a compiler would make it constants of a graph.
def _flatten(activation: Activation) -> tuple[list[Tensor], None]:
    return [activation.row_adapter, activation.active_rows, activation.active_count], None


def _unflatten(children: Any, _: None) -> Activation:
    row_adapter, active_rows, active_count = children
    bound = row_adapter.shape[0] if isinstance(row_adapter, Tensor) else 0
    return Activation(row_adapter, active_rows, active_count, max_active=bound)


def _flatten_with_keys(activation: Activation) -> tuple[list[tuple[Any, Tensor]], None]:
    children, context = _flatten(activation)
    names = ("row_adapter", "active_rows", "active_count")
    return [(GetAttrKey(name), child) for name, child in zip(names, children)], context


register_pytree_node(
    Activation,
    _flatten,
    _unflatten,
    serialized_type_name="alora_kernels.Activation",
    flatten_with_keys_fn=_flatten_with_keys,
)


_ambient: Ambient[Activation] = Ambient("alora_activation")


@contextmanager
def activate(activation: Activation | None) -> Iterator[Activation | None]:
    """Make `AloraLinear` layers in the block use `activation` if their call passes none.

    with activate(Activation.from_input_ids(input_ids, invocation_tokens)):
        model(input_ids)
    """
    before = _ambient.get()
    _ambient.set(activation)
    try:
        yield activation
    finally:
        _ambient.set(before)


def current_activation() -> Activation | None:
    """The activation of the innermost `activate` block of this thread or task, or None."""
    return _ambient.get()
