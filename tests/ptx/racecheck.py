"""Happens-before over shared memory: a vector clock a warp, an epoch a byte.

Each byte remembers its last write (warp, clock) and every warp's last read. An access is ordered
when the accessing warp's clock has seen those epochs; barriers and mbarriers pass clocks on. The
grain is a warp: lanes of one warp are taken as ordered among themselves.
"""

from __future__ import annotations

import numpy as np


class RaceDetector:
    """Clocks of the `warps` of one block over `size` bytes of shared memory."""

    def __init__(self, warps: int, size: int) -> None:
        self.clock = np.eye(warps, dtype=np.int32)  # clock[w, u]: what warp w knows of warp u
        self.writer = np.zeros(size, np.int16)
        self.written = np.zeros(size, np.int32)  # 0: never
        self.reads = np.zeros((warps, size), np.int32)

    def release(self, warp: int, into: np.ndarray) -> None:
        """Pass on all that `warp` has done, and start its next epoch."""
        np.maximum(into, self.clock[warp], out=into)
        self.clock[warp, warp] += 1

    def acquire(self, warp: int, clock: np.ndarray) -> None:
        """`warp` has now seen everything that was released into `clock`."""
        np.maximum(self.clock[warp], clock, out=self.clock[warp])

    def fresh(self) -> np.ndarray:
        """A clock that has seen nothing: the state of a new barrier."""
        return np.zeros(len(self.clock), np.int32)

    def read(self, at: np.ndarray, warp: np.ndarray) -> str | None:
        """Record reads of bytes `at` by `warp` (one each); the conflict found, or None."""
        racing = self.clock[warp, self.writer[at]] < self.written[at]
        self.reads[warp, at] = self.clock[warp, warp]
        if racing.any():
            return self._tell("read", racing, at, warp, self.writer[at])
        return None

    def write(self, at: np.ndarray, warp: np.ndarray, changes: np.ndarray) -> str | None:
        """Record writes; `changes` is false where the byte already holds the value written."""
        racing = (self.clock[warp, self.writer[at]] < self.written[at]) & changes
        other = self.writer[at]
        for u in range(len(self.clock)):
            late = (self.reads[u, at] > self.clock[warp, u]) & changes
            if late.any() and not racing.any():
                racing, other = late, np.full_like(warp, u)
        self.writer[at] = warp
        self.written[at] = self.clock[warp, warp]
        if racing.any():
            return self._tell("write", racing, at, warp, other)
        return None

    @staticmethod
    def _tell(
        what: str, racing: np.ndarray, at: np.ndarray, warp: np.ndarray, other: np.ndarray
    ) -> str:
        i = int(np.argmax(racing))
        return (
            f"shared-memory race: {what} of {int(at[i]):#x} by warp {int(warp[i])} is not ordered "
            f"after an access by warp {int(other[i])}"
        )
