"""Where an invocation begins, and how a request carries that through vLLM's processes.

The start travels in the request's own sampling parameters (`extra_args`), which vLLM copies for
each request and hands to the scheduler and to the workers. The LoRARequest is shared between
requests and stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

KEY = "alora_kernels_invocation"


class Invocation(NamedTuple):
    """Of one request: the position of its first active token, and which adapter files it means."""

    start: int
    identity: str


def last_occurrence(token_ids: list[int], tokens: Sequence[int]) -> int | None:
    """The first position of the last occurrence of `tokens` in `token_ids`, or None."""
    # list.index runs at C speed, so the list is turned round rather than walked.
    turned, wanted, count = token_ids[::-1], list(tokens)[::-1], len(tokens)
    position = 0
    while True:
        try:
            position = turned.index(wanted[0], position)
        except ValueError:
            return None
        if turned[position : position + count] == wanted:
            return len(token_ids) - position - count
        position += 1


def put(sampling_params: Any, invocation: Invocation) -> None:
    """Writes the invocation into a request's own parameters; a shared dictionary is not touched."""
    extra = dict(sampling_params.extra_args or {})
    extra[KEY] = list(invocation)
    sampling_params.extra_args = extra


def of(sampling_params: Any) -> Invocation | None:
    """The invocation of a request; None for a plain LoRA."""
    if sampling_params is None or not sampling_params.extra_args:
        return None
    found = sampling_params.extra_args.get(KEY)
    return None if found is None else Invocation(*found)
