"""Many turns at once: all adapters answer in one batch over one copy of the base cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from ..once import log_once
from .attending import attending, sharing_problem
from .endings import RowStops
from .options import Settings
from .probe import first_use_problem
from .runner import Runner
from .shared_prefix import SharedPrefixCache, SharedPrefixError
from .turns import Turn
from .views import shared_layers, view_of

logger = logging.getLogger("alora_kernels")


def answer_together(runner: Runner, turns: Sequence[Turn], settings: Settings) -> list[list[int]]:
    """The generated tokens of each turn, in one batch when the model can share the prefix.

    Args:
        turns: of one base cache.
    """
    try:
        problem = _problem(runner, turns, settings)
        if problem is None:
            return _batched(runner, turns, settings)[0]
    except SharedPrefixError as error:
        problem = str(error)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        # A mistake of the caller raises again below, row by row; a fault of the batch does not.
        text = (str(error).splitlines() or [""])[0]
        problem = f"its forward of several rows fails: {type(error).__name__}: {text}"
    kind = type(runner.base).__name__
    log_once(
        logger,
        f"Session.ask: {kind} cannot share one prefix ({problem}); its adapters answer one by one, "
        "each on a view of the cache",
    )
    return [_alone(runner, turn, settings)[0] for turn in turns]


def _problem(runner: Runner, turns: Sequence[Turn], settings: Settings) -> str | None:
    """Why the turns cannot be answered in one batch, or None."""
    cache = turns[0].cache
    if cache.get_seq_length() == 0:
        return "the context has one token, so there is no prefix"
    if not shared_layers(cache):
        return "some layers of its cache are not plain keys and values"
    padded = len({len(turn.suffix) for turn in turns}) > 1
    if padded and not runner.takes_positions:
        return "its forward does not take position_ids, and the rows differ in length"
    problem = settings.why_alone(padded) or sharing_problem(runner.base, cache, padded)
    if problem is not None:
        return problem
    return first_use_problem(
        runner.base,
        cache,
        turns,
        settings,
        batch=lambda some, two: _batched(runner, some, two)[1].logits,
        alone=lambda turn, two: _alone(runner, turn, two)[1].logits,
    )


def _batched(
    runner: Runner, turns: Sequence[Turn], settings: Settings
) -> tuple[list[list[int]], Any]:
    """The generated tokens of each turn, and all that transformers returned."""
    prefix, cache = turns[0].cached, turns[0].cache
    longest = max(len(turn.suffix) for turn in turns)
    padding = [longest - len(turn.suffix) for turn in turns]
    # The padding lies between the prefix and a row's own tokens. transformers counts positions over
    # the mask, so each row has the positions that it has alone. The padding repeats a token that
    # all rows have, so that a penalty for repeated tokens is what it is for the row alone.
    ids = [[*prefix, *[prefix[-1]] * gap, *turn.suffix] for gap, turn in zip(padding, turns)]
    mask = [[1] * len(prefix) + [0] * gap + [1] * len(t.suffix) for gap, t in zip(padding, turns)]
    starts = [None if t.start is None else t.start + gap for gap, t in zip(padding, turns)]
    shared = SharedPrefixCache(cache, torch.tensor(padding, device=runner.base.device))
    options = settings.keywords()
    if settings.stop_strings:
        options["stop_strings"] = None
        stops = RowStops(settings, len(prefix), padding)
        options["stopping_criteria"] = StoppingCriteriaList([stops])
    names = [turn.adapter for turn in turns]
    with (
        torch.no_grad(),
        attending(runner.base, shared),
        runner.adapters.scope(names, starts),
    ):
        out = runner.generate(torch.tensor(ids), torch.tensor(mask), shared, options)
    shared.check_read()
    return _rows(out)[:, len(prefix) + longest :].tolist(), out


def _alone(runner: Runner, turn: Turn, settings: Settings) -> tuple[list[int], Any]:
    """The generated tokens of one turn, and all that transformers returned."""
    out = runner.answer(turn, view_of(turn.cache), settings)
    return _rows(out)[0, len(turn.ids) :].tolist(), out


def _rows(out: Any) -> Tensor:
    """The token ids in what transformers' `generate` returned, which depends on its options."""
    return out if isinstance(out, Tensor) else out.sequences
