"""Text and chat messages to the token ids that continue a context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# A finished exchange: what a template puts before later messages is learnt from it.
_EXCHANGE = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


class Encoder:
    """Encodes what is appended to a context.

    Args:
        tokenizer: with a chat template, if messages are to be given.
        eos_ids: the tokens that end a turn.
    """

    def __init__(self, tokenizer: Any, eos_ids: Iterable[int]) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = set(eos_ids)

    def encode(
        self, content: Any, context: Sequence[int], add_generation_prompt: bool
    ) -> list[int]:
        """Token ids of `content` after `context`."""
        if isinstance(content, str):
            if add_generation_prompt:
                raise ValueError(
                    "Session.extend: add_generation_prompt belongs to messages; write the prompt "
                    "into the text"
                )
            return self._ids(content, special=not context)
        content = list(content)
        if not content:
            return []
        if all(isinstance(item, int) for item in content):
            self._check_ids(content)
            return content
        if not all(isinstance(item, Mapping) and "role" in item for item in content):
            raise TypeError(
                "Session.extend: expected text, token ids, or messages such as "
                '{"role": "user", "content": "..."}'
            )
        return self._messages(content, context, add_generation_prompt)

    def encode_prompt(self, prompt: str | Sequence[int] | None) -> list[int]:
        """Token ids of a call's own prompt: no special tokens are added."""
        if prompt is None:
            return []
        if isinstance(prompt, str):
            return self._ids(prompt, special=False)
        ids = list(prompt)
        self._check_ids(ids)
        return ids

    def _check_ids(self, ids: Sequence[Any]) -> None:
        size = len(self.tokenizer)
        wrong = [i for i in ids if not isinstance(i, int) or not 0 <= i < size]
        if wrong:
            raise ValueError(
                f"Session: {wrong[0]!r} is not a token id of this tokenizer (0 to {size - 1})"
            )

    def _ids(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _messages(
        self, messages: list[Any], context: Sequence[int], add_generation_prompt: bool
    ) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "Session.extend: this tokenizer has no chat template, so messages cannot be "
                "rendered; set tokenizer.chat_template, or give text"
            )
        if not context:
            # The template writes BOS itself.
            return self._ids(self._render(messages, add_generation_prompt), special=False)
        before = self._render(_EXCHANGE, False)
        whole = self._render([*_EXCHANGE, *messages], add_generation_prompt)
        if not whole.startswith(before):
            raise ValueError(
                "Session.extend: this chat template renders earlier messages differently once "
                "others follow, so a context cannot be continued with it; give text"
            )
        text = whole[len(before) :]
        if context[-1] in self.eos_ids:
            # A kept answer ends with its end-of-turn token; the template may put more after it.
            end = self.tokenizer.decode([context[-1]])
            _, found, rest = before.rpartition(end)
            if found:
                text = rest + text
        return self._ids(text, special=False)

    def _render(self, messages: Sequence[Any], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
