"""One turn of a session: the state that it begins from, the tokens that it runs, its answer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache

from ..invocation import last_occurrence
from .adapters import AdapterTable
from .context import Context
from .text import Encoder


class ContextOverflow(ValueError):
    """The context and the answer do not fit into the model's positions."""


@dataclass(frozen=True)
class Answer:
    """What one call generated.

    Attributes:
        text: the generated tokens as text, special tokens left out.
        token_ids: the generated tokens, the ending token included.
        adapter: who answered; None is the base model.
        invocation: the token ids that this call put between the context and the answer.
        invocation_start: position of the adapter's first token; None for the base model.
    """

    text: str
    token_ids: tuple[int, ...]
    adapter: str | None
    invocation: tuple[int, ...]
    invocation_start: int | None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class State:
    """What a session has read. It is replaced as a whole and never changed."""

    context: Context
    cache: Cache  # of the base model, without the tokens that are held back


@dataclass(frozen=True)
class Turn:
    """One row: the base cache that it continues, and the tokens that it runs itself."""

    adapter: str | None  # None: the base model
    cache: Cache  # not written
    cached: list[int]  # the tokens that the cache holds
    suffix: list[int]  # the tokens held back from the cache, then those that the call adds
    added: list[int]  # the tokens that the call adds: its prompt and its invocation
    start: int | None  # absolute position of the adapter's first token

    @property
    def ids(self) -> list[int]:
        """All tokens before the answer."""
        return [*self.cached, *self.suffix]


def plan(
    state: State,
    encoder: Encoder,
    adapters: AdapterTable,
    adapter: str | None,
    prompt: str | Sequence[int] | None,
) -> Turn:
    """Decide which tokens a call runs, and from which of them on its adapter is active.

    Raises:
        ValueError: an empty context, an unknown adapter, a prompt that does not go on at a border
            between tokens, or an invocation that the base model has read already.
    """
    context, cache = state.context, state.cache
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
        return Turn(None, cache, ids[:cached], suffix, added, None)
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
    return Turn(adapter, cache, ids[:cached], suffix, added, cached + start)


def _warn_of_other_tokens(encoder: Encoder, adapter: str, tokens: list[int], prompt: Any) -> None:
    """Warn when a prompt spells an invocation in other tokens than the adapter's."""
    text = encoder.show(tokens).strip()
    if text and isinstance(prompt, str) and text in prompt:
        warnings.warn(
            f"Session: the prompt contains {text!r}, but in other tokens than the invocation "
            f"of {adapter!r} ({encoder.names(tokens)}), which is appended; leave it out of the "
            "prompt, or see alora_kernels.invocation.encode_invocation",
            stacklevel=6,  # the line that calls Session.generate
        )
