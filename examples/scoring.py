"""Exact match on held-out rows with its confidence interval, and generation in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rows import Example
from transformers import StoppingCriteria, StoppingCriteriaList


@dataclass(frozen=True)
class Score:
    """`right` of `count` answers are exactly as expected."""

    right: int
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the fraction of right answers."""
        z, n = 1.959964, self.count
        p = self.right / n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        share = self.right / self.count
        return f"{self.right}/{self.count} = {share:.1%}  [{low:.1%}, {high:.1%}]"


class Mismatch(StoppingCriteria):
    """Stops a row when its answer can no longer become the expected one.

    Generation only appends tokens. So what was generated must be the beginning of the expected
    answer, or all of it followed by spaces. Anything else is wrong, whatever follows.
    Texts are compared, as in the score: other tokens that spell the same answer are right.
    """

    def __init__(self, tokenizer: Any, width: int, expected: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.width = width  # of the padded prompts, in tokens
        self.expected = [text.strip() for text in expected]

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = (decode(self.tokenizer, row[self.width :]) for row in input_ids)
        wrong = [not may_become(text, want) for text, want in zip(texts, self.expected)]
        return torch.tensor(wrong, device=input_ids.device)


def may_become(text: str, expected: str) -> bool:
    """Whether `text`, continued and stripped, can equal `expected`."""
    text = text.lstrip().rstrip("\ufffd")  # the other bytes of the character are yet to come
    return expected.startswith(text) or text.rstrip() == expected


def decode(tokenizer: Any, ids: Any) -> str:
    # Cleaning would remove spaces that are already there, once more tokens follow.
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def answer_limit(examples: Sequence[Example]) -> int:
    """How many tokens a model may generate on these rows: the longest answer, and a few more."""
    return max(len(e.answer_ids) for e in examples) + 4


@torch.no_grad()
def exact_match(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda count: None,
) -> tuple[Score, list[str]]:
    """Greedy answers of a model in eval mode, compared with the rows' answers without outer spaces.

    A row ends at its end token, where it went wrong (`Mismatch`), or after `answer_limit` tokens.
    So a wrong answer is returned only as far as it was generated.
    """
    limit = answer_limit(examples)
    was_training = model.training
    model.eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts: dict[int, str] = {}
    # Rows of similar length share a batch, so there is less padding.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        rows = [examples[i].prompt_ids for i in chosen]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(r)) + [1] * len(r) for r in rows], device=model.device
        )
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=limit,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList(
                [Mismatch(tokenizer, width, [examples[i].answer for i in chosen])]
            ),
        )
        for i, row in zip(chosen, out):
            texts[i] = decode(tokenizer, row[width:]).strip()
        on_batch(len(chosen))
    model.train(was_training)
    answers = [texts[i] for i in range(len(examples))]
    right = sum(text == example.answer.strip() for text, example in zip(answers, examples))
    return Score(right, len(examples)), answers
