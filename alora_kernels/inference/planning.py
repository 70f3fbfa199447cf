"""Which tokens a call runs, and from where on its adapter is on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import Cache

from ..invocation import last_occurrence
from .adapters import AdapterTable
from .calls import Call
from .context import Context
from .text import Encoder


def plan(
    context: Context,
    cache: Cache,
    encoder: Encoder,
    adapters: AdapterTable,
    adapter: str | None,
    prompt: str | Sequence[int] | None,
) -> Call:
    """The row of one call: what is held back of the context, the prompt, the invocation.

    Raises:
        ValueError: an empty context, an unknown adapter, a prompt that does not go on at a border
            between tokens, or an invocation that the base model has read already.
    """
    ids = list(context.ids)
    if not ids:
        raise ValueError("Session: the context is empty; call extend() first")
    cached = cache.get_seq_length()
    if prompt is None or isinstance(prompt, str):
        added = context.prompt(prompt or "", encoder)
    else:
        added = encoder.check_ids(prompt, "Session")
    suffix = [*ids[cached:], *added]
    if adapter is None:
        return Call(None, cache, ids[:cached], suffix, added, None)
    tokens = adapters.tokens(adapter)
    start = last_occurrence(suffix, tokens)
    if start is None:
        if not added and ids[-len(tokens) :] == tokens:
            raise ValueError(
                f"Session: the context ends with the invocation of {adapter!r}, but the base "
                "model has read it already; load adapters before extend(), or leave the "
                "invocation out of the context"
            )
        _warn_of_other_tokens(encoder, adapter, tokens, prompt)
        start = len(suffix)
        added = [*added, *tokens]
        suffix = [*suffix, *tokens]
    return Call(adapter, cache, ids[:cached], suffix, added, cached + start)


def _warn_of_other_tokens(encoder: Encoder, adapter: str, tokens: list[int], prompt: Any) -> None:
    """Say it when a prompt spells an invocation in other tokens than the adapter's."""
    text = encoder.show(tokens).strip()
    if text and isinstance(prompt, str) and text in prompt:
        warnings.warn(
            f"Session: the prompt contains {text!r}, but in other tokens than the invocation "
            f"of {adapter!r} ({encoder.names(tokens)}), which is appended; leave it out of the "
            "prompt, or see alora_kernels.invocation.encode_invocation",
            stacklevel=6,
        )
