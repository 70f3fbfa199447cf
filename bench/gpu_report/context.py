"""What a part of the report is given."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alora_kernels.files import write_whole
from bench.common.clocks import Call, Clock, CpuClock, CudaClock


class LeftOut(Exception):
    """A part that cannot run here, with the reason."""


class MadeUpClock:
    """A rehearsal's: a call runs once, and takes as long as the pattern says."""

    launch = "eager"

    def __init__(self) -> None:
        self._samples = 0

    def prepare(self, call: Call) -> Call:
        return call

    def sample(self, call: Call, repeats: int) -> float:
        call()
        self._samples += 1
        return 1e-3 * (1.0 + 0.01 * (self._samples % 7))


class Context:
    """The device, how much time is left, and where results go as soon as there are some."""

    def __init__(
        self, device: torch.device, seconds: float, file: Path, rehearsal: bool = False
    ) -> None:
        self.device, self.seconds, self.rehearsal = device, seconds, rehearsal
        self.data: dict[str, Any] = {}
        self._file, self._ends = file, time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._ends - time.monotonic())

    def save(self, **more: Any) -> None:
        """Keep results: what is saved is in the report, whatever becomes of the part."""
        self.data.update(more)
        write_whole(self._file, json.dumps(self.data).encode())

    @property
    def clocks(self) -> list[Clock]:
        """How calls are timed: on a GPU as graphs, and eagerly."""
        if self.rehearsal:
            return [MadeUpClock()]
        if self.device.type == "cpu":
            return [CpuClock()]
        return [CudaClock(self.device, graph) for graph in (True, False)]

    def timed(self, call: Callable[[], Any]) -> float:
        """Seconds of one long call, the device's part included."""
        if self.rehearsal:
            return MadeUpClock().sample(call, 1)
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Until the device has done all that it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
