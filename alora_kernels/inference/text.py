"""Turns text into token ids, so that a text given in pieces has the tokens of the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# If the tokens before a text cannot be used, the text is tokenised behind one of these.
_BEFORE = ("\n", ".", "a", "1")
# A text is tokenised behind so many of the tokens before it, if these are enough.
_TAILS = (16, 256)


class Encoder:
    """Tokenises a text at the start of a context, or behind tokens that are already there."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def plain(self, text: str) -> list[int]:
        """The tokens of a text. Special tokens are among them only if the text contains them."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def lead(self) -> list[int]:
        """What the tokenizer puts before a text: BOS, or nothing."""
        text = "a"
        body, whole = self.plain(text), list(self.tokenizer(text)["input_ids"])
        for i in range(len(whole) - len(body) + 1):
            if whole[i : i + len(body)] == body:
                return whole[:i]
        return []

    def after(self, ids: Sequence[int], text: str) -> list[int]:
        """The tokens of `text` where it goes on behind `ids`, which stay as they are.

        No space between words is added or lost: the text is tokenised together with the text of the
        last tokens. That fails if tokens would merge across the seam, or if no text has these
        tokens (those of a generated answer, for one). Then it is tokenised behind a neutral
        character.
        """
        ids = list(ids)
        if not text or not ids or ids == self.lead():
            return self.plain(text)
        for size in (*(n for n in _TAILS if n < len(ids)), len(ids)):
            shown = self.show(ids[-size:])
            alone = self.plain(shown)
            if alone and alone[-1] == ids[-1] and _begins(whole := self.plain(shown + text), alone):
                return whole[len(alone) :]
        for before in _BEFORE:
            alone, whole = self.plain(before), self.plain(before + text)
            if _begins(whole, alone):
                return whole[len(alone) :]
        return self.plain(text)

    def show(self, ids: Sequence[int]) -> str:
        """The text of token ids, with special tokens written out."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def names(self, ids: Sequence[int]) -> list[str]:
        """Token ids as the tokenizer calls them, for errors."""
        return [str(name) for name in self.tokenizer.convert_ids_to_tokens(list(ids))]

    def check_ids(self, ids: Sequence[Any], where: str) -> list[int]:
        """Token ids as a list.

        Raises:
            ValueError: one is not an id of this tokenizer.
        """
        size = len(self.tokenizer)
        for i in ids:
            if isinstance(i, bool) or not hasattr(i, "__index__") or not 0 <= int(i) < size:
                raise ValueError(
                    f"{where}: {i!r} is not a token id of this tokenizer (0 to {size - 1})"
                )
        return [int(i) for i in ids]


def _begins(ids: Sequence[int], beginning: Sequence[int]) -> bool:
    return list(ids[: len(beginning)]) == list(beginning)
