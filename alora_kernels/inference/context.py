"""What a session was given: token ids, and the text and messages that they came from."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .chat import ChatTemplate, Message, assistant
from .text import Encoder


@dataclass(frozen=True)
class Context:
    """The token ids of a session, and what is needed to continue them.

    Attributes:
        ids: the tokens.
        border: the tokens before it came as ids, or were generated; they stay as they are.
        text: the text whose tokens are `ids[border:]`.
        messages: those of the chat so far, with kept answers among them.
        rendered: what the template made of the messages.
        prompted: `rendered` ends with a generation prompt.
        since: the text of everything behind `rendered` that did not come as a message.
        answer: the text of the last answer that was kept behind `rendered`.
    """

    ids: tuple[int, ...] = ()
    border: int = 0
    text: str = ""
    messages: tuple[Message, ...] = ()
    rendered: str = ""
    prompted: bool = False
    since: str = ""
    answer: str | None = None

    def with_ids(self, ids: Sequence[int], encoder: Encoder) -> Context:
        """The context with token ids behind it."""
        whole = (*self.ids, *ids)
        since = self.since + encoder.show(ids)
        return replace(self, ids=whole, border=len(whole), text="", since=since, answer=None)

    def with_answer(self, added: Sequence[int], answer: Any, encoder: Encoder) -> Context:
        """The context with the tokens that a call added, and its answer, behind it."""
        behind = self.with_ids([*added, *answer.token_ids], encoder)
        return replace(behind, answer=answer.text)

    def with_text(self, text: str, cached: int, encoder: Encoder) -> Context:
        """The context with a text behind it. Its first `cached` tokens were read and must stay."""
        if not self.ids:
            lead = tuple(encoder.lead())
            start = replace(self, ids=lead, border=len(lead))
            return replace(start, ids=(*lead, *encoder.plain(text)), text=text, since=text)
        behind = self._continued(text, cached, encoder)
        return replace(behind, since=self.since + text, answer=None)

    def with_messages(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        cached: int,
        encoder: Encoder,
        ends: Collection[int],
    ) -> Context:
        """The context with messages behind it. `ends` are the tokens that end an answer."""
        template = ChatTemplate(encoder.tokenizer)
        new = tuple(copy.deepcopy(list(messages)))
        known, text = self._rendering(new, add_generation_prompt, template, encoder, ends)
        if self.ids:
            behind = self._continued(text, cached, encoder)
        else:  # the template writes BOS itself
            behind = replace(self, ids=tuple(encoder.plain(text)), border=0, text=text)
        chat = known + new
        return replace(
            behind,
            messages=chat,
            rendered=template.render(chat, add_generation_prompt),
            prompted=add_generation_prompt,
            since="",
            answer=None,
        )

    def prompt(self, text: str, encoder: Encoder) -> list[int]:
        """The tokens of a call's own text behind the context. The context stays as it is."""
        if not text:
            return []
        behind = self._continued(text, len(self.ids), encoder)
        return list(behind.ids[len(self.ids) :])

    # ------------------------------------------------------------------ how

    def _continued(self, text: str, fixed: int, encoder: Encoder) -> Context:
        """The context with a text behind it: its own text and the new one are tokenised as one.

        Raises:
            ValueError: one of the first `fixed` tokens would change.
        """
        whole = self.text + text
        tokens = encoder.after(self.ids[: self.border], whole)
        kept = self.ids[self.border : max(fixed, self.border)]
        if tuple(tokens[: len(kept)]) != kept:
            at = next(i for i, a in enumerate((*tokens, -1)) if i >= len(kept) or a != kept[i])
            raise ValueError(
                "Session: this text does not go on at a border between tokens: the context ends "
                f"in the tokens {encoder.names(kept[at:])}, but both texts together have "
                f"{encoder.names(tokens[at : at + 4])} there. End the context before that place "
                "(a space belongs to the word behind it), or give token ids"
            )
        return replace(self, ids=(*self.ids[: self.border], *tokens), text=whole)

    def _rendering(
        self,
        new: tuple[Message, ...],
        prompted: bool,
        template: ChatTemplate,
        encoder: Encoder,
        ends: Collection[int],
    ) -> tuple[tuple[Message, ...], str]:
        """The messages before `new`, and what the template writes behind the context."""
        last = self.ids[-1:]
        special = set(ends) | set(getattr(encoder.tokenizer, "all_special_ids", ()))
        ended_by = encoder.show(last) if special.intersection(last) else ""
        if not self.messages:
            if not self.ids:
                return (), template.render(new, prompted)
            return template.behind_other(self.answer, new, prompted, ended_by)
        if not self.since:
            whole = template.render([*self.messages, *new], prompted)
            return self.messages, template.difference(whole, self.rendered)
        if self.answer is None and not self.prompted:
            return self.messages, template.behind(self.messages, new, prompted)
        # The text behind the messages is the assistant's turn.
        turn = self.since.removesuffix(ended_by)
        if self.prompted:
            known = (*self.messages, assistant(turn))
            whole = template.render([*known, *new], prompted)
            if whole.startswith(self.rendered + self.since):
                return known, whole[len(self.rendered + self.since) :]
        close = template.close(self.messages, ended_by)
        known = self.messages
        if self.prompted or known[-1].get("role") != "assistant":
            known = (*known, assistant(turn if self.answer is None else self.answer))
        template.difference(template.render(known), self.rendered)
        return known, close + template.behind(known, new, prompted)


def kind_of(content: Any) -> str:
    """ "ids" or "messages", of a sequence that is not empty.

    Raises:
        TypeError: it is neither.
    """
    if all(isinstance(item, Mapping) and "role" in item for item in content):
        return "messages"
    if all(hasattr(item, "__index__") and not isinstance(item, bool) for item in content):
        return "ids"
    raise TypeError(
        "Session.extend: expected text, token ids, or messages such as "
        '{"role": "user", "content": "..."}'
    )
