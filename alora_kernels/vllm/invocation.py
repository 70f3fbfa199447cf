"""Where an invocation begins, and how a request carries that through vLLM's processes.

The start travels in the request's own sampling parameters (`extra_args`), which vLLM copies for
each request and hands to the scheduler and to the workers. The LoRARequest is shared between
requests and stays as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

KEY = "alora_kernels_invocation"


class Invocation(NamedTuple):
    """One request's first active position, and the digest of its adapter's files."""

    start: int
    identity: str


def put(sampling_params: Any, invocation: Invocation) -> None:
    """Writes the invocation into one request's parameters. A shared dictionary is not changed."""
    extra = dict(sampling_params.extra_args or {})
    extra[KEY] = list(invocation)
    sampling_params.extra_args = extra


def of(sampling_params: Any) -> Invocation | None:
    """The invocation of a request; None for a plain LoRA."""
    if sampling_params is None or not sampling_params.extra_args:
        return None
    found = sampling_params.extra_args.get(KEY)
    return None if found is None else Invocation(*found)
