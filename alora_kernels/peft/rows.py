"""Batches whose rows run different adapters."""

from __future__ import annotations

import torch

from ..activation import Activation
from .ambient import ForwardState, Names

BASE = "__base__"  # PEFT's word for a row of the base model


class BlockState(ForwardState):
    """The state of layers that are called on their own inside an `adapter_scope`.

    It lasts as long as the block, in which PEFT may be asked which adapters are active, so layers
    that keep PEFT's forward are told by arguments alone what to run.
    """


def rows_of(names: Names, batch: int) -> tuple[tuple[str, ...], list[str | None] | None]:
    """The adapters that are named, and the one of each of `batch` rows where rows differ."""
    if names is None:
        return (), None
    if isinstance(names, str):
        return (names,), None
    rows = [None if n is None or n == BASE else n for n in names]
    if batch % max(len(rows), 1) or not rows:
        raise ValueError(
            f"{len(rows)} adapter names were given for a batch of {batch} rows; give one for "
            "each row (generate repeats them for beams and return sequences)"
        )
    if len(set(rows)) == 1:
        return rows_of(rows[0], batch)  # one for all rows, however it was said
    rows = [n for n in rows for _ in range(batch // len(rows))]
    return tuple(dict.fromkeys(n for n in rows if n is not None)), rows


def starts_of(state: ForwardState, name: str, starts: list[int | None]) -> list[int | None]:
    """`starts` for the rows that run `name`, None for the others."""
    if state.row_names is None:
        return starts
    return [s if n == name else None for s, n in zip(starts, state.row_names)]


def restrict(state: ForwardState, name: str, activation: Activation) -> Activation:
    """The rows of `activation` that run `name`."""
    if state.row_names is None:
        return activation
    mine = [n == name for n in state.row_names]
    rows = activation.num_rows // len(mine)
    mask = torch.tensor(mine).repeat_interleave(rows).to(activation.device)
    return Activation.from_mask(activation.mask & mask)
