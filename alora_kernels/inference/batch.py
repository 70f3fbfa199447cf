"""Many adapters over one context in one batched decode."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .shared_prefix import SharedPrefixCache, SharedPrefixError, attending, sharing_problem
from .views import shared_layers, view_of

if TYPE_CHECKING:
    from .calls import Call
    from .session import Session

logger = logging.getLogger("alora_kernels")
_said: set[tuple[str, str]] = set()


def ask_together(
    session: Session, calls: Sequence[Call], options: Mapping[str, Any]
) -> list[list[int]]:
    """The generated tokens of each call; one batch when the model can share the prefix."""
    problem = _problem(session, calls)
    if problem is None:
        try:
            return _batched(session, calls, dict(options))
        except SharedPrefixError as error:
            problem = str(error)
    kind = type(session.base).__name__
    if (kind, problem) not in _said:
        _said.add((kind, problem))
        logger.warning(
            "Session.ask: %s cannot share one prefix (%s); its adapters answer one by one, each on "
            "a view of the cache",
            kind,
            problem,
        )
    return [_alone(session, call, dict(options)) for call in calls]


def _problem(session: Session, calls: Sequence[Call]) -> str | None:
    cache = calls[0].cache
    if cache.get_seq_length() == 0:
        return "the context has one token, so there is no prefix"
    if not shared_layers(cache):
        return "some layers of its cache are not plain keys and values"
    return sharing_problem(session.base, cache)


def _batched(session: Session, calls: Sequence[Call], options: dict[str, Any]) -> list[list[int]]:
    prefix, cache = calls[0].cached, calls[0].cache
    longest = max(len(call.suffix) for call in calls)
    padding = [longest - len(call.suffix) for call in calls]
    pad = session.tokenizer.pad_token_id
    pad = next(iter(session._eos_ids())) if pad is None else pad
    device = session.base.device
    # The padding lies between the prefix and the suffix: position ids, which transformers counts
    # over the mask, are then those of the row alone.
    ids = [[*prefix, *[pad] * gap, *call.suffix] for gap, call in zip(padding, calls)]
    mask = [[1] * len(prefix) + [0] * gap + [1] * len(c.suffix) for gap, c in zip(padding, calls)]
    starts = [None if c.start is None else c.start + gap for gap, c in zip(padding, calls)]
    shared = SharedPrefixCache(cache, torch.tensor(padding, device=device))
    if "stop_strings" in options:
        options = {"tokenizer": session.tokenizer, **options}
    options.setdefault("pad_token_id", pad)
    names = [call.adapter for call in calls]
    with (
        torch.no_grad(),
        attending(session.base, shared),
        session.adapters.scope(names, starts),
    ):
        out = session.base.generate(
            torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            use_cache=True,
            **{session.adapters.cache_argument: shared},
            **options,
        )
    return out[:, len(prefix) + longest :].tolist()


def _alone(session: Session, call: Call, options: dict[str, Any]) -> list[int]:
    return session._run(call, view_of(call.cache), options, 1)[0, len(call.ids) :].tolist()
