"""The steps of this backend's programs: launches, and choices among them. All plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..programs import Make, Program, Torch, View, fresh
from .configs import Config

ROW_ADAPTER = fresh("row_adapter", (0,), torch.int32)
ACTIVE_ROWS = fresh("active_rows", (0,), torch.int32)
ACTIVE_COUNT = fresh("active_count", (1,), torch.int32)
SEED = fresh("seed", (1,), torch.int64)
ACTIVE = {"active_rows": ACTIVE_ROWS, "active_count": ACTIVE_COUNT}


class Described(NamedTuple):
    """A whole matrix that is read or written by blocks through a tensor descriptor (TMA)."""

    view: View
    block: tuple[int, int]


class Launch(NamedTuple):
    """`masked_lora_{kernel}_kernel`; `fields` has a value for each of its parameters."""

    kernel: str
    grid: tuple[int, int, int]
    fields: Mapping[str, View | Described | torch.dtype | float | str | None]
    warps: int
    stages: int


class Choice(NamedTuple):
    """Steps by the config of their kernel. The first is the default; opt-in tuning measures all,
    and remembers the quickest for `key`. A config that asks the GPU for too much is passed over."""

    key: tuple[Any, ...]
    ways: Mapping[Config, Sequence[Any]]  # of Make and Launch


Step = Make | Launch | Torch | Choice


def launches(program: Program) -> list[Launch]:
    """The kernels in order, by the default of each choice."""
    found: list[Launch] = []
    for step in program.launches:
        some = next(iter(step.ways.values())) if isinstance(step, Choice) else [step]
        found += [s for s in some if isinstance(s, Launch)]
    return found
