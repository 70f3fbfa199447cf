"""Finds an adapter's invocation (the tokens that switch it on), and encodes it for a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def find_invocation_starts(
    input_ids: Tensor,
    invocation_tokens: Sequence[int] | Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The start of the last invocation in each sequence, −1 if a sequence has none.

    Args:
        input_ids: integer `[B, T]` or `[T]`.
        invocation_tokens: `[I]` token ids, I ≥ 1.
        attention_mask: `[B, T]`, nonzero where a token is real; a match with padding in it does
            not count.

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


def invocation_of(config: Any) -> list[int] | None:
    """The invocation tokens in an adapter's configuration; None for a plain LoRA.

    Args:
        config: a `LoraConfig`, or the mapping in an `adapter_config.json`.
    """
    key = "alora_invocation_tokens"
    tokens = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return None if tokens is None else list(tokens)


def last_occurrence(token_ids: Sequence[int], tokens: Sequence[int], begin: int = 0) -> int | None:
    """The start of the last occurrence of `tokens` in a list, at or after `begin`; None if none."""
    # list.index is fast but searches forward, so both lists are reversed.
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


# Different texts that may come before an invocation.
_BEFORE = ("a", "a.", "a ", "a\n", "1", "… ", "</a>", "é")


def encode_invocation(tokenizer: Any, text: str, before: str = "\n") -> list[int]:
    """The token ids that an invocation has in a prompt, right after `before`.

    Many tokenizers give a text different tokens inside a sentence than alone: after a space, the
    first token contains the space. An adapter is found only by the tokens that its prompts contain.

        tokens = encode_invocation(tokenizer, "<judge>")   # prompts end with "\\n<judge>"

    Args:
        tokenizer: a tokenizer of transformers.
        text: the invocation, such as "<judge>".
        before: the text that every prompt has right before it, by default a line break.

    Raises:
        ValueError: the tokens depend on the text in front of `before`, or one of them contains a
            piece of `before`. Choose another text, or another `before`.
    """
    wanted = "".join(text.split())
    if not wanted:
        raise ValueError(f"encode_invocation: {text!r} has no text to find an adapter by")
    rows = [tokenizer.encode(b + before + text, add_special_tokens=False) for b in _BEFORE]
    for length in range(1, min(map(len, rows)) + 1):
        ends = {tuple(row[-length:]) for row in rows}
        shown = tokenizer.decode(list(rows[0][-length:]), clean_up_tokenization_spaces=False)
        letters = "".join(shown.split())  # some tokenizers write a space behind a special token
        if len(ends) > 1 or len(letters) > len(wanted):
            break
        if letters == wanted:
            return list(rows[0][-length:])
    named = [tokenizer.convert_ids_to_tokens(row) for row in rows[:4]]
    raise ValueError(
        f"encode_invocation: {text!r} behind {before!r} has no tokens of its own in this "
        f"tokenizer, but {', '.join(map(str, named))} at the end of different texts; begin it "
        "with a character that joins no other, or give another `before`"
    )
