"""Many adapters over one context in one batched decode."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList

from ..once import log_once
from .attending import attending, sharing_problem
from .endings import RowStops
from .options import Settings
from .probe import first_use_problem
from .shared_prefix import SharedPrefixCache, SharedPrefixError
from .views import shared_layers, view_of

if TYPE_CHECKING:
    from .calls import Call
    from .session import Session

logger = logging.getLogger("alora_kernels")


def ask_together(session: Session, calls: Sequence[Call], settings: Settings) -> list[list[int]]:
    """The generated tokens of each call; one batch when the model can share the prefix."""
    try:
        problem = _problem(session, calls, settings)
        if problem is None:
            return _batched(session, calls, settings)[0]
    except SharedPrefixError as error:
        problem = str(error)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        # Row by row the same is raised again, unless it is the batch that fails.
        text = (str(error).splitlines() or [""])[0]
        problem = f"its forward of several rows fails: {type(error).__name__}: {text}"
    kind = type(session.base).__name__
    log_once(
        logger,
        f"Session.ask: {kind} cannot share one prefix ({problem}); its adapters answer one by one, "
        "each on a view of the cache",
    )
    return [_alone(session, call, settings)[0] for call in calls]


def _problem(session: Session, calls: Sequence[Call], settings: Settings) -> str | None:
    cache = calls[0].cache
    if cache.get_seq_length() == 0:
        return "the context has one token, so there is no prefix"
    if not shared_layers(cache):
        return "some layers of its cache are not plain keys and values"
    padded = len({len(call.suffix) for call in calls}) > 1
    if padded and not session.adapters.takes_positions:
        return "its forward does not take position_ids, and the rows differ in length"
    problem = settings.why_alone(padded) or sharing_problem(session.base, cache, padded)
    if problem is not None:
        return problem
    return first_use_problem(
        session.base,
        cache,
        calls,
        settings,
        batch=lambda some, two: _batched(session, some, two)[1].logits,
        alone=lambda call, two: _alone(session, call, two)[1].logits,
    )


def _batched(
    session: Session, calls: Sequence[Call], settings: Settings
) -> tuple[list[list[int]], Any]:
    """The generated tokens of each call, and all that transformers returned."""
    prefix, cache = calls[0].cached, calls[0].cache
    longest = max(len(call.suffix) for call in calls)
    padding = [longest - len(call.suffix) for call in calls]
    device = session.base.device
    # The padding lies between the prefix and the suffix: position ids, which transformers counts
    # over the mask, are then those of the row alone. It repeats a token that every row has, so that
    # a penalty for tokens that occur is the row's own.
    ids = [[*prefix, *[prefix[-1]] * gap, *call.suffix] for gap, call in zip(padding, calls)]
    mask = [[1] * len(prefix) + [0] * gap + [1] * len(c.suffix) for gap, c in zip(padding, calls)]
    starts = [None if c.start is None else c.start + gap for gap, c in zip(padding, calls)]
    shared = SharedPrefixCache(cache, torch.tensor(padding, device=device))
    options = settings.keywords()
    if settings.stop_strings:
        options["stop_strings"] = None
        stops = RowStops(settings, len(prefix), padding)
        options["stopping_criteria"] = StoppingCriteriaList([stops])
    names = [call.adapter for call in calls]
    with (
        torch.no_grad(),
        attending(session.base, shared),
        session.adapters.scope(names, starts),
    ):
        out = session.base.generate(
            torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            **{session.adapters.cache_argument: shared},
            **options,
        )
    shared.check_read()
    rows = out if isinstance(out, torch.Tensor) else out.sequences
    return rows[:, len(prefix) + longest :].tolist(), out


def _alone(session: Session, call: Call, settings: Settings) -> tuple[list[int], Any]:
    out = session._run(call, view_of(call.cache), settings, 1)
    rows = out if isinstance(out, torch.Tensor) else out.sequences
    return rows[0, len(call.ids) :].tolist(), out
