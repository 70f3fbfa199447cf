"""Where an answer ends, when several rows are generated at once and each has its own end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation import StopStringCriteria

from .options import Settings


def until_end(before: Sequence[int], generated: list[int], settings: Settings) -> list[int]:
    """The answer without the tokens that a batch generates behind the end of a row."""
    ends = settings.ends
    for i, token in enumerate(generated):
        if token in ends:
            generated = generated[: i + 1]
            break
    if not settings.stop_strings:
        return generated
    stops = _stops(settings)
    for length in range(1, len(generated)):
        if _stopped(stops, [*before, *generated[:length]]):
            return generated[:length]
    return generated


class RowStops(StoppingCriteria):
    """Stop strings for rows that have padding behind their first `prefix` tokens.

    Each row is checked without its padding, since a stop string may begin in the row's prompt.
    """

    def __init__(self, settings: Settings, prefix: int, padding: Sequence[int]) -> None:
        self.stops, self.prefix, self.padding = _stops(settings), prefix, padding

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        rows = zip(input_ids.tolist(), self.padding)
        found = [
            _stopped(self.stops, [*row[: self.prefix], *row[self.prefix + gap :]])
            for row, gap in rows
        ]
        return torch.tensor(found, device=input_ids.device)


def check_stop_strings(settings: Settings) -> None:
    """Refuse stop strings that transformers cannot find in this tokenizer's tokens.

    Raises:
        ValueError: says why.
    """
    if not settings.stop_strings:
        return
    try:
        _stops(settings)
    except Exception as error:
        raise ValueError(
            f"{settings.where}: stop_strings cannot be used with this tokenizer: transformers "
            f"fails to read its tokens ({type(error).__name__}: {error}); leave them out, and cut "
            "the answer's text"
        ) from error


def _stops(settings: Settings) -> StopStringCriteria:
    # Not kept here: transformers keeps it, for a tokenizer and its strings.
    tokenizer = settings.get("tokenizer") or settings.tokenizer
    return StopStringCriteria(tokenizer=tokenizer, stop_strings=settings.stop_strings)


def _stopped(stops: StopStringCriteria, ids: list[int]) -> bool:
    return bool(stops(torch.tensor([ids[-stops.maximum_token_len :]]), None)[0])
