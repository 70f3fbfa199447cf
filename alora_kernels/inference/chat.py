"""New messages behind those of a context: the whole chat is rendered, and its end is new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
# Stands for an answer, to see what the template writes behind one.
_ANSWER = "alora0answer"
_OTHER_ANSWER = "another0answer0of0alora"
# Stands for the text or token ids that a chat continues.
_QUESTION: tuple[Message, ...] = ({"role": "user", "content": "x"},)


class ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        ValueError: the tokenizer has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "Session.extend: this tokenizer has no chat template, so messages cannot be "
                "rendered; set tokenizer.chat_template, or give text"
            )

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a chat.

        Raises:
            ValueError: the template refuses these messages.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # Jinja's, or whatever the template raises
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise ValueError(
                f"Session.extend: the chat template refuses the session's messages together with "
                f"these (roles {roles}): {error}; give messages that it accepts in this order, "
                "or text"
            ) from error

    def behind(self, known: Sequence[Message], new: Sequence[Message], prompted: bool) -> str:
        """What the template writes for `new` behind the finished messages `known`."""
        before, whole = self.render(known), self.render([*known, *new], prompted)
        return self.difference(whole, before)

    def close(self, known: Sequence[Message], ended_by: str) -> str:
        """What the template writes behind an answer to `known`.

        Args:
            ended_by: the text of the answer's last token, if that token ends the answer; else "".

        Raises:
            ValueError: the template changes an answer, or writes something that depends on it.
        """
        if known[-1].get("role") == "assistant":
            known = known[:-1]
        before, found, rest = self.render([*known, assistant(_ANSWER)]).rpartition(_ANSWER)
        other = self.render([*known, assistant(_OTHER_ANSWER)]).rpartition(_OTHER_ANSWER)
        gap, end, behind = rest.partition(ended_by) if ended_by else ("", "", rest)
        if not found or other != (before, _OTHER_ANSWER, rest) or (end and gap.strip()):
            shown = before[-10:] + found + rest
            raise ValueError(
                "Session.extend: this chat template changes an answer, or puts text around it that "
                f"depends on it, so no message can follow a kept one: it makes {shown!r} of one. "
                "Begin a new session with the whole chat, or continue this one with text"
            )
        return behind if end else rest

    def behind_other(
        self, answer: str | None, new: Sequence[Message], prompted: bool, ended_by: str
    ) -> tuple[tuple[Message, ...], str]:
        """What the template writes for `new` behind a context that is not known as messages.

        Args:
            answer: the text of an answer that was kept at the end of the context, if there is one.

        Returns:
            Messages that stand for the context, and the text.
        """
        if new[0].get("role") == "assistant":
            return _QUESTION, self.behind(_QUESTION, new, prompted)
        known = (*_QUESTION, assistant(_ANSWER if answer is None else answer))
        text = self.behind(known, new, prompted)
        if answer is not None or ended_by:
            text = self.close(_QUESTION, ended_by) + text
        return known, text

    def difference(self, whole: str, before: str) -> str:
        """What `whole` has behind `before`.

        Raises:
            ValueError: `whole` does not begin with `before`.
        """
        if not whole.startswith(before):
            at = next(
                (i for i, (a, b) in enumerate(zip(whole, before)) if a != b),
                min(len(whole), len(before)),
            )
            raise ValueError(
                "Session.extend: the chat as a whole does not begin with what is in the context: "
                "this chat template renders earlier messages differently once these follow. "
                f"The context has {_piece(before, at)!r} where the whole chat has "
                f"{_piece(whole, at)!r}. Begin a new session with the whole chat, or continue this "
                "one with text"
            )
        return whole[len(before) :]


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _piece(text: str, at: int) -> str:
    return text[max(0, at - 10) : at + 30]
