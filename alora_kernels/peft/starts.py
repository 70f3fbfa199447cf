"""Finds where packed sequences and adapters begin inside a row; warns of rows without a start."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..activation import readable


def restarts(
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    input_ids: Tensor,
) -> Tensor | None:
    """bool `[B, T]`, true where a packed sequence begins inside a row; None if no row is packed.

    A sequence begins where the position ids do not rise. Padding has no meaningful positions, so
    both neighbours must be real tokens. Without position ids, `cu_seqlens` (the borders that
    padding-free collators pass to attention) gives the same answer.
    """
    batch, seq_len = input_ids.shape
    if seq_len < 2:
        return None
    begin = None
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == seq_len:
        falls = position_ids[:, 1:] <= position_ids[:, :-1]
        if attention_mask is not None and attention_mask.shape == input_ids.shape:
            real = attention_mask != 0
            falls = falls & real[:, 1:] & real[:, :-1]
        falls = falls.to(input_ids.device).expand(batch, -1)
        begin = torch.cat([falls.new_zeros(batch, 1), falls], 1)
    elif cu_seqlens is not None:
        flat = input_ids.new_zeros(batch * seq_len + 1, dtype=torch.bool)
        edges = cu_seqlens.to(input_ids.device, torch.int64)
        begin = flat.index_fill(0, edges, True)[:-1].view(batch, seq_len)
        begin = begin & (torch.arange(seq_len, device=begin.device) > 0)
    if begin is None:
        return None
    if readable(begin) and not bool(begin.any()):
        return None
    return begin


def packed_mask(input_ids: Tensor, tokens: Sequence[int], begin: Tensor) -> Tensor:
    """bool `[B, T]`, true from the last invocation of each packed sequence to its end.

    Args:
        input_ids: `[B, T]`.
        tokens: the invocation, I ≥ 1 token ids.
        begin: bool `[B, T]`, from `restarts`.
    """
    batch, seq_len = input_ids.shape
    length = len(tokens)
    if length > seq_len:
        return torch.zeros_like(begin)
    position = torch.arange(seq_len, device=input_ids.device).expand(batch, -1)
    first = torch.where(begin, position, 0).cummax(1).values  # where each token's sequence begins
    wanted = torch.as_tensor(tokens, dtype=input_ids.dtype, device=input_ids.device)
    match = (input_ids.unfold(1, length, 1) == wanted).all(-1)  # [B, T − I + 1]
    windows = match.shape[1]
    match = match & (first[:, :windows] == first[:, length - 1 :])  # not across two sequences
    match = torch.cat([match, match.new_zeros(batch, seq_len - windows)], 1)
    last = torch.where(match, position, -1).cummax(1).values  # the last match up to each token
    # The next match and the next border strictly after each token; T if there is none.
    later = torch.stack([torch.where(flag, position, seq_len) for flag in (match, begin)])
    later = torch.cat([later[..., 1:], later.new_full((2, batch, 1), seq_len)], -1)
    following, border = later.flip(-1).cummin(-1).values.flip(-1)
    return (last >= first) & (following >= border)


Looked = tuple[str, Sequence[int], bool]  # the adapter, its invocation, whether it is trained


class LonelyRows:
    """Warns of rows without an invocation, once per adapter, without waiting for the device."""

    def __init__(self) -> None:
        self.warned: set[str] = set()
        self.unread: tuple[Looked, Tensor, Any] | None = None

    def look(
        self, name: str, tokens: Sequence[int], lonely: Tensor | Sequence[bool], training: bool
    ) -> None:
        """Warn of the rows in `lonely` `[B]`: whole sequences that do not contain `tokens`.

        A `lonely` on a GPU is copied now and read in the next call.
        """
        what: Looked = (name, tokens, training)
        if name in self.warned:
            return
        if not isinstance(lonely, Tensor):
            rows = list(lonely)
        elif lonely.device.type == "cpu":
            rows = lonely.tolist()
        else:  # the copy has arrived by the next call
            before, self.unread = self.unread, None
            event = torch.cuda.Event() if lonely.device.type == "cuda" else None
            self.unread = (what, lonely.to("cpu", non_blocking=event is not None), event)
            if event is not None:
                event.record()
            if before is None or (before[2] is not None and not before[2].query()):
                return
            what, rows = before[0], before[1].tolist()
        self._say(*what, [i for i, flag in enumerate(rows) if flag])

    def _say(self, name: str, tokens: Sequence[int], training: bool, missing: list[int]) -> None:
        if not missing:
            return
        self.warned.add(name)
        rows = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        if training:
            warnings.warn(
                f"adapter {name!r}: training row {rows} of this batch has no invocation, so it "
                "trains nothing; was it truncated away? (warned once)",
                stacklevel=2,
            )
            return
        warnings.warn(
            f"adapter {name!r}: row {rows} of this batch does not contain the adapter's "
            f"invocation, the token ids {list(tokens)}, so it runs the base model. The same text "
            "can give other tokens beside other text (a space or a letter before it joins it): "
            "compare the token ids, and put the invocation in as token ids. For the base model "
            "on purpose, use disable_adapter() or adapter_scope(model, None). (warned once)",
            stacklevel=2,
        )
