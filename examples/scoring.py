"""Held-out exact match with its interval, and generation in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rows import Example


@dataclass(frozen=True)
class Score:
    """`right` of `count` answers equal to the letter."""

    right: int
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        z, n = 1.959964, self.count
        p = self.right / n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        share = self.right / self.count
        return f"{self.right}/{self.count} = {share:.1%}  [{low:.1%}, {high:.1%}]"


@torch.no_grad()
def exact_match(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda count: None,
) -> tuple[Score, list[str]]:
    """Greedy answers of a model in eval mode, compared with the rows' after stripping spaces."""
    was_training = model.training
    model.eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts: dict[int, str] = {}
    # Rows of like length share a batch: less padding.
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
            max_new_tokens=max(len(examples[i].answer_ids) for i in chosen) + 4,
            pad_token_id=pad,
        )
        for i, row in zip(chosen, out):
            texts[i] = tokenizer.decode(row[width:], skip_special_tokens=True).strip()
        on_batch(len(chosen))
    model.train(was_training)
    answers = [texts[i] for i in range(len(examples))]
    right = sum(text == example.answer.strip() for text, example in zip(answers, examples))
    return Score(right, len(examples)), answers
