"""Messages one by one are the chat as a whole, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alora_kernels.inference import Session

from .tiny import INVOCATIONS, base_model, peft_model, tokenizer
from .tokenizers_of_kinds import KINDS, tokenizer_of

END = "§\n"
TURN = "{{ '<' + m['role'][0] + '>' + (m['content'] | trim) + '§\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
PLAIN = "^{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
ALTERNATE = (
    "^{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{% endfor %}" + PROMPT
)
MERGED = (
    "^{% set s = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set s = messages[0]['content'] + '\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + (s if loop.first else '') "
    "+ m['content'] + '§\n' }}{% endfor %}" + PROMPT
)
# Drops what an earlier answer thought, as Qwen 3 and DeepSeek R1.
THINKING = (
    "^{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set c = c.split('|')[-1] %}{% endif %}"
    "{{ '<' + m['role'][0] + '>' + c + '§\n' }}{% endfor %}" + PROMPT
)
SYSTEM, USER, ANSWER = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
)
MORE = {"role": "user", "content": "more"}


def chat_session(template: str) -> Session:
    return Session(base_model("llama", 3), tokenizer(template))


def rendered(session: Session, messages: list[Any], prompt: bool = False) -> list[int]:
    text = session.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )
    return list(session.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (PLAIN, [[SYSTEM], [USER], [ANSWER], [MORE]]),
        (ALTERNATE, [[USER], [ANSWER], [MORE]]),
        (ALTERNATE, [[USER, ANSWER], [MORE]]),
        (MERGED, [[SYSTEM], [USER], [ANSWER], [MORE]]),
        (MERGED, [[SYSTEM, USER], [ANSWER, MORE]]),
        (MERGED.removeprefix("^"), [[SYSTEM], [USER]]),  # the first renders to nothing
        (THINKING, [[USER], [ANSWER], [MORE]]),
    ],
)
def test_messages_are_the_chat_as_a_whole(template: str, turns: list[list[Any]]) -> None:
    session = chat_session(template)
    chat: list[Any] = []
    for turn in turns:
        session.extend(turn)
        chat += turn
        assert list(session.token_ids) == rendered(session, chat)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_with_every_kind_of_tokenizer(kind: str) -> None:
    template = (
        "<bos>{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<turn>\n{% endfor %}"
    )
    session = Session(base_model("llama", 3, vocab_size=420), tokenizer_of(kind, template))
    chat = [USER, ANSWER, MORE, ANSWER]
    for i, message in enumerate(chat):
        session.extend([message])
        assert list(session.token_ids) == rendered(session, chat[: i + 1])


def test_a_generation_prompt_goes_on_with_the_assistant() -> None:
    session = chat_session(ALTERNATE).extend([USER], add_generation_prompt=True)
    assert list(session.token_ids) == rendered(session, [USER], True)
    with pytest.raises(ValueError, match=r"roles user, user.*roles must alternate"):
        session.extend([MORE])
    session.extend([ANSWER, MORE])
    assert list(session.token_ids) == rendered(session, [USER, ANSWER, MORE])
    free = chat_session(PLAIN).extend([USER], add_generation_prompt=True)
    with pytest.raises(ValueError, match="does not begin with what is in the context"):
        free.extend([MORE])


def test_an_answer_by_text_is_the_assistants_turn() -> None:
    for text in ("yes", "yes§"):
        session = chat_session(ALTERNATE).extend([USER], add_generation_prompt=True)
        session.extend(text).extend([MORE])
        assert list(session.token_ids) == rendered(session, [USER, ANSWER, MORE])


def kept(session: Session, text: str, adapter: str | None = None) -> None:
    """Keep an answer as if the model had generated `text`."""
    ids = session.tokenizer(text, add_special_tokens=False)["input_ids"]
    session.base.generate = lambda given, **_: torch.cat([given, torch.tensor([ids])], dim=-1)
    try:
        assert session.generate(adapter, keep=True).token_ids == tuple(ids)
    finally:
        del session.base.generate


@pytest.mark.parametrize("text", ["yes§", "yes"])  # ended, or cut by max_new_tokens
@pytest.mark.parametrize("template", [PLAIN, ALTERNATE, MERGED, THINKING])
def test_a_message_behind_a_kept_answer(template: str, text: str) -> None:
    session = chat_session(template).extend([USER], add_generation_prompt=True)
    kept(session, text)
    session.extend([MORE], add_generation_prompt=True)
    assert list(session.token_ids) == rendered(session, [USER, ANSWER, MORE], True)
    kept(session, "yes§")
    session.extend([MORE])
    assert list(session.token_ids) == rendered(session, [USER, ANSWER, MORE, ANSWER, MORE])


def test_the_space_that_a_template_trims_stays_in_a_kept_answer() -> None:
    session = chat_session(ALTERNATE).extend([USER], add_generation_prompt=True)
    kept(session, " yes\n§")
    session.extend([MORE])
    assert session.tokenizer.decode(session.token_ids) == "^<u>hi§\n<a> yes\n§\n<u>more§\n"


def test_thoughts_that_a_template_takes_back_are_refused() -> None:
    session = chat_session(THINKING).extend([USER], add_generation_prompt=True)
    kept(session, "hm|yes§")
    before = session.token_ids
    with pytest.raises(ValueError, match="renders earlier messages differently once these follow"):
        session.extend([MORE])
    assert session.token_ids == before
    session.extend("more")  # text goes on


def test_an_adapters_answer_is_an_assistant_message() -> None:
    """Its invocation stays where the template would have written the generation prompt."""
    model = peft_model("llama", 3)
    session = Session(model, tokenizer(ALTERNATE)).extend([USER])
    kept(session, "yes§", "red")
    session.extend([MORE])
    head, red = rendered(session, [USER]), INVOCATIONS["red"]
    tail = session.tokenizer("yes§\n<u>more§\n", add_special_tokens=False)["input_ids"]
    assert list(session.token_ids) == [*head, *red, *tail]
    kept(session, "yes§", "green")  # two answers in a row are one turn
    kept(session, "no§", "blue")
    session.extend([USER])
    assert session.tokenizer.decode(session.token_ids).endswith("no§\n<u>hi§\n")


def test_a_prompt_that_is_the_generation_prompt() -> None:
    session = chat_session(ALTERNATE).extend([USER])
    session.generate(prompt="<a>", keep=True, max_new_tokens=3, min_new_tokens=3)
    answer = session.token_ids[-3:]
    session.extend([MORE])
    text = session.tokenizer.decode(answer)
    close = session.tokenizer.decode(session.token_ids).partition(text)[2]
    assert close == "§\n<u>more§\n"


def test_messages_behind_text_or_token_ids_go_on_in_mid_chat() -> None:
    """What is there is not known to the template: no second beginning, and no close."""
    for first in ("^<u>hi§\n<a>yes§\n", None):
        session = chat_session(ALTERNATE)
        session.extend(first or rendered(session, [USER, ANSWER]))
        session.extend([MORE]).extend([ANSWER])
        assert list(session.token_ids) == rendered(session, [USER, ANSWER, MORE, ANSWER])


def test_messages_given_are_not_the_callers_to_change() -> None:
    session, message = chat_session(PLAIN), dict(USER)
    session.extend([message])
    message["content"] = "other"
    session.extend([ANSWER])
    assert list(session.token_ids) == rendered(session, [USER, ANSWER])


@pytest.mark.parametrize("steps", ["message", "answer", "text", "ids"])
def test_a_loaded_session_goes_on_as_the_saved_one(tmp_path: Path, steps: str) -> None:
    session = chat_session(ALTERNATE).extend([USER], add_generation_prompt=steps != "ids")
    if steps == "answer":
        kept(session, "yes§")
    elif steps == "text":
        session.extend("yes")
    elif steps == "ids":
        session.extend([40, 41])
    session.save(tmp_path / "a")
    other = Session.load(tmp_path / "a", session.model, session.tokenizer)
    assert other._state.context == session._state.context
    for s in (session, other):
        s.extend([ANSWER, MORE] if steps == "message" else [MORE if steps != "ids" else ANSWER])
    assert other.token_ids == session.token_ids


def test_a_message_that_json_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    session = chat_session(PLAIN).extend([{**USER, "extra": object()}])
    with pytest.raises(TypeError, match="a message holds what JSON cannot"):
        session.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
