"""Turns rows of a chat data set into token ids, and reports every mistake in them early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class RowError(ValueError):
    """A row cannot be trained on. The message says which row, and why."""


@dataclass(frozen=True)
class Example:
    """One row: the prompt's token ids with the invocation, and the answer's with EOS."""

    messages: Messages
    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def feature(self) -> dict[str, list[int]]:
        return {"prompt_ids": self.prompt_ids, "answer_ids": self.answer_ids}


def load_rows(source: str, split: str = "train") -> list[Messages]:
    """Chats from a local json, jsonl or parquet file, or from a data set on the hub.

    A row has `messages`, or `input` and `output`, or `prompt` and `completion`.
    """
    from datasets import load_dataset

    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in READERS:
            raise RowError(f"{path}: expected one of {', '.join(READERS)}, got {path.suffix!r}")
        data = load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    elif path.suffix in READERS:
        raise FileNotFoundError(f"{path} does not exist")
    else:
        try:
            data = load_dataset(source, split=split)
        except Exception as error:
            raise RowError(
                f"{source!r} is not a local file, and it could not be loaded from the hub: {error}"
            ) from error
    return [_messages(i, row) for i, row in enumerate(data)]


def _messages(index: int, row: dict[str, Any]) -> Messages:
    if row.get("messages"):
        messages = [
            {"role": m["role"], "content": m["content"]} for m in row["messages"] if m["content"]
        ]
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise RowError(f"row {index}: messages must end with the assistant's answer")
        return messages
    for prompt, answer in (("input", "output"), ("prompt", "completion")):
        if prompt in row and answer in row:
            text = row[answer][0] if isinstance(row[answer], list) else row[answer]
            return [
                {"role": "user", "content": str(row[prompt])},
                {"role": "assistant", "content": str(text)},
            ]
    raise RowError(
        f"row {index} has {sorted(row)}; expected messages, input and output, or prompt and "
        "completion"
    )


def encode(
    tokenizer: Any, rows: Sequence[Messages], invocation: str, eos_ids: Sequence[int]
) -> list[Example]:
    """Render and tokenise each chat, and check that its prompt contains the invocation.

    The template writes BOS itself, so the tokenizer adds none. The answer ends with its first
    end token.
    """
    wanted = tokenizer(invocation, add_special_tokens=False)["input_ids"]
    if not wanted:
        raise RowError("--invocation_string is empty")
    result = []
    for index, messages in enumerate(rows):
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        if invocation not in prompt:
            # The user's own invocation follows the chat, in place of the generation prompt.
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False) + invocation
            answer = messages[-1]["content"] + (tokenizer.eos_token or "")
        elif whole.startswith(prompt):
            answer = whole[len(prompt) :]
        else:
            raise RowError(
                f"row {index}: the chat template renders the chat differently once it is answered"
            )
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not contains(prompt_ids, wanted):
            raise RowError(_merged(tokenizer, index, invocation, wanted, prompt_ids))
        if tokenizer.bos_token_id is not None and prompt_ids.count(tokenizer.bos_token_id) > 1:
            raise RowError(f"row {index} begins with more than one BOS token")
        ends = [i for i, token in enumerate(answer_ids) if token in eos_ids]
        if not ends:
            raise RowError(
                f"row {index}: the answer has no end token ({sorted(eos_ids)}), so the model would "
                "not learn to stop"
            )
        result.append(Example(messages, prompt_ids, answer_ids[: ends[0] + 1]))
    return result


def contains(ids: Sequence[int], wanted: Sequence[int]) -> bool:
    n = len(wanted)
    return any(list(ids[i : i + n]) == list(wanted) for i in range(len(ids) - n + 1))


def _merged(
    tokenizer: Any, index: int, invocation: str, wanted: Sequence[int], ids: Sequence[int]
) -> str:
    def show(tokens: Sequence[int]) -> str:
        return " ".join(repr(tokenizer.decode([t])) for t in tokens)

    return (
        f"row {index}: the text contains the invocation {invocation!r}, but its tokens do not: the "
        "tokenizer merged it with its neighbours.\n"
        f"  the invocation alone: {show(wanted)}\n"
        f"  the end of the row:   {show(ids[-len(wanted) - 6 :])}\n"
        "Choose an invocation that begins and ends with a special token or a line break."
    )
