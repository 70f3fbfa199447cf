"""Builds batches for aLoRA training: finds the invocation, and masks the labels up to it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..invocation import last_occurrence
from .layout import IGNORE


@dataclass
class AloraDataCollator:
    """Pads rows on the right, finds each invocation, and masks the labels up to its end.

    A feature is one of
        {"prompt_ids", "answer_ids"}            the prompt ends with the invocation
        {"input_ids", "prompt_length"}          prompt and answer in one list
        {"input_ids", "invocation_start"}       the start is known
        {"input_ids"}                           the last invocation of the row counts, as in PEFT
    and may have "labels" (−100 stays −100). If a feature tells where the prompt ends, the last
    invocation in the *prompt* counts, even if the answer contains the invocation again.

    The loss counts every token after the invocation, EOS too. Padding is masked by position, so the
    EOS counts even if the tokenizer uses it as pad token.

    Args:
        invocation_tokens: token ids of the invocation.
        pad_token_id: the token that fills the end of short rows.
        max_length: a longer row loses tokens at the beginning of its prompt, but never the
            invocation. If it is still too long, the end of the answer is cut off, with a warning.
        keep_first: the number of tokens at the beginning of a row that are never cut (1 for a BOS).
        pad_to_multiple_of: pad the batch to a multiple of this length.

    Returns (from a call):
        input_ids, attention_mask, labels, each int64 `[B, T]`, and invocation_starts int64 `[B]`
        (−1 for a row without an invocation).
    """

    invocation_tokens: Sequence[int]
    pad_token_id: int = 0
    max_length: int | None = None
    keep_first: int = 0
    pad_to_multiple_of: int | None = None
    _warned: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self.invocation_tokens = [int(t) for t in self.invocation_tokens]
        if not self.invocation_tokens:
            raise ValueError("AloraDataCollator: invocation_tokens is empty")
        room = self.keep_first + len(self.invocation_tokens)
        if self.max_length is not None and self.max_length <= room:
            raise ValueError(
                f"AloraDataCollator: max_length={self.max_length} leaves no room beside "
                f"{room} tokens of keep_first and invocation"
            )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [self._row(index, feature) for index, feature in enumerate(features)]
        width = max(len(ids) for ids, _, _ in rows)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad_token_id),
            "attention_mask": torch.zeros((len(rows), width), dtype=torch.int64),
            "labels": torch.full((len(rows), width), IGNORE),
            "invocation_starts": torch.tensor([start for _, _, start in rows]),
        }
        for b, (ids, labels, _) in enumerate(rows):
            batch["input_ids"][b, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][b, : len(ids)] = 1
            batch["labels"][b, : len(ids)] = torch.tensor(labels)
        return batch

    def _row(self, index: int, feature: Mapping[str, Any]) -> tuple[list[int], list[int], int]:
        if "prompt_ids" in feature:
            prompt = _ints(feature["prompt_ids"])
            ids = prompt + _ints(feature["answer_ids"])
            boundary: int | None = len(prompt)
        elif "input_ids" in feature:
            ids = _ints(feature["input_ids"])
            given = feature.get("prompt_length")
            boundary = None if given is None else int(given)
        else:
            raise ValueError(
                f"AloraDataCollator: feature {index} has {sorted(feature)}; expected prompt_ids "
                "and answer_ids, or input_ids (with prompt_length or invocation_start)"
            )
        if not ids:
            raise ValueError(f"AloraDataCollator: feature {index} is empty")
        labels = _ints(feature["labels"]) if feature.get("labels") is not None else list(ids)
        if len(labels) != len(ids):
            raise ValueError(
                f"AloraDataCollator: feature {index} has {len(ids)} tokens but {len(labels)} labels"
            )
        start = self._start(index, ids, boundary, feature.get("invocation_start"))
        if start < 0:
            self._warn(
                "missing",
                f"AloraDataCollator: feature {index} holds no invocation {self.invocation_tokens}"
                f"{' in its prompt' if boundary is not None else ''}; it will train nothing",
            )
            after = len(ids) if boundary is None else boundary
        else:
            after = start + len(self.invocation_tokens)
        labels = [IGNORE] * min(after, len(ids)) + labels[after:]
        return self._truncate(index, ids, labels, start)

    def _start(self, index: int, ids: list[int], boundary: int | None, given: Any) -> int:
        if given is not None and int(given) >= 0:
            start = int(given)
            there = ids[start : start + len(self.invocation_tokens)]
            if there != self.invocation_tokens:
                raise ValueError(
                    f"AloraDataCollator: feature {index} has invocation_start={start}, but the "
                    f"tokens there are {there}, not {self.invocation_tokens}"
                )
            if last_occurrence(ids, self.invocation_tokens, start + 1) is not None:
                self._warn_answer(index)
            return start
        stop = len(ids) if boundary is None else boundary
        found = last_occurrence(ids[:stop], self.invocation_tokens)
        start = -1 if found is None else found
        later = last_occurrence(ids, self.invocation_tokens, start + 1)
        if boundary is not None and later is not None:
            self._warn_answer(index)
        return start

    def _truncate(
        self, index: int, ids: list[int], labels: list[int], start: int
    ) -> tuple[list[int], list[int], int]:
        over = 0 if self.max_length is None else len(ids) - self.max_length
        if over <= 0:
            return ids, labels, start
        # A row without an invocation trains nothing, so it does not matter which part is cut.
        first = min(self.keep_first, len(ids)) if start < 0 else min(self.keep_first, start)
        cut = over if start < 0 else min(over, start - first)
        ids, labels = ids[:first] + ids[first + cut :], labels[:first] + labels[first + cut :]
        start = start if start < 0 else start - cut
        if cut < over:
            self._warn(
                "answer_cut",
                f"AloraDataCollator: the invocation and answer of feature {index} alone are longer "
                f"than max_length={self.max_length}; the end of the answer is cut off",
            )
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        return ids, labels, start

    def _warn_answer(self, index: int) -> None:
        self._warn(
            "answer",
            f"AloraDataCollator: the answer of feature {index} contains the invocation; the start "
            "stays in the prompt (PEFT's own search would move it)",
        )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, stacklevel=4)


def _ints(values: Any) -> list[int]:
    return [int(v) for v in (values.tolist() if hasattr(values, "tolist") else values)]
