"""Cuts each row of a batch into a frozen prefix and a suffix that the adapter sees.

    row      [pad | prefix ............ | suffix ....... | pad]
    slots     0    lo                    begin            hi      T
    loss                                 slots begin + 1 … hi − 1

Prefixes run with padding on the right, because a causal model then needs no mask. In the cache they
are right-aligned, so that the left-aligned suffixes follow without a gap. The distance between two
slots is then the distance between two tokens, and sliding windows stay right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activation import find_invocation_starts

IGNORE = -100


@dataclass(frozen=True)
class Row:
    """How one row is cut, in columns of `input_ids`; see the picture at the top of the file.

    `active` is false if the row has no invocation.
    """

    lo: int
    begin: int
    hi: int
    active: bool

    @property
    def prefix(self) -> int:
        return self.begin - self.lo

    @property
    def suffix(self) -> int:
        return self.hi - self.begin


@dataclass(frozen=True)
class Layout:
    """How a batch is cut, known on the host.

    Attributes:
        rows: one cut for each row.
        seq_len: T.
        num_labels: the number of labels in the batch that a causal loss counts. (The label of a
            row's first real token does not count: nothing predicts it.)
        prefix_labels: how many of these labels are at or before the first token of the invocation.
            Their loss does not depend on the adapter.
    """

    rows: tuple[Row, ...]
    seq_len: int
    num_labels: int
    prefix_labels: int

    @property
    def prefix_len(self) -> int:
        return max(row.prefix for row in self.rows)

    @property
    def suffix_len(self) -> int:
        return max(row.suffix for row in self.rows)

    @property
    def inactive(self) -> list[int]:
        """The rows without an invocation."""
        return [b for b, row in enumerate(self.rows) if not row.active]

    def offsets(self) -> list[int | None]:
        """PEFT's `alora_offsets` for the whole batch."""
        return [self.seq_len - row.begin if row.active else None for row in self.rows]

    def suffix_offsets(self) -> list[int | None]:
        """PEFT's `alora_offsets` for the batch of suffixes: all tokens of active rows."""
        return [self.suffix_len if row.active else None for row in self.rows]

    def suffix_index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Slots of the left-aligned suffixes, and which of them are real tokens, both `[B, S]`."""
        return _index([(row.begin, row.suffix) for row in self.rows], self.suffix_len, device)

    def prefix_index(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Slots of the right-padded prefixes of `rows`, and which are real, `[len(rows), P]`."""
        spans = [(self.rows[b].lo, self.rows[b].prefix) for b in rows]
        return _index(spans, max(length for _, length in spans), device)

    def prefix_groups(self, rows: Sequence[int], tokens: int) -> list[list[int]]:
        """Groups of `rows`, longest prefix first, of at most `tokens` tokens or of a single row.

        A group contains whole prefixes, not a chunk of every prefix. A prefix in one piece attends
        to itself alone, so causal attention needs no mask and skips the hidden half.
        """
        groups: list[list[int]] = []
        for b in sorted(rows, key=lambda row: self.rows[row].prefix, reverse=True):
            if groups and (len(groups[-1]) + 1) * self.rows[groups[-1][0]].prefix <= tokens:
                groups[-1].append(b)
            else:
                groups.append([b])
        return groups

    def cache_mask(self, device: torch.device) -> Tensor | None:
        """The attention mask for right-aligned prefixes, then left-aligned suffixes.

        int64 `[B, P + S]`, or None if there is no padding.
        """
        p, s = self.prefix_len, self.suffix_len
        if all(row.prefix == p and row.suffix == s for row in self.rows):
            return None
        slot = torch.arange(p + s)
        first = torch.tensor([p - row.prefix for row in self.rows]).unsqueeze(1)
        stop = torch.tensor([p + row.suffix for row in self.rows]).unsqueeze(1)
        return ((slot >= first) & (slot < stop)).to(torch.int64).to(device)


def _index(
    spans: Sequence[tuple[int, int]], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    start = torch.tensor([begin for begin, _ in spans]).unsqueeze(1)
    length = torch.tensor([n for _, n in spans]).unsqueeze(1)
    step = torch.arange(width).unsqueeze(0)
    real = step < length
    # Padding repeats the last real token (or the row's first slot), so it stays in range.
    slot = start + torch.minimum(step, (length - 1).clamp(min=0))
    return slot.to(device), real.to(device)


def plan_layout(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    starts: Sequence[int | None] | Tensor | None,
    invocation_tokens: Sequence[int] | None,
) -> Layout:
    """Cut every row at the first token of its invocation.

    A row without an invocation runs the base model. It is cut before its first label, so that its
    loss equals that of the whole row.

    Args:
        input_ids: integer `[B, T]`.
        attention_mask: `[B, T]`, nonzero on one unbroken run of each row, or None.
        labels: `[B, T]` or None.
        starts: for each row the column of the first invocation token; None or −1 if the row has no
            invocation. By default the last occurrence of `invocation_tokens` is searched.
        invocation_tokens: token ids of the invocation.

    Raises:
        ValueError: shapes do not fit, a mask has holes, a start is outside the real tokens, or a
            label is on padding.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"prefix_forward: input_ids must be [B, T], got {tuple(input_ids.shape)}")
    batch, seq_len = input_ids.shape
    if batch == 0 or seq_len == 0:
        raise ValueError(f"prefix_forward: input_ids is empty, shape {tuple(input_ids.shape)}")
    device = input_ids.device
    for name, value in (("attention_mask", attention_mask), ("labels", labels)):
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(
                f"prefix_forward: {name} has shape {tuple(value.shape)}, but input_ids has "
                f"{tuple(input_ids.shape)}; a prepared 4-D mask is not accepted"
            )
    if starts is None:
        if invocation_tokens is None:
            raise ValueError("prefix_forward: give starts or invocation_tokens")
        start = find_invocation_starts(input_ids, invocation_tokens, attention_mask)
    elif isinstance(starts, Tensor):
        start = starts.to(device=device, dtype=torch.int64)
    else:
        start = torch.tensor([-1 if s is None else int(s) for s in starts], device=device)
    if start.shape != (batch,):
        raise ValueError(
            f"prefix_forward: starts must have one entry per row, [{batch}], got "
            f"{list(start.shape)}"
        )
    column = torch.arange(seq_len, device=device)
    if attention_mask is None:
        real = torch.ones_like(input_ids, dtype=torch.bool)
    else:
        real = attention_mask != 0
    lo = torch.where(real, column, seq_len).amin(1)
    hi = torch.where(real, column + 1, 0).amax(1)
    labelled = torch.zeros_like(real) if labels is None else labels != IGNORE
    counted = labelled & (column > lo.unsqueeze(1))
    first = torch.where(counted, column, seq_len).amin(1)
    in_prefix = (counted & (column <= start.unsqueeze(1))).sum(1)
    stray = (labelled & ~real).sum(1)
    facts = torch.stack(
        [lo, hi, real.sum(1), start, first, counted.sum(1), in_prefix, stray]
    ).T.tolist()  # the only copy to the host

    rows = []
    for b, (r_lo, r_hi, count, r_start, r_first, _, _, r_stray) in enumerate(facts):
        if r_stray:
            raise ValueError(
                f"prefix_forward: row {b} has {r_stray} labels on padding; set them to {IGNORE}"
            )
        if count == 0:  # only padding: keep one inactive token, so that attention is defined
            rows.append(Row(0, 0, 1, False))
            continue
        if r_hi - r_lo != count:
            raise ValueError(
                f"prefix_forward: the attention mask of row {b} has holes ({count} real tokens in "
                f"{r_hi - r_lo} slots); packed rows are not supported, unpack them"
            )
        if r_start < 0:
            begin = min(r_first - 1, r_hi - 1) if r_first < seq_len else r_hi - 1
            rows.append(Row(r_lo, begin, r_hi, False))
        elif not r_lo <= r_start < r_hi:
            raise ValueError(
                f"prefix_forward: row {b} has its start at column {r_start}, but its real tokens "
                f"are [{r_lo}, {r_hi})"
            )
        else:
            rows.append(Row(r_lo, r_start, r_hi, True))
    return Layout(
        rows=tuple(rows),
        seq_len=seq_len,
        num_labels=sum(f[5] for f in facts),
        prefix_labels=sum(f[6] for f in facts),
    )


def take(values: Tensor, index: Tensor) -> Tensor:
    """`values[b, index[b, i]]` for `values` `[B, T]`."""
    return values.gather(1, index)
