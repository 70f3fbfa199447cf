"""What one call runs on, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.cache_utils import Cache


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


@dataclass(frozen=True)
class Call:
    """One row: the state of the session that it runs on, and its own tokens."""

    adapter: str | None
    cache: Cache  # of the base model; not written
    cached: list[int]  # the tokens in it
    suffix: list[int]  # the held part of the context, then what the call adds
    added: list[int]
    start: int | None  # absolute position of the adapter's first token

    @property
    def ids(self) -> list[int]:
        """All tokens before the answer."""
        return [*self.cached, *self.suffix]
