"""Backends that break in each of the ways that a kernel can, for the self-test."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any, ClassVar

import torch
from torch import Tensor

from alora_kernels.backends.reference import ReferenceBackend

runs = 0


def wrong(ys: list[Tensor]) -> None:
    """One element is off, as where a tile's last column is lost."""
    ys[0][-1, -1] += 1.0


def unwritten(ys: list[Tensor]) -> None:
    """One row of an output is never written."""
    fresh = torch.empty_like(ys[0])
    fresh[:-1] = ys[0][:-1]
    ys[0] = fresh


def different(ys: list[Tensor]) -> None:
    """The second run finds what the first left behind, and is off by one rounding."""
    global runs
    runs += 1
    if runs % 2 == 0:
        ys[0][0, 0] *= 1.0 + 2**-7


def raising(ys: list[Tensor]) -> None:
    raise RuntimeError("cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE")


def out_of_memory(ys: list[Tensor]) -> None:
    raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")


def printing(ys: list[Tensor]) -> None:
    """As a kernel's printf: what it says must not be taken for the worker's words."""
    print('{"end": 0}', flush=True)


def crashing(ys: list[Tensor]) -> None:
    print("CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def exiting(ys: list[Tensor]) -> None:
    os._exit(5)


def hanging(ys: list[Tensor]) -> None:
    time.sleep(600)


class Backend(ReferenceBackend):
    """Any strategy by the definition, but for the faults of some strategies and dtypes."""

    faults: ClassVar[dict[tuple[str, torch.dtype], Any]] = {}

    def forward(
        self, call: Any, strategy: str, x: Any, projections: Any, base_outs: Any, save: bool
    ) -> Any:
        ys, xa = super().forward(call, strategy, x, projections, base_outs, save)
        self.faults.get((strategy, x.dtype), lambda ys: None)(ys)
        return ys, xa


class Mild(Backend):
    """Faults that a process survives."""

    faults: ClassVar = {
        ("onepass", torch.bfloat16): wrong,
        ("onepass", torch.float16): unwritten,
        ("tail", torch.bfloat16): different,
        ("tail", torch.float16): raising,
        ("delta", torch.bfloat16): out_of_memory,
        ("delta", torch.float16): printing,
    }


class Grave(Backend):
    """Faults that end a process, or that it never comes back from."""

    faults: ClassVar = {
        ("onepass", torch.bfloat16): crashing,
        ("tail", torch.bfloat16): exiting,
        ("tail", torch.float16): hanging,
    }


class Unstartable(Backend):
    def __init__(self) -> None:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")
