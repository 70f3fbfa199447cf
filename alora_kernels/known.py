"""Known: what has been found out about a call, for the later calls that are like it.

Checks and choices depend on options and on how tensors are laid out, not on what they hold nor on
where they lie. All of that is the call's signature. What holds for one call holds for every call of
the same signature, so it is found out once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .activation import Activation
    from .backends import Backend, Projection

KEPT = 4096  # signatures
PLAIN = (Tensor, torch.nn.Parameter)

_known: dict[tuple[Any, ...], Known] = {}


class Known:
    """What is known of the calls of one signature. Compared by identity: one for a signature."""

    __slots__ = ("backward", "checked", "forward", "needs_grad")

    def __init__(self) -> None:
        self.checked = False  # no argument was refused
        self.needs_grad = False
        self.forward: tuple[Backend, str] | None = None  # the choice
        self.backward: tuple[Backend, str] | None = None


def find(
    x: Tensor,
    projections: Sequence[Projection],
    base_outs: Sequence[Tensor] | None,
    activation: Activation,
    options: tuple[Any, ...],  # all that the call asks for beside its tensors
) -> Known | None:
    """What is known of these calls; None where a signature does not describe them."""
    tensors = (x, *chain.from_iterable(projections), *(base_outs or ()))
    try:
        mask = activation.row_adapter
        signature = (
            options,
            activation.__class__,
            mask.shape,
            mask.device,
            activation.num_active,
            activation.max_active,
            activation.expected_active,
            *[
                None if t is None else (t.__class__, t.shape, t.stride(), t.dtype, t.device)
                for t in tensors
            ],
        )
        if torch.is_grad_enabled():
            signature += tuple([t is not None and t.requires_grad for t in tensors])
        found = _known.get(signature)
    except (AttributeError, TypeError, RuntimeError):
        return None
    if found is None:
        if any(t is not None and t.__class__ not in PLAIN for t in tensors):
            return None  # a subclass may be more than its layout says
        if len(_known) >= KEPT:
            _known.clear()
        found = _known[signature] = Known()
    return found


def forget() -> None:
    """Find out anew: something beside the signature has changed."""
    _known.clear()
