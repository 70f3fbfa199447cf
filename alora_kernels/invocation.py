"""Where the adapter begins in a sequence: at the last occurrence of its invocation tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def find_invocation_starts(
    input_ids: Tensor,
    invocation_tokens: Sequence[int] | Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Start of the last invocation in each sequence, −1 where there is none.

    Args:
        input_ids: integer `[B, T]` or `[T]`.
        invocation_tokens: `[I]` token ids, I ≥ 1.
        attention_mask: `[B, T]`; a match that touches a masked position does not count.

    Returns:
        int64 `[B]` on the device of `input_ids`.
    """
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must have shape [B, T] or [T], got {tuple(input_ids.shape)}")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must hold token ids (an integer dtype), got {input_ids.dtype}")
    length = len(invocation_tokens)
    if length == 0:
        raise ValueError(
            "invocation_tokens is empty: an aLoRA adapter needs at least one invocation token; "
            "for an adapter that is always on use Activation.all"
        )
    ids = input_ids if input_ids.dim() == 2 else input_ids.unsqueeze(0)
    if attention_mask is not None and attention_mask.numel() != ids.numel():
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, "
            f"input_ids has {tuple(input_ids.shape)}"
        )
    batch, seq_len = ids.shape
    windows = seq_len - length + 1
    if windows <= 0:
        return torch.full((batch,), -1, dtype=torch.int64, device=ids.device)
    wanted = torch.as_tensor(invocation_tokens, dtype=ids.dtype, device=ids.device)
    match = (ids.unfold(1, length, 1) == wanted).all(-1)  # [B, windows]
    if attention_mask is not None:
        real = attention_mask.reshape(ids.shape) != 0
        match = match & real.unfold(1, length, 1).all(-1)
    position = torch.arange(windows, device=ids.device)
    return torch.where(match, position, -1).amax(1)


def last_occurrence(token_ids: Sequence[int], tokens: Sequence[int], begin: int = 0) -> int | None:
    """Where the last occurrence of `tokens` at or after `begin` starts in a list; None without."""
    # list.index runs at C speed, so the list is turned round rather than walked.
    turned, wanted, count = list(token_ids)[::-1], list(tokens)[::-1], len(tokens)
    position = 0
    while True:
        try:
            position = turned.index(wanted[0], position, len(turned) - begin)
        except ValueError:
            return None
        if turned[position : position + count] == wanted:
            start = len(turned) - position - count
            return start if start >= begin else None
        position += 1
